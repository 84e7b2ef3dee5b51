"""The ops of the models timed on both of their roads: the fused kernels, and PyTorch's own best."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from minmodels import kernels
from minmodels.device import pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD = "op", "dtype", "ms", "torch ms", "ratio", "error", "torch err"
NOTE = "ms: medians in turn; ratio: PyTorch's / ours; error: max |x - fp64| / max |fp64|"


class Row(NamedTuple):
    op: str
    dtype: str
    ms: float
    torch_ms: float
    error: float
    torch_error: float

    @property
    def ratio(self) -> float:
        return self.torch_ms / self.ms

    def cells(self) -> tuple[str, ...]:
        errors = f"{self.error:.1e}", f"{self.torch_error:.1e}"
        return self.op, self.dtype, f"{self.ms:.4g}", f"{self.torch_ms:.4g}", f"{self.ratio:.2f}x", *errors


class Op(NamedTuple):
    call: Callable  # of minmodels.kernels
    inputs: Callable  # size -> the arguments
    size: tuple[int, ...]
    about: str  # of the size, and what PyTorch's side is
    backward: tuple[bool, ...]  # whether to time it with its gradients: each one a row
    dtypes: tuple[str, ...] = tuple(DTYPES)
    part: Callable[[Tensor], Tensor] = lambda t: t  # of the arguments and results: the former alone decides the latter, so fp64 stays small


def _labels(N, V):
    return torch.randn(N, V), torch.randint(V, (N,))


def _linear(N, C, V):
    return torch.randn(N, C), torch.randn(V, C) * C**-0.5, torch.randint(V, (N,))


def _masks(N, C, side):
    return torch.randn(N, C, side, side), torch.randint(C, (N, side, side))


def _boxes(N, boxes, truths):
    centres, sizes = torch.rand(N, boxes + truths, 2), 0.05 + 0.3 * torch.rand(N, boxes + truths, 2)
    return torch.cat((centres, sizes), -1).split((boxes, truths), 1)


def _head(N, cells, classes):
    return (torch.rand(N, cells, cells, 10 + classes),)


def _detect(pred):
    sizes = dict(boxes_per_cell=2, num_classes=pred.shape[-1] - 10, image_size=16 * pred.shape[1])
    return kernels.yolo_detect(pred, head="v1", score_threshold=0.5, iou_threshold=0.5, max_output=100, **sizes)[:2]


OPS = {
    "attention": Op(
        partial(kernels.attention, causal=True),
        lambda *size: torch.randn(3, *size).unbind(),
        (1, 8, 1024, 128),
        "(batch, heads, length, head dim), causal; torch: F.scaled_dot_product_attention",
        (False, True),
        part=lambda t: t[:, :1],
    ),
    "cross_entropy": Op(
        partial(kernels.cross_entropy, reduction="sum"), _labels, (512, 32000), "(rows, classes); torch: F.cross_entropy", (True,),
        part=lambda t: t[:64],
    ),
    "linear_cross_entropy": Op(
        kernels.linear_cross_entropy, _linear, (256, 256, 16000), "(rows, width, classes); torch: F.linear and F.cross_entropy", (True,)
    ),
    "bce_dice_loss": Op(
        kernels.bce_dice_loss, _masks, (2, 8, 128),
        "(images, classes, side); torch: F.binary_cross_entropy_with_logits, and Dice of F.one_hot", (True,),
    ),
    "iou_match": Op(
        lambda *both: kernels.iou_match(*both, fmt="cxcywh")[::2], _boxes, (8, 2000, 50),
        "(images, boxes, true boxes); torch: the matrix of IoUs, its largest of rows and columns", (False,), ("fp32",),
    ),
    "yolo_detect": Op(
        _detect, _head, (8, 14, 20), "(images, cells, classes); torch: the boxes, their IoUs, a loop over them", (False,), ("fp32",)
    ),
}  # fmt: skip


def measure(seconds: float = 0.7, sizes: dict[str, tuple] | None = None) -> list[Row]:
    """Each op beside PyTorch's, timed for `seconds` each. sizes: other ones than OPS has, by the ops' names."""
    device, rows = pick_device(""), []
    for name, op in OPS.items():
        torch.manual_seed(0)
        inputs = op.inputs(*(sizes or {}).get(name, op.size))
        for backward in op.backward:
            for short in op.dtypes:
                cast = [t.to(device, DTYPES[short] if t.is_floating_point() else t.dtype) for t in inputs]
                row = _row(op, cast, backward, seconds)
                rows.append(Row(f"{name} {'fwd+bwd' if backward else 'fwd'}", short, *row))
    return rows


def where() -> str:
    """What they were measured on."""
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return f"minkernels against PyTorch {torch.__version__} ({device})"


def told(sizes: dict[str, tuple] | None = None) -> str:
    lines = (f"{name}: {(sizes or {}).get(name, op.size)} {op.about}" for name, op in OPS.items())
    return "\n".join((*lines, NOTE))


def table(rows: list[Row]) -> Table:
    """For a terminal of 80 columns."""
    table = Table(title=where(), box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in HEAD:
        table.add_column(name, justify="left" if name in ("op", "dtype") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def _row(op: Op, inputs: list[Tensor], backward: bool, seconds: float) -> tuple[float, ...]:
    with torch.no_grad():
        out = op.call(*inputs)
    do = [torch.randn_like(out)] if backward and out.dim() else None
    wide = ([op.part(t).double() if t.is_floating_point() else op.part(t) for t in ts or []] for ts in (inputs, do))
    exact = _call("torch", op.call, *wide, backward)
    calls = [partial(_call, road, op.call, inputs, do, backward) for road in ("fused", "torch")]
    errors = [max(_error(op.part(a), e) for a, e in zip(call(), exact, strict=True)) for call in calls]
    return *_in_turns(calls, seconds), *errors


def _call(road: str, call: Callable, inputs: list[Tensor], do: list[Tensor] | None, backward: bool) -> tuple[Tensor, ...]:
    with kernels.using(road):
        if not backward:
            out = call(*inputs)
            return out if isinstance(out, tuple) else (out,)
        inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        return torch.autograd.grad(call(*inputs), [t for t in inputs if t.requires_grad], do or None)


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).abs().max() / exact.abs().max()).item()


def _in_turns(calls: list[Callable], seconds: float) -> list[float]:
    """The median ms of each call, measured A B A B ..., so that other load on the machine slows them alike."""
    samples, end = [[] for _ in calls], time.perf_counter() + seconds
    while len(samples[0]) < 3 or time.perf_counter() < end:
        for call, ms in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ms.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(ms) for ms in samples]

"""BCE, BCE + Dice and focal loss beside the formulas in plain PyTorch, eager and under torch.compile."""

import os
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import minkernels
from bench.timing import RETAINED, compiled, max_error


class Case(NamedTuple):
    N: int  # images
    C: int  # classes
    S: int  # height and width
    dtype: torch.dtype
    target: str = "dense"  # in dtype; or "map", int64 class numbers
    heap: str = "normal"  # or "retained"

    @property
    def bytes(self):
        """Read once: logits and targets."""
        pixels = self.N * self.S**2
        return pixels * self.C * self.dtype.itemsize + pixels * (8 if self.target == "map" else self.C * self.dtype.itemsize)

    @property
    def grad_bytes(self):
        return self.N * self.C * self.S**2 * self.dtype.itemsize

    def __str__(self):
        options = ("-map" if self.target == "map" else "") + ("" if self.heap == "normal" else f"-heap-{self.heap}")
        return f"{self.N}x{self.C}x{self.S}x{self.S}-{str(self.dtype).removeprefix('torch.')}{options}"


def plain_bce(x, t):
    return F.binary_cross_entropy_with_logits(x, t)


def plain_dice(x, t):
    if t.dim() < x.dim():
        t = F.one_hot(t, x.shape[1]).movedim(-1, 1).to(x.dtype)
    p = x.sigmoid()
    both, sizes = (p * t).sum((2, 3)), p.sum((2, 3)) + t.sum((2, 3))
    return F.binary_cross_entropy_with_logits(x, t) + (1 - (2 * both + 1) / (sizes + 1)).mean()


def plain_focal(x, t):
    """As torchvision.ops.sigmoid_focal_loss writes it."""
    p, ce = x.sigmoid(), F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    return ((0.25 * t + 0.75 * (1 - t)) * ce * (1 - p_t) ** 2).mean()


LOSSES = {  # ours, and the plain formula
    "bce": (minkernels.bce_with_logits, plain_bce),
    "bce_dice": (minkernels.bce_dice_loss, plain_dice),
    "focal": (partial(minkernels.sigmoid_focal_loss, reduction="mean"), plain_focal),
}
IMPLS, COMPILED = ("minkernels", "torch"), ("torch-compile",)
BOTH = torch.float32, torch.bfloat16
HEAPS = "normal", "retained"


def cases(maps=False):
    """One class of 8 images, what a segmentation network of two classes makes; and 21 classes, as in Pascal VOC, for Dice."""
    dense = [Case(8, 1, 512, dtype, heap=heap) for heap in HEAPS for dtype in BOTH]
    large = [Case(32, 1, 1024, dtype) for dtype in BOTH]
    tiny = [Case(2, 1, 9, torch.float32), Case(1, 3, 7, torch.bfloat16, heap="retained")]
    if maps:
        dense += [Case(4, 21, 512, dtype, "map", heap) for heap in HEAPS for dtype in BOTH]
        large += [Case(16, 21, 512, dtype, "map") for dtype in BOTH]
        tiny += [Case(2, 3, 9, torch.float32, "map")]
    return {"cpu": dense, "cuda": large, "tiny": tiny}


def make(case, device):
    shape = case.N, case.C, case.S, case.S
    if device == "cpu" and 30 * case.bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip("the machine's memory is too small for the copies that the peers make")
    x = torch.randn(shape, device=device).to(case.dtype)
    if case.target == "map":
        return x, torch.randint(case.C, (case.N, case.S, case.S), device=device)
    return x, (torch.rand(shape, device=device) > 0.7).to(case.dtype)


def run(timed, device, case, loss: str, backward: bool):
    def build():
        x, target = make(case, device)
        x.requires_grad_(backward)
        ours, plain = LOSSES[loss]

        def step(f):
            out = f(x, target)
            return (out.detach(), *torch.autograd.grad(out, x)) if backward else (out,)

        @cache
        def exact():
            wide, t = x.detach().double().requires_grad_(backward), target if case.target == "map" else target.double()
            out = plain(wide, t)
            return (out.detach(), *torch.autograd.grad(out, wide)) if backward else (out,)

        impls = {"minkernels": ours, "torch": plain, "torch-compile": compiled(plain)}
        return {name: partial(step, f) for name, f in impls.items()}, lambda outputs: max_error(outputs, exact(), x.dtype)

    moved = case.bytes + (case.grad_bytes + (case.bytes if loss == "bce_dice" else 0)) * backward  # Dice: its sums come first
    timed(
        f"{loss} fwd{'+grad' * backward}", build, bytes=moved, shape=case[:3] + case[2:3], dtype=case.dtype,
        env=RETAINED if case.heap == "retained" else None, **({"warmup": 10} if case.heap == "retained" else {}),
    )  # fmt: skip


def bench_bce_fwd(timed, device, case, impl):
    run(timed, device, case, "bce", backward=False)


def bench_bce_fwd_grad(timed, device, case, impl):
    run(timed, device, case, "bce", backward=True)


def bench_bce_dice_fwd(timed, device, case, impl):
    run(timed, device, case, "bce_dice", backward=False)


def bench_bce_dice_fwd_grad(timed, device, case, impl):
    run(timed, device, case, "bce_dice", backward=True)


def bench_focal_fwd(timed, device, case, impl):
    run(timed, device, case, "focal", backward=False)


def bench_focal_fwd_grad(timed, device, case, impl):
    run(timed, device, case, "focal", backward=True)


CASES = cases()
bench_bce_dice_fwd.cases = bench_bce_dice_fwd_grad.cases = cases(maps=True)

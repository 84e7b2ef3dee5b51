"""Cross-entropy beside F.cross_entropy, eager and under torch.compile."""

import os
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from bench.timing import RETAINED, compiled, max_error
from minkernels import cross_entropy

JUDGED = 64  # rows of gradient that are compared with fp64; the loss is compared over all rows


class Case(NamedTuple):
    N: int  # rows (tokens)
    V: int  # classes
    dtype: torch.dtype
    heap: str = "normal"  # or "retained"

    @property
    def logits_bytes(self):
        return self.N * self.V * self.dtype.itemsize

    @property
    def env(self):
        return RETAINED if self.heap == "retained" else None

    def __str__(self):
        heap = "" if self.heap == "normal" else f"-heap-{self.heap}"
        return f"{self.N}x{self.V}-{str(self.dtype).removeprefix('torch.')}{heap}"


IMPLS = {"minkernels": cross_entropy, "torch": F.cross_entropy}
COMPILED = {"torch-compile": F.cross_entropy}
DTYPES = torch.float32, torch.bfloat16
CASES = {
    "cpu": [
        *(Case(1024, 32000, dtype, heap) for heap in ("normal", "retained") for dtype in DTYPES),
        Case(8192, 50257, torch.bfloat16),
    ],
    "cuda": [
        *(Case(N, V, torch.bfloat16) for N, V in ((8192, 128256), (8192, 32000), (1024, 128256), (8192, 50304), (8192, 50257))),
        Case(8192, 32000, torch.float32),
    ],
    "tiny": [Case(7, 130, torch.float32), Case(5, 33, torch.bfloat16, "retained")],
}


def impls():
    return IMPLS | {name: compiled(f) for name, f in COMPILED.items()}


def make(case: Case, device):
    """Logits and targets. At most 1024 rows are drawn, and then repeated: drawing takes longer than any of the losses."""
    if device == "cpu" and 8 * case.logits_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip("the machine's memory is too small for the copies that the peers make")
    rows = torch.randn(min(case.N, 1024), case.V, device=device).to(case.dtype)
    x = rows.repeat(-(-case.N // len(rows)), 1)[: case.N]
    return x, torch.randint(case.V, (case.N,), device=device)


def bench_fwd(timed, device, case, impl):
    def build():
        x, target = make(case, device)
        return {name: lambda f=f: (f(x, target),) for name, f in impls().items()}, judge(x, target, backward=False)

    timed("cross_entropy fwd", build, bytes=case.logits_bytes, **about(case))


def bench_fwd_grad(timed, device, case, impl):
    def build():
        x, target = make(case, device)
        x.requires_grad_()

        def step(f):
            loss = f(x, target)
            return loss.detach(), *torch.autograd.grad(loss, x)

        return {name: partial(step, f) for name, f in impls().items()}, judge(x, target, backward=True)

    timed("cross_entropy fwd+grad", build, bytes=2 * case.logits_bytes, **about(case))


def judge(x, target, backward: bool):
    """Compares the loss, and the gradient of the last rows, with PyTorch's in fp64, a few rows at a time for the memory."""

    @cache
    def exact():
        chunks = zip(x.detach().split(512), target.split(512), strict=True)
        loss = sum(F.cross_entropy(rows.double(), labels, reduction="sum") for rows, labels in chunks) / len(x)
        if not backward:
            return (loss,)
        rows, labels = x[-JUDGED:].detach().double().requires_grad_(), target[-JUDGED:]
        return loss, *torch.autograd.grad(F.cross_entropy(rows, labels, reduction="sum") / len(x), rows)

    return lambda outputs: max_error([outputs[0], *(g[-JUDGED:] for g in outputs[1:])], exact(), x.dtype)


def about(case: Case):
    rounds = {}
    if case.heap == "retained":
        rounds = {"warmup": 10}  # it takes some calls until the heap has settled
    elif case.logits_bytes > 1 << 29:
        rounds = {"min_rounds": 3}  # seconds a call on a CPU
    return {"shape": case[:2], "dtype": case.dtype, "env": case.env, **rounds}

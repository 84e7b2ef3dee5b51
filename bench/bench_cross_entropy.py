"""cross_entropy and token_logprobs beside PyTorch, eager and under torch.compile, and beside the peers that are installed."""

import math
import os
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from bench.timing import RETAINED, compiled, installed, max_error
from minkernels import cross_entropy, token_logprobs

JUDGED = 64  # rows of gradient that are compared with fp64 (of images, one); the loss is compared over all


class Case(NamedTuple):
    N: int  # rows (tokens), or images
    V: int  # classes
    dtype: torch.dtype
    heap: str = "normal"  # or "retained"
    S: int = 0  # of (N, V, S, S) logits, where they are images
    kind: str = "labels"  # or "smoothing": labels smoothed by 0.1; or "probs": targets that are probabilities

    @property
    def shape(self):
        return (self.N, self.V, self.S, self.S) if self.S else (self.N, self.V)

    @property
    def logits_bytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def env(self):
        return RETAINED if self.heap == "retained" else None

    def __str__(self):
        kind = "" if self.kind == "labels" else f"-{self.kind}"
        heap = "" if self.heap == "normal" else f"-heap-{self.heap}"
        return f"{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}{kind}{heap}"


def liger():
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda x, target: LigerCrossEntropyFunction.apply(x.clone(), target, None, -100)[0]  # it writes over its logits


def quack():
    from quack import cross_entropy as theirs

    return lambda x, target: theirs(x, target, reduction="mean")


def logprobs(x, target):
    logp = x.log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


IMPLS = {"minkernels": (cross_entropy, token_logprobs), "torch": (F.cross_entropy, logprobs)}
COMPILED = {"torch-compile": (F.cross_entropy, logprobs)}
CUDA_IMPLS = {"liger-on-a-copy": liger, "quack": quack}
DTYPES = torch.float32, torch.bfloat16
HEAPS = "normal", "retained"
CASES = {
    "cpu": [
        *(Case(1024, 32000, dtype, heap) for heap in HEAPS for dtype in DTYPES),
        *(Case(512, 32000, torch.float32, heap, kind=kind) for kind in ("smoothing", "probs") for heap in HEAPS),
        *(Case(4, 21, torch.float32, heap, 512) for heap in HEAPS),
        Case(8192, 50257, torch.bfloat16),
        *(Case(2048, 103, dtype) for dtype in DTYPES),  # characters
    ],
    "cuda": [
        *(Case(8192, V, torch.bfloat16) for V in (128256, 32000, 50304, 50257)),
        *(Case(N, 128256, torch.bfloat16) for N in (1024, 16)),
        Case(8192, 32000, torch.float32),
        *(Case(4096, 32000, torch.bfloat16, kind=kind) for kind in ("smoothing", "probs")),
        Case(16, 21, torch.bfloat16, S=512),
    ],
    "tiny": [
        Case(7, 130, torch.float32),
        Case(5, 33, torch.bfloat16, "retained"),
        Case(2, 5, torch.float32, S=9),
        Case(4, 9, torch.float32, kind="probs"),
    ],
}


def make(case: Case, device):
    """Logits and targets. At most 1024 rows are drawn, and then repeated: drawing takes longer than any of the losses."""
    if device == "cpu" and 8 * case.logits_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip("the machine's memory is too small for the copies that the peers make")
    rows = torch.randn(min(case.N, 1024), *case.shape[1:], device=device).to(case.dtype)
    x = rows.repeat(-(-case.N // len(rows)), *[1] * (rows.dim() - 1))[: case.N]
    if case.kind == "probs":
        return x, x.flip(1).softmax(1)
    return x, torch.randint(case.V, (case.N, *case.shape[2:]), device=device)


def impls(case: Case, op=0):
    """op: 0 cross_entropy, 1 token_logprobs. A peer that has no such option skips its row."""
    options = {"label_smoothing": 0.1} if case.kind == "smoothing" else {}
    table = {name: partial(ops[op], **options) for name, ops in IMPLS.items()}
    table |= {name: compiled(partial(ops[op], **options)) for name, ops in COMPILED.items()}
    plain = case.kind == "labels" and not case.S and op == 0
    lacks = partial(pytest.skip, "not among its options")
    return table | {name: installed(name, load) if plain else lambda *_: lacks() for name, load in CUDA_IMPLS.items()}


def bench_fwd(timed, device, case, impl):
    def build():
        x, target = make(case, device)
        return {name: lambda f=f: (f(x, target),) for name, f in impls(case).items()}, judge(case, x, target, backward=False)

    timed("cross_entropy fwd", build, bytes=read(case), **about(case))


def bench_fwd_grad(timed, device, case, impl):
    def build():
        x, target = make(case, device)
        x.requires_grad_()

        def step(f):
            loss = f(x, target)
            return loss.detach(), *torch.autograd.grad(loss, x)

        return {name: partial(step, f) for name, f in impls(case).items()}, judge(case, x, target, backward=True)

    timed("cross_entropy fwd+grad", build, bytes=read(case) + case.logits_bytes, **about(case))


def bench_logprobs(timed, device, case, impl):
    def build():
        x, target = make(case, device)

        @cache
        def exact():
            parts = [logprobs(rows.double(), labels) for rows, labels in zip(x.split(64), target.split(64), strict=True)]
            return [torch.cat(column) for column in zip(*parts, strict=True)]

        calls = {name: lambda f=f: f(x, target)[:2] for name, f in impls(case, 1).items()}
        return calls, lambda outputs: max_error(outputs, exact(), x.dtype)

    timed("token_logprobs", build, bytes=read(case), **about(case))


bench_logprobs.cases = {
    "cpu": [Case(1024, 32000, torch.float32, heap) for heap in HEAPS],
    "cuda": [Case(8192, V, torch.bfloat16) for V in (151936, 32000)],
    "tiny": [Case(7, 130, torch.float32)],
}


def judge(case, x, target, backward: bool):
    """Compares the loss, and the gradient of the last rows, with PyTorch's in fp64, a few rows at a time for the memory."""
    smoothing, judged, rows_each = 0.1 * (case.kind == "smoothing"), 1 if case.S else JUDGED, 1 if case.S else 512

    def loss(x, target):
        target = target.double() if target.is_floating_point() else target
        return F.cross_entropy(x, target, reduction="sum", label_smoothing=smoothing) / x[:, 0].numel()

    @cache
    def exact():
        chunks = zip(x.detach().split(rows_each), target.split(rows_each), strict=True)
        total = sum(loss(rows.double(), labels) * len(rows) for rows, labels in chunks) / len(x)
        if not backward:
            return (total,)
        rows = x[-judged:].detach().double().requires_grad_()
        return total, *torch.autograd.grad(loss(rows, target[-judged:]) * len(rows) / len(x), rows)

    return lambda outputs: max_error([outputs[0], *(g[-judged:] for g in outputs[1:])], exact(), x.dtype)


def read(case: Case):
    """Bytes that a loss must read: the logits, and targets as large where they are probabilities."""
    return case.logits_bytes * (2 if case.kind == "probs" else 1)


def about(case: Case):
    rounds = {}
    if case.heap == "retained":
        rounds = {"warmup": 10}  # it takes some calls until the heap has settled
    elif case.logits_bytes > 1 << 29:
        rounds = {"min_rounds": 3}  # seconds a call on a CPU
    return {"shape": case.shape, "dtype": case.dtype, "env": case.env, **rounds}

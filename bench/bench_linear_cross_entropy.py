"""linear_cross_entropy, forward and backward, beside F.linear + F.cross_entropy, PyTorch's own in chunks, and peers where installed."""

from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.timing import compiled, installed, max_error
from minkernels import linear_cross_entropy

JUDGED = 64  # rows of input, and of linear_weight, whose gradients are compared with fp64


class Case(NamedTuple):
    N: int  # rows (tokens)
    H: int  # features
    V: int  # classes
    dtype: torch.dtype
    ignored: float = 0.0  # the share of rows, as prompts are in fine-tuning

    def __str__(self):
        ignored = f"-{self.ignored:.0%}-ignored" if self.ignored else ""
        return f"{'x'.join(map(str, self[:3]))}-{str(self.dtype).removeprefix('torch.')}{ignored}"


def plain(x, w, target):
    return F.cross_entropy(F.linear(x, w), target)


def torch_chunked():
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch 2.13 has it")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, target: F.linear_cross_entropy(x, w, target, options=options)


def liger():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as theirs

    return lambda x, w, target: theirs.apply(x, w, target)[0]


def cce():
    from cut_cross_entropy import linear_cross_entropy as theirs

    return theirs


IMPLS = {"minkernels": linear_cross_entropy, "torch": plain}
COMPILED = {"torch-compile": plain}
CUDA_IMPLS = {"torch-chunked": torch_chunked, "liger": liger, "cut-cross-entropy": cce}
CASES = {
    "cpu": [
        Case(2048, 512, 32000, torch.bfloat16),
        Case(2048, 512, 32000, torch.bfloat16, 0.5),
        Case(1024, 512, 32000, torch.float32),
        Case(128, 256, 8000, torch.float16),  # small, since PyTorch's products of it may be a hundred times as slow
    ],
    "cuda": [
        Case(8192, 4096, 128256, torch.bfloat16),
        Case(1024, 4096, 128256, torch.bfloat16),
        Case(8192, 4096, 32000, torch.bfloat16),
    ],
    "tiny": [Case(9, 8, 33, torch.float32), Case(9, 8, 33, torch.bfloat16, 0.5)],
}


def bench_fwd_bwd(timed, device, case, impl):
    def build():
        x = torch.randn(case.N, case.H, device=device).to(case.dtype).requires_grad_()
        w = (torch.randn(case.V, case.H, device=device) * case.H**-0.5).to(case.dtype).requires_grad_()
        target = torch.randint(case.V, (case.N,), device=device)
        target[: int(case.N * case.ignored)] = -100
        table = IMPLS | {name: compiled(f) for name, f in COMPILED.items()}
        table |= {name: installed(name, load) for name, load in CUDA_IMPLS.items()}

        def step(f):
            loss = f(x, w, target)
            return loss.detach(), *torch.autograd.grad(loss, (x, w))

        @cache
        def exact():
            """The loss over all rows, and the last rows of both gradients, in fp64, a few rows at a time."""
            count, W, total, dw, dx = (target != -100).sum(), w.detach().double(), 0.0, 0.0, None
            for rows, labels in zip(x.detach().double().split(256), target.split(256), strict=True):
                kept = labels != -100
                logits = rows @ W.T
                total += F.cross_entropy(logits, labels, reduction="sum")
                p = logits.softmax(-1)
                p[torch.arange(len(rows), device=device)[kept], labels[kept]] -= 1
                p = p * kept[:, None] / count
                dw, dx = dw + p[:, -JUDGED:].T @ rows, p @ W
            return total / count, dx[-JUDGED:], dw

        def judge(outputs):
            loss, dx, dw = outputs
            return max_error([loss, dx[-len(exact()[1]) :], dw[-JUDGED:]], exact(), case.dtype)

        return {name: partial(step, f) for name, f in table.items()}, judge

    flops = 6 * case.N * case.H * case.V * (1 - case.ignored)
    timed("linear_cross_entropy fwd+bwd", build, flops=flops, tokens=case.N, shape=case[:3], dtype=case.dtype)

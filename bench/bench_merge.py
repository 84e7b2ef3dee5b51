"""merge_attention beside its formula in PyTorch, eager and compiled."""

from functools import cache, partial
from typing import NamedTuple

import torch

from bench.timing import compiled, max_error
from minkernels import merge_attention


class Case(NamedTuple):
    B: int
    H: int
    M: int
    D: int
    dtype: torch.dtype

    def __str__(self):
        return f"{self.B}x{self.H}x{self.M}x{self.D}-{str(self.dtype).removeprefix('torch.')}"

    def bytes(self, outs: int) -> int:
        """So many outs read or written; the lses, float32, are read once or written with them."""
        rows = self.B * self.H * self.M
        return outs * rows * self.D * self.dtype.itemsize + 4 * rows * outs


CASES = {
    "cpu": [Case(1, 8, 2048, 128, dtype) for dtype in (torch.float32, torch.bfloat16)],
    "cuda": [Case(4, 16, 4096, 128, torch.bfloat16), Case(4, 16, 4096, 128, torch.float32)],
    "tiny": [Case(1, 2, 9, 16, torch.float32)],
}


def plain(out1, lse1, out2, lse2):
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = (lse1 - lse).exp()[..., None], (lse2 - lse).exp()[..., None]
    return (w1 * out1 + w2 * out2).to(out1.dtype), lse


IMPLS = {"minkernels": merge_attention, "torch": plain}
COMPILED = {"torch-compile": compiled(plain)}


def run(timed, op, device, case, backward):
    def build():
        outs = [torch.randn(case[:4], device=device).to(case.dtype) for _ in range(3)]
        lses = [torch.randn(case[:3], device=device) for _ in range(2)]
        inputs, dout = [t.requires_grad_(backward) for t in (outs[0], lses[0], outs[1], lses[1])], outs[2]

        def call(f, inputs, dout):
            out, lse = f(*inputs)
            return out.detach(), lse.detach(), *(torch.autograd.grad(out, inputs, dout) if backward else ())

        @cache
        def exact():
            return call(plain, [t.detach().double().requires_grad_(backward) for t in inputs], dout.double())

        calls = {name: partial(call, f, inputs, dout) for name, f in (IMPLS | COMPILED).items()}
        return calls, lambda outputs: max_error(outputs, exact(), case.dtype)

    timed(op, build, shape=case[:4], dtype=case.dtype, bytes=case.bytes(8 if backward else 3))


def bench_merge(timed, device, case, impl):
    run(timed, "merge_attention", device, case, False)


def bench_merge_fwd_bwd(timed, device, case, impl):
    run(timed, "merge_attention fwd+bwd", device, case, True)

"""Attention beside F.scaled_dot_product_attention, and beside each of its CUDA backends by name."""

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import compiled, max_error
from minkernels import attention
from minkernels.attention import reference


class Case(NamedTuple):
    B: int
    H: int
    S: int  # queries and keys
    D: int
    causal: bool
    padded: bool  # on average half of the keys are padding
    dtype: torch.dtype

    @property
    def kind(self):
        return ("causal" if self.causal else "full") + ("-padded" if self.padded else "")

    def __str__(self):
        return f"{self.B}x{self.H}x{self.S}x{self.D}-{self.kind}-{str(self.dtype).removeprefix('torch.')}"

    def lengths(self) -> Tensor:
        """(B,) keys that may be seen."""
        if not self.padded:
            return torch.full((self.B,), self.S)
        return torch.linspace(self.S / 4, self.S * 3 / 4, self.B).long()

    def flops(self) -> float:
        """Of the forward: two products of 2 D operations for every query and key that may see each other."""
        queries = torch.arange(1, self.S + 1)
        seen = sum(int(queries.clamp(max=n).sum()) if self.causal else self.S * int(n) for n in self.lengths())
        return 4 * self.H * self.D * seen


class Inputs(NamedTuple):
    q: Tensor  # (B, H, S, D), like k, v and do
    k: Tensor
    v: Tensor
    do: Tensor
    causal: bool
    key_mask: Tensor | None  # (B, S)
    attn_mask: Tensor | None  # the same for F.sdpa, which takes is_causal or a mask: (B, 1, 1 or S, S)


def make(case: Case, device) -> Inputs:
    q, k, v, do = (torch.randn(case.B, case.H, case.S, case.D, device=device).to(case.dtype) for _ in range(4))
    key_mask = attn_mask = None
    if case.padded:
        key_mask = torch.arange(case.S, device=device) < case.lengths().to(device)[:, None]
        attn_mask = key_mask[:, None, None, :]
        if case.causal:
            attn_mask = attn_mask & torch.ones(case.S, case.S, dtype=torch.bool, device=device).tril()
    return Inputs(q, k, v, do, case.causal, key_mask, attn_mask)


def ours(x: Inputs):
    return attention(x.q, x.k, x.v, causal=x.causal, key_mask=x.key_mask)


def sdpa(x: Inputs):
    return F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=x.attn_mask, is_causal=x.causal and x.attn_mask is None)


def backend(which: SDPBackend, x: Inputs):
    try:
        with sdpa_kernel(which):
            return sdpa(x)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip(f"{which.name} does not take this case")


def plain(x: Inputs):
    if x.q.shape[2] > (4096 if x.q.is_cuda else 1024 if x.q.requires_grad else 2048):
        pytest.skip("plain PyTorch would take most of the suite's time and memory")
    return reference.fwd(x.q, x.k, x.v, x.key_mask, x.causal, x.q.shape[-1] ** -0.5)[0]


IMPLS = {"minkernels": ours, "torch-sdpa": sdpa, "reference": plain}
CUDA_IMPLS = {
    "torch-sdpa-flash": partial(backend, SDPBackend.FLASH_ATTENTION),
    "torch-sdpa-efficient": partial(backend, SDPBackend.EFFICIENT_ATTENTION),
    "torch-sdpa-cudnn": partial(backend, SDPBackend.CUDNN_ATTENTION),
}
COMPILED_SLOWLY = {"torch-compile-reference": plain}


def impls():
    return IMPLS | CUDA_IMPLS | {name: compiled(f) for name, f in COMPILED_SLOWLY.items()}


CPU = [  # B, H, S, D, causal, padded
    (1, 8, 2048, 128, True, False),
    (4, 12, 512, 64, True, False),  # GPT-2 small
    (4, 12, 512, 64, True, True),
    (8, 8, 128, 64, False, False),
    (1, 8, 2048, 128, False, False),
    *((1, 8, S, 128, True, False) for S in (256, 512, 1024)),  # with the first, a curve over lengths
]
TOKENS = 16384
CUDA = [  # FlashAttention's set: B S = TOKENS, H D = 2048; the lengths that say most come first, in case the time runs out
    *((TOKENS // S, 2048 // D, S, D, causal, False)
      for D, causal in ((128, True), (64, True), (128, False), (64, False)) for S in (4096, 16384, 1024, 8192, 2048)),
    (4, 16, 4096, 128, True, True),
    (8, 32, 2048, 64, False, True),
    (1, 8, 2048, 128, True, False),
]  # fmt: skip
CASES = {
    "cpu": [Case(*shape, dtype) for shape in CPU for dtype in (torch.float32, torch.bfloat16)],
    "cuda": [Case(*shape, torch.bfloat16) for shape in CUDA],
    "tiny": [Case(1, 2, 32, 16, True, False, torch.float32), Case(2, 2, 33, 16, True, True, torch.bfloat16)],
}


def bench_fwd(timed, device, case, impl):
    def build():
        x = make(case, device)
        return {name: lambda f=f: (f(x),) for name, f in impls().items()}, judge(x, backward=False)

    timed("attention fwd", build, flops=case.flops(), **about(case))


def bench_fwd_bwd(timed, device, case, impl):
    def build():
        x = make(case, device)
        inputs = [t.requires_grad_() for t in (x.q, x.k, x.v)]

        def step(f):
            o = f(x)
            return o.detach(), *torch.autograd.grad(o, inputs, x.do)

        return {name: partial(step, f) for name, f in impls().items()}, judge(x, backward=True)

    timed("attention fwd+bwd", build, flops=3.5 * case.flops(), **about(case))  # five more products backward


def judge(x: Inputs, backward: bool):
    """Compares the last head of the last batch entry with fp64: the full set would not fit at the longest lengths."""

    @cache
    def exact():
        q, k, v, do = (t[-1:, -1:].detach().double() for t in x[:4])
        mask = None if x.key_mask is None else x.key_mask[-1:]
        inputs = [t.requires_grad_(backward) for t in (q, k, v)]
        o = reference.fwd(*inputs, mask, x.causal, q.shape[-1] ** -0.5)[0]
        return (o.detach(), *torch.autograd.grad(o, inputs, do)) if backward else (o,)

    return lambda outputs: max_error([t[-1:, -1:] for t in outputs], exact(), x.q.dtype)


def about(case: Case):
    """A curve of the plot over lengths keeps the number of tokens, or else B and H."""
    size = f"{TOKENS} tokens" if case.B * case.S == TOKENS else f"B {case.B} H {case.H}"
    series = f"{size}, D {case.D} {case.kind} {str(case.dtype).removeprefix('torch.')}"
    return {"shape": case[:4], "dtype": case.dtype, "length": case.S, "series": series}

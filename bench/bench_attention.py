"""Attention beside F.scaled_dot_product_attention, and beside each of its CUDA backends by name."""

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.timing import compiled, max_error
from minkernels import attention
from minkernels.attention import reference
from minkernels.attention._options import Options


class Case(NamedTuple):
    B: int
    H: int
    S: int  # keys
    D: int
    kind: str  # full, causal, full-padded, causal-padded, window-W (causal, W keys back), decode (one query)
    dtype: torch.dtype

    @property
    def M(self) -> int:
        """Queries."""
        return 1 if self.kind == "decode" else self.S

    @property
    def causal(self) -> bool:
        return self.kind.startswith("causal")

    @property
    def window(self) -> int | None:
        return int(self.kind.removeprefix("window-")) if self.kind.startswith("window") else None

    def __str__(self):
        return f"{self.B}x{self.H}x{self.S}x{self.D}-{self.kind}-{str(self.dtype).removeprefix('torch.')}"

    def lengths(self) -> Tensor:
        """(B,) keys that may be seen; where there is padding, it is half of them on average."""
        if not self.kind.endswith("padded"):
            return torch.full((self.B,), self.S)
        return torch.linspace(self.S / 4, self.S * 3 / 4, self.B).long()

    def flops(self) -> float:
        """Of the forward: two products of 2 D operations for every query and key that may see each other."""
        last = torch.arange(1, self.S + 1) if self.causal or self.window else torch.full((self.M,), self.S)
        first = (last - 1 - self.window).clamp(min=0) if self.window else torch.zeros(())
        return 4 * self.H * self.D * sum(float((last.clamp(max=n) - first).sum()) for n in self.lengths())


class Inputs(NamedTuple):
    q: Tensor  # (B, H, M, D), like do
    k: Tensor  # (B, H, S, D), like v
    v: Tensor
    do: Tensor
    causal: bool
    window: int | None
    key_mask: Tensor | None  # (B, S)
    attn_mask: Tensor | None  # the same for F.sdpa, which takes is_causal or a mask: (B or 1, 1, 1 or S, S)

    def options(self, last: slice = slice(None)) -> Options:
        """As the operators take them."""
        mask = None if self.key_mask is None else self.key_mask[last]
        return Options(key_mask=mask, left=self.window, right=0 if self.causal or self.window else None, scale=self.q.shape[-1] ** -0.5)


def make(case: Case, device) -> Inputs:
    lengths = case.M, case.S, case.S, case.M
    q, k, v, do = (torch.randn(case.B, case.H, n, case.D, device=device).to(case.dtype) for n in lengths)
    key_mask = attn_mask = None
    if case.window:
        attn_mask = torch.ones(case.S, case.S, dtype=torch.bool, device=device).tril().triu(-case.window)[None, None]
    if case.kind.endswith("padded"):
        key_mask = torch.arange(case.S, device=device) < case.lengths().to(device)[:, None]
        attn_mask = key_mask[:, None, None, :]
        if case.causal:
            attn_mask = attn_mask & torch.ones(case.S, case.S, dtype=torch.bool, device=device).tril()
    return Inputs(q, k, v, do, case.causal, case.window, key_mask, attn_mask)


def ours(x: Inputs):
    return attention(x.q, x.k, x.v, causal=x.causal, key_mask=x.key_mask, window=x.window and (x.window, 0))


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
    return reference.fwd(x.q, x.k, x.v, *x.options())[0]


@cache
def block_mask(x: Inputs):
    def seen(b, h, i, j):
        keep = j <= i if x.causal or x.window else j >= 0
        keep = keep & (j >= i - x.window) if x.window else keep
        return keep if x.key_mask is None else keep & x.key_mask[b, j]

    return create_block_mask(seen, x.q.shape[0], None, x.q.shape[2], x.k.shape[2], device=x.q.device)


def flex(compiled_flex, x: Inputs):
    if not x.q.is_cuda:
        pytest.skip("FlexAttention has no backward on a CPU")
    return compiled_flex(x.q, x.k, x.v, block_mask=block_mask(x))


IMPLS = {"minkernels": ours, "torch-sdpa": sdpa, "reference": plain}
CUDA_IMPLS = {
    "torch-sdpa-flash": partial(backend, SDPBackend.FLASH_ATTENTION),
    "torch-sdpa-efficient": partial(backend, SDPBackend.EFFICIENT_ATTENTION),
    "torch-sdpa-cudnn": partial(backend, SDPBackend.CUDNN_ATTENTION),
}
COMPILED_SLOWLY = "torch-flex", "torch-compile-reference"


def impls():
    """Of one case: past some shapes torch would compile no more."""
    slowly = partial(flex, compiled(flex_attention)), compiled(plain)
    return IMPLS | CUDA_IMPLS | dict(zip(COMPILED_SLOWLY, slowly, strict=True))


CPU = [  # B, H, S, D, kind
    (1, 8, 2048, 128, "causal"),
    (4, 12, 512, 64, "causal"),  # GPT-2 small
    (4, 12, 512, 64, "causal-padded"),
    (8, 8, 128, 64, "full"),
    (1, 8, 2048, 128, "full"),
    (1, 8, 4096, 128, "window-256"),
    *((1, 8, S, 128, "causal") for S in (256, 512, 1024)),  # with the first, a curve over lengths
]
TOKENS = 16384
CUDA = [  # FlashAttention's set: B S = TOKENS, H D = 2048; the lengths that say most come first, in case the time runs out
    *((TOKENS // S, 2048 // D, S, D, kind)
      for D, kind in ((128, "causal"), (64, "causal"), (128, "full"), (256, "causal"), (64, "full"))
      for S in (4096, 16384, 1024, 8192, 2048)),
    (4, 16, 4096, 128, "causal-padded"),
    (8, 32, 2048, 64, "full-padded"),
    (4, 16, 4096, 128, "window-1024"),
    (1, 8, 2048, 128, "causal"),
]  # fmt: skip
CASES = {
    "cpu": [Case(*shape, dtype) for shape in CPU for dtype in (torch.float32, torch.bfloat16)],
    "cuda": [Case(*shape, torch.bfloat16) for shape in CUDA],
    "tiny": [Case(1, 2, 32, 16, "causal", torch.float32), Case(2, 2, 33, 16, "causal-padded", torch.bfloat16)],
}


def bench_fwd(timed, device, case, impl):
    def build():
        x = make(case, device)
        return {name: lambda f=f: (f(x),) for name, f in impls().items()}, judge(x, backward=False)

    timed("attention fwd", build, flops=case.flops(), **about(case))


def bench_decode(timed, device, case, impl):
    def build():
        x = make(case, device)
        return {name: lambda f=f: (f(x),) for name, f in impls().items()}, judge(x, backward=False)

    read = 2 * case.B * case.H * case.S * case.D * case.dtype.itemsize  # keys and values
    timed("attention decode", build, bytes=read, **about(case))


bench_decode.cases = {
    "cpu": [Case(1, 8, 4096, 128, "decode", dtype) for dtype in (torch.float32, torch.bfloat16)],
    "cuda": [Case(B, 32, S, 128, "decode", torch.bfloat16) for B, S in ((1, 16384), (16, 4096))],
    "tiny": [Case(1, 2, 600, 16, "decode", torch.float32)],
}


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
        inputs = [t.requires_grad_(backward) for t in (q, k, v)]
        o = reference.fwd(*inputs, *x.options(slice(-1, None)))[0]
        return (o.detach(), *torch.autograd.grad(o, inputs, do)) if backward else (o,)

    return lambda outputs: max_error([t[-1:, -1:] for t in outputs], exact(), x.q.dtype)


def about(case: Case):
    """A curve of the plot over lengths keeps the number of tokens, or else B and H."""
    size = f"{TOKENS} tokens" if case.B * case.S == TOKENS else f"B {case.B} H {case.H}"
    series = f"{size}, D {case.D} {case.kind} {str(case.dtype).removeprefix('torch.')}"
    return {"shape": case[:4], "dtype": case.dtype, "length": case.S, "series": series}

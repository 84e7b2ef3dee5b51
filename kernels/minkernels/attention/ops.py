"""Fused attention: what it promises."""

import math

import torch
from torch import Tensor

from minkernels._library import define, needs_grad, once_differentiable
from minkernels.attention import reference
from minkernels.attention._outputs import like, lse_like

MAX_HEAD_DIM = 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q @ k.T + mask) @ v, without storing the M x N scores.

    Shapes: B batch, H heads, Hkv key heads (H a multiple of it), M queries, N keys, D and Dv head dims (1 to 256).
    Args:
        q: (B, H, M, D) float16, bfloat16, float32, or float64 (CPU only); any strides.
        k: (B, Hkv, N, D), v: (B, Hkv, N, Dv); same dtype and device. Query head h reads key head h // (H // Hkv).
        causal: query i sees keys 0 .. i + N - M: aligned to the bottom right, so that decoding works; where M != N,
            that is unlike the is_causal of F.scaled_dot_product_attention.
        key_mask: (B, N) bool, True where a key may be seen (False is padding), any pattern. NaN or inf in a hidden
            key or value reaches nothing.
        scale: multiplies q @ k.T to give nats; default D ** -0.5.
    Returns: (B, H, M, Dv) in q.dtype, dense in q's dimension order. A query that sees no key gives zeros, and zero gradients.
    Under autocast q, k and v are cast to the autocast dtype, as F.scaled_dot_product_attention does.
    Raises: ValueError for shapes or values that do not fit; TypeError for mixed or unsupported dtypes and devices.
    Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
    """
    _check(q, k, v, causal, key_mask, scale)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    args = q, k, v, key_mask, causal, q.shape[-1] ** -0.5 if scale is None else float(scale)
    return (_Attention.apply(*args) if needs_grad(q, k, v) else _fwd(*args))[0]


def _check(q, k, v, causal, key_mask, scale):
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head dim), got shape {tuple(t.shape)}")
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{name} is {t.dtype} on {t.device}, but q is {q.dtype} on {q.device}: they must agree")
    if q.dtype == torch.float64 and q.device.type != "cpu":
        raise TypeError(f"float64 runs on the CPU only, got q on {q.device}")
    B, H, _, D = q.shape
    Hkv, N = k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k must be (B={B}, heads, length, D={D}) to fit q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must share batch, heads and length with k {tuple(k.shape)}, got {tuple(v.shape)}")
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"q has {H} heads, which is no multiple of the {Hkv} heads of k")
    for name, t in (("q", q), ("v", v)):
        if not 1 <= t.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"the head dim of {name} must be 1 to {MAX_HEAD_DIM}, got {t.shape[3]}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be a bool tensor, got {getattr(key_mask, 'dtype', type(key_mask).__name__)}")
        if key_mask.shape != (B, N):
            raise ValueError(f"key_mask must be (B={B}, N={N}), got {tuple(key_mask.shape)}")
        if key_mask.device != q.device:
            raise TypeError(f"key_mask is on {key_mask.device}, but q is on {q.device}")
    if scale is not None:
        if isinstance(scale, bool | Tensor) or not isinstance(scale, int | float):
            raise TypeError(f"scale must be a number, got {scale!r}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")


def _fwd_flops(q, k, v, *_, **__):  # shapes; a causal mask is not counted, as for F.scaled_dot_product_attention
    B, H, M, D = q
    return 2 * B * H * M * v[2] * (D + v[3])


def _bwd_flops(do, q, k, v, *_, **__):
    B, H, M, D = q
    return 2 * B * H * M * v[2] * (3 * D + 2 * v[3])


_fwd = define(
    "attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, bool causal, float scale) -> (Tensor o, Tensor lse)",
    fake=lambda q, k, v, *_: (like(q, v.shape[-1]), lse_like(q)),
    reference=reference.fwd,
    cpu="minkernels.attention._cpu:fwd",
    cuda="minkernels.attention._triton:fwd",
    flops=_fwd_flops,
)
_bwd = once_differentiable(
    define(
        "attention_bwd",
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? key_mask, bool causal, float scale)"
        " -> (Tensor dq, Tensor dk, Tensor dv)",
        fake=lambda do, q, k, v, *_: tuple(torch.empty_like(t) for t in (q, k, v)),
        reference=reference.bwd,
        cpu="minkernels.attention._cpu:bwd",
        cuda="minkernels.attention._triton:bwd",
        flops=_bwd_flops,
    )
)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, key_mask, causal, scale):
        return _fwd(q, k, v, key_mask, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, key_mask, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, key_mask)  # p is rebuilt from lse, so nothing M x N is kept
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, _dlse):
        if do is None:
            return (None,) * 6
        *saved, key_mask = ctx.saved_tensors
        return *_bwd(do, *saved, key_mask, ctx.causal, ctx.scale), None, None, None

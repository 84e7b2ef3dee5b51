"""What every backend, and the fake, shares: the options as they are lowered, and how outputs are allocated."""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What the operators take after q, k and v, in this order: dense or packed, whatever the public function was."""

    bias: Tensor | None = None  # 4-D, each size 1 or that of (B, H, M, N); any float dtype
    sinks: Tensor | None = None  # (H,) in the dtype of the arithmetic
    key_mask: Tensor | None = None  # (B, N) bool
    kv_lens: Tensor | None = None  # (B,) int32
    mask: Tensor | None = None  # 4-D bool, as bias
    cu_seqlens_q: Tensor | None = None  # (sequences + 1,) int32: q is (1, H, T, D), its sequences laid end to end
    cu_seqlens_k: Tensor | None = None  # both or neither
    seed: Tensor | None = None  # () int64, where dropout_p > 0
    left: int | None = None  # query i sees key j iff i + off - left <= j <= i + off + right; None: unbounded
    right: int | None = None
    top_left: bool = False  # off = 0, instead of keys - queries of the sequence
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    max_seqlen_q: int = 0  # of packed sequences
    max_seqlen_k: int = 0


SCHEMA = (
    "Tensor? bias, Tensor? sinks, Tensor? key_mask, Tensor? kv_lens, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seed, SymInt? left, SymInt? right, bool top_left, float scale, float softcap, float dropout_p, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k"
)


def like(q, Dv):
    """An empty (B, H, M, Dv), dense in q's dimension order: where q was (B, M, H, D), transpose(1, 2).flatten(2) copies nothing."""
    B, H, M, D = q.shape
    if Dv == D:
        return torch.empty_like(q)
    if q.stride(1) < q.stride(2):
        return q.new_empty((B, M, H, Dv)).transpose(1, 2)
    return q.new_empty((B, H, M, Dv))


def lse_like(q):
    """An empty (B, H, M) log-sum-exp: float64 for float32, whose probabilities an fp32 lse could not give back (at lse = 8 it is off
    by four of their roundings), where the device has it."""
    wide = q.dtype.itemsize >= 4 and q.device.type in ("cpu", "cuda")
    return q.new_empty(q.shape[:3], dtype=torch.float64 if wide else torch.float32)


def grads_like(q, k, v, bias, sinks, bias_grad):
    """Empty dq, dk, dv, dbias and dsinks; a gradient that nobody wants has no elements."""
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_grad else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(torch.empty_like(t) for t in (q, k, v)), dbias, dsinks


def merge_like(*tensors):
    """Empty tensors like outs (B, H, M, Dv), dense in their order, and lses (B, H, M), contiguous."""
    return tuple(torch.empty_like(t) if t.dim() == 4 else t.new_empty(t.shape) for t in tensors)


def row_deltas(do, o, dlse, lse, dtype):
    """delta of each query, in dtype: do . o - dlse; 0 of one that sees no key, whatever comes from above."""
    delta = (do.to(dtype) * o).sum(-1)
    return (delta if dlse is None else delta - dlse).masked_fill(lse == float("-inf"), 0.0)


def sinks_grad(delta, lse, sinks):
    """-sum(p_sink * delta): a sink is a key whose value is 0, so only lse knows it."""
    p = (sinks[:, None] - lse).clamp(max=0).exp().masked_fill(lse == float("-inf"), 0.0)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def check_lengths(q, k, x):
    """What only the values of these CPU tensors tell."""
    if x.kv_lens is not None and x.kv_lens.numel():
        low, high = x.kv_lens.aminmax()
        if low < 0 or high > k.shape[2]:
            raise ValueError(f"kv_lens must be 0 to N={k.shape[2]}, got {(low if low < 0 else high).item()}")
    for name, cu, t, longest in (("q", x.cu_seqlens_q, q, x.max_seqlen_q), ("k", x.cu_seqlens_k, k, x.max_seqlen_k)):
        if cu is not None:
            lengths = cu.diff()
            if cu[0] != 0 or cu[-1] != t.shape[2] or (lengths < 0).any():
                raise ValueError(f"cu_seqlens_{name} must rise from 0 to {t.shape[2]}, the length of {name}, got {cu.tolist()}")
            if lengths.numel() and lengths.max() > longest:
                raise ValueError(f"max_seqlen_{name} is {longest}, but cu_seqlens_{name} holds a sequence of {lengths.max().item()}")

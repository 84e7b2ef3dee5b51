"""Attention over two sets of keys from the attention over each: what it promises."""

import torch
from torch import Tensor

from minkernels._checks import check_floats
from minkernels._library import apply, define, needs_grad, once_differentiable, traceable
from minkernels.attention import reference
from minkernels.attention._options import merge_like


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each: for ring attention, shared prefixes, and long caches.

    out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2, with lse = log(exp(lse1) + exp(lse2)), in one kernel, and its gradient in another.

    Args:
        out1, out2: (..., Dv): float16, bfloat16, float32, or float64 (CPU only), also of two dtypes, as where a float32 sum meets
            bfloat16 parts; any strides (a copy is made where more than four dimensions cannot be seen as four). Never changed.
        lse1, lse2: their log-sum-exp in nats, out.shape[:-1], from return_lse=True; any of these dtypes.
    Returns: (out, lse) as if computed in one call: out in out1's dtype and dense in its dimension order, lse float32, or float64 where
        out1 or out2 is. Differentiable in all four. A part that saw no key (lse = -inf) has no share, whatever its out holds;
        where neither saw one, out is 0 and lse -inf. A sink must be in one of them only.
    Raises: ValueError if the shapes do not agree; TypeError for unsupported dtypes and mixed devices. Second derivatives raise.
    Source: Ring Attention with Blockwise Transformers, Liu et al. 2023, arXiv:2310.01889.
    """
    for name, t, shape in (("out1", out1, None), ("lse1", lse1, -1), ("out2", out2, 0), ("lse2", lse2, -1)):
        check_floats(name, t)
        if out1.dim() == 0:
            raise ValueError("out1 must be (..., Dv), got a scalar")
        expected = t.shape if shape is None else out1.shape if shape == 0 else out1.shape[:-1]
        if t.shape != expected:
            raise ValueError(f"{name} must be {tuple(expected)} to fit out1 {tuple(out1.shape)}, got {tuple(t.shape)}")
        if t.device != out1.device:
            raise TypeError(f"{name} is on {t.device}, but out1 is on {out1.device}")
    wide = torch.promote_types(torch.promote_types(out1.dtype, out2.dtype), torch.float32)
    lead = out1.shape[:-1]
    args = traceable(_dims(out1, 4), _dims(lse1.to(wide), 3), _dims(out2, 4), _dims(lse2.to(wide), 3))
    out, lse = apply(_Merge, *args) if needs_grad(*args) else _fwd(*args)
    return (out, lse) if len(lead) == 3 else (out.reshape(out1.shape), lse.reshape(lead))


def _dims(t, n):
    """In n dimensions: the first ones made one, or some put before."""
    return t.flatten(0, t.dim() - n) if t.dim() > n else t[(None,) * (n - t.dim())]


# outs are (B, H, M, Dv), lses (B, H, M) of the arithmetic's dtype.
_fwd = define(
    "merge_attention_fwd",
    "(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) -> (Tensor out, Tensor lse)",
    fake=lambda out1, lse1, *_: merge_like(out1, lse1),
    reference=reference.merge_fwd,
    cpu=None,
    cuda="minkernels.attention._triton_merge:fwd",
)
_bwd = once_differentiable(
    define(
        "merge_attention_bwd",
        "(Tensor dout, Tensor? dlse, Tensor out1, Tensor lse1, Tensor out2, Tensor lse2)"
        " -> (Tensor dout1, Tensor dlse1, Tensor dout2, Tensor dlse2)",
        fake=lambda dout, dlse, *tensors: merge_like(*tensors),
        reference=reference.merge_bwd,
        cpu=None,
        cuda="minkernels.attention._triton_merge:bwd",
    )
)


class _Merge(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 4
        out1, *others = ctx.saved_tensors  # once: a checkpoint gives them no second time
        dout = torch.zeros((), dtype=out1.dtype, device=out1.device).expand(out1.shape) if dout is None else dout
        return _bwd(dout, dlse, out1, *others)

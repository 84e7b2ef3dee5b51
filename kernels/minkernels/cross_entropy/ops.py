"""Fused softmax cross-entropy: what it promises."""

import torch
from torch import Tensor

from minkernels._library import apply, define, needs_grad, once_differentiable
from minkernels.cross_entropy import reference

REDUCTIONS = "none", "mean", "sum"


def cross_entropy(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """-log softmax(input)[target], without storing the log-probabilities.

    Shapes: N rows (tokens), V classes.
    Args:
        input: (N, V) logits in nats: float16, bfloat16, float32, or float64 (CPU only); any strides. Never changed.
        target: (N,) int64 or int32, each 0 to V - 1 or ignore_index.
        ignore_index: rows with this target count for nothing: loss 0, gradient 0 whatever the row holds, out of the mean.
        reduction: "none", "mean" (over the rows that count; NaN if none does, as in PyTorch) or "sum".
    Returns: the loss in nats, (N,) for "none", else a scalar; float32 for 16-bit logits, else the dtype of the input.
    Raises: ValueError for shapes or values that do not fit; TypeError for unsupported dtypes and mixed devices; IndexError
        on the CPU for a target out of range, naming its row and value (on a GPU, a device assert).
    A scalar loss whose gradient is wanted computes the gradient in the same pass over the logits. Where that pass cannot
    know the upstream gradient well enough (float16 under a loss scale) or is not eager, the backward recomputes it.
    Source: Online normalizer calculation for softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    _check(input, target, ignore_index, reduction)
    if not needs_grad(input):
        return _fwd(input, target, ignore_index, reduction, False)[0]
    return apply(_CrossEntropy, input, target, ignore_index, reduction, reduction != "none" and _grad_early(input))[0]


def _check(input, target, ignore_index, reduction):
    for name, t in (("input", input), ("target", target)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if input.dim() != 2:
        raise ValueError(f"input must have 2 dimensions (rows, classes), got shape {tuple(input.shape)}")
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    if input.dtype == torch.float64 and input.device.type != "cpu":
        raise TypeError(f"float64 runs on the CPU only, got input on {input.device}")
    if input.shape[1] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target must be int64 or int32, got {target.dtype}")
    if target.shape != input.shape[:1]:
        raise ValueError(f"target must be (N={input.shape[0]},) to fit input {tuple(input.shape)}, got {tuple(target.shape)}")
    if target.device != input.device:
        raise TypeError(f"target is on {target.device}, but input is on {input.device}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _grad_early(input):
    """Whether the forward may write the gradient for an upstream of 1, to be scaled later: float16 would underflow before a
    GradScaler's factor came; a compiled graph or a functorch transform recomputes, since it cannot hand the same buffer on."""
    if input.dtype == torch.float16 or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def _fwd_fake(input, target, ignore_index, reduction, with_grad):
    stats = input.new_empty((input.shape[0], 2), dtype=torch.promote_types(input.dtype, torch.float32))
    loss = stats.new_empty(input.shape[:1] if reduction == "none" else ())
    return loss, stats, torch.empty_like(input) if with_grad else input.new_empty(0)


_fwd = define(
    "cross_entropy_fwd",
    "(Tensor input, Tensor target, int ignore_index, str reduction, bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad)",
    # stats (N, 2): the maximum of each row, and the sum of exp(x - maximum): their lse in one number could not tell 2**24 from
    # 2**24 + ln 2. grad: for an upstream gradient of 1; empty if it was not asked for.
    fake=_fwd_fake,
    reference=reference.fwd,
    cpu="minkernels.cross_entropy._cpu:fwd",
    cuda="minkernels.cross_entropy._triton:fwd",
)
_bwd = once_differentiable(
    define(
        "cross_entropy_bwd",
        "(Tensor dloss, Tensor input, Tensor target, Tensor stats, int ignore_index, str reduction) -> Tensor",
        fake=lambda dloss, input, *_: torch.empty_like(input),
        reference=reference.bwd,
        cpu="minkernels.cross_entropy._cpu:bwd",
        cuda="minkernels.cross_entropy._triton:bwd",
    )
)
_scale_ = define(
    "scale_",
    "(Tensor(a!) x, Tensor scale) -> ()",
    fake=lambda x, scale: None,
    reference=reference.scale_,
    cpu="minkernels.cross_entropy._cpu:scale_",
    cuda="minkernels.cross_entropy._triton:scale_",
)


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, target, ignore_index, reduction, with_grad):
        return _fwd(input, target, ignore_index, reduction, with_grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, ctx.ignore_index, ctx.reduction, with_grad = inputs
        _, stats, grad = output
        ctx.save_for_backward(input, target, stats)
        ctx.grad = grad if with_grad else None
        ctx.mark_non_differentiable(stats, grad)
        ctx.set_materialize_grads(False)  # else zeros as large as the logits, for the outputs that have no gradient

    @staticmethod
    def backward(ctx, dloss, _dstats, _dgrad):
        if dloss is None:
            return (None,) * 5
        grad, ctx.grad = ctx.grad, None  # handed out once: a later backward recomputes, and changes nothing given before
        if grad is None:
            grad = _bwd(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.reduction)
        else:
            _scale_(grad, dloss)
        return grad, None, None, None, None

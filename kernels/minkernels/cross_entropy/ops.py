"""Fused softmax losses: what they promise."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minkernels._checks import NARROW, REDUCTIONS, check_floats, check_reduction, is_dense, on_one_device
from minkernels._library import apply, define, needs_grad, no_gradient, once_differentiable, traceable
from minkernels.cross_entropy import reference
from minkernels.cross_entropy._arguments import check_empty, check_group, check_target, check_weight, options
from minkernels.cross_entropy._options import (
    SCHEMA,
    Options,
    accumulator,
    check_labels,
    coefficients,
    is_ignored,
    is_labels,
    new_loss,
    new_stats,
    per_row,
    probs_grad,
    saved_stats,
)  # fmt: skip


class TokenLogprobs(NamedTuple):
    logprob: Tensor  # of the target, nats
    entropy: Tensor  # of the distribution, nats
    argmax: Tensor  # the most probable class, int64


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    empty: str = "nan",
    group=None,
) -> Tensor:
    """-log softmax(input)[target], without storing the log-probabilities: F.cross_entropy, and what users add to it.

    Shapes: N rows (tokens), V classes.
    Args:
        input: (N, V), (V,) or (N, V, d1, ...) logits in nats: float16, bfloat16, float32, or float64 (CPU only); any strides. Never
            changed. Two or more dimensions d1, ... that cannot be viewed as one are copied.
        target: labels, int64, int32 or uint8, the shape of input without its classes, each 0 to V - 1 or ignore_index; or
            probabilities, any float dtype, the shape of input, any values, not assumed to sum to 1; they may require a gradient.
        weight: (V,) of any float dtype, a factor for each class; no gradient.
        ignore_index: rows with this label count for nothing: loss 0, gradient 0 whatever the row holds, out of the mean. For labels alone.
        reduction: "none", "mean" or "sum". The mean divides by the weights of the labels that count (NaN if there is none, as in
            PyTorch), or by the number of rows for probabilities.
        label_smoothing: s makes the target (1 - s) target + s / V. 0 to 1.
        z_loss: adds z_loss * lse**2 to each row (times the weight of its label), where lse is the log of the sum of exponentials.
        softcap: c makes the logits c * tanh(logit_scale * input / c).
        logit_scale: a factor of the logits, before softcap: one over the temperature.
        empty: "nan", or "zero": a mean over nothing is 0, and its gradient 0.
        group: a torch.distributed process group over whose ranks the classes are split, in their order: input holds the V classes of
            this rank, at least one, target and weight are those of all, the same on every rank. Labels and eager mode alone.
    Returns: the loss in nats, for "none" in the shape of input without its classes, else a scalar; float32 for 16-bit logits, else
        the dtype of the input. Deterministic.
    Raises: ValueError for shapes or values that do not fit; TypeError for unsupported dtypes and mixed devices; IndexError
        on the CPU for a label out of range, naming its place and value (on a GPU, a device assert).
    A scalar loss whose gradient is wanted computes the gradient in the same pass over the logits. Where that pass cannot
    know the upstream gradient well enough (float16 under a loss scale) or is not eager, the backward recomputes it.
    Source: Online normalizer calculation for softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    numbers = type(z_loss) is type(logit_scale) is float and z_loss == 0.0 and logit_scale == 1.0
    if numbers and softcap is group is None and type(empty) is str and empty == "nan":
        loss = usual_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        if loss is not None:
            return loss
    _check(input, weight, group)
    x = options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_target(target, _classes_out(input), input.shape if group is None else None, x, input)
    check_reduction(reduction)
    check_empty(empty)
    weight = None if weight is None else weight.to(accumulator(input)).contiguous()
    split = None if group is None else parallel().split(_classes(input), target.numel(), weight, input.device, group)
    return _checked_cross_entropy(input, target, weight, x, reduction, empty == "zero", split)


def usual_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing) -> Tensor | None:
    """cross_entropy of 16 or 32-bit logits, with int64 labels or probabilities of their dtype, and a float32 weight, that fit them: in
    half of the time that it takes to look for all that may be wrong with a call; None for every other call."""
    if not (type(input) is type(target) is Tensor and is_dense(input) and is_dense(target)):
        return None
    dim, given, dtype = input.dim(), target.dtype, input.dtype
    if dim < 2 or dtype not in NARROW or input.size(1) == 0 or not on_one_device(input, target) or reduction not in REDUCTIONS:
        return None
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return None
    if type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0:
        return None
    if given == torch.int64:
        if (target.dim() != 1 or target.size(0) != input.size(0)) if dim == 2 else target.shape != _classes_out(input):
            return None
    elif given != dtype or target.shape != input.shape or ignore_index >= 0:
        return None
    if weight is not None:
        if type(weight) is not Tensor or not is_dense(weight) or weight.dtype != torch.float32 or weight.requires_grad:
            return None
        if weight.dim() != 1 or weight.size(0) != input.size(1) or not on_one_device(input, weight) or not weight.is_contiguous():
            return None
    return _checked_cross_entropy(input, target, weight, (ignore_index, label_smoothing, 0.0, 0.0, 1.0), reduction, False)


def _checked_cross_entropy(input, target, weight, x, reduction, empty_zero, split=None):
    rows, flat = (input, target) if input.dim() == 2 else (_rows(input), _rows(target, 0 if is_labels(target) else 1))
    args = flat, weight, x, reduction, empty_zero
    try:
        loss = _loss(rows, *args) if split is None else parallel().Parallel.apply(Shards, *args, split, rows)
    except IndexError:  # of the labels as the kernels see them; the caller's are to be named
        check_labels(target, _classes(input) if split is None else split.total, Options(*x).ignore_index)
        raise
    return loss.reshape(_classes_out(input)) if reduction == "none" and input.dim() != 2 else loss


def _loss(rows, target, weight, x, reduction, empty_zero):
    rows, target = traceable(rows, target)
    if not needs_grad(rows, target):
        return _fwd(rows, target, weight, *x, reduction, empty_zero, False)[0]
    early = reduction != "none" and not target.requires_grad and grad_early(rows)
    return apply(_CrossEntropy, kept_by_graph(rows), target, weight, *x, reduction, empty_zero, early)[0]


def token_logprobs(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
) -> TokenLogprobs | tuple[TokenLogprobs, Tensor]:
    """The log-probability of each target, the entropy of its distribution and the most probable class, in one pass over the logits.

    Args:
        input: (..., V) logits in nats: float16, bfloat16, float32, or float64 (CPU only); any strides.
        target: (...) int64, int32 or uint8, each 0 to V - 1 or ignore_index.
        ignore_index, softcap, logit_scale: as those of cross_entropy.
        return_lse: also the log of the sum of exponentials of the logits as the softmax takes them.
    Returns: (logprob, entropy, argmax), each (...): nats, float32 for 16-bit logits, else the dtype of the input, both
        differentiable; argmax int64, the first of equals. An ignored row has 0, 0 and -1, and gradient 0 whatever it holds.
        With return_lse: that and lse (...), as logprob, differentiable, 0 for an ignored row.
    Raises: as cross_entropy.
    Source: log p[y] = z[y] - lse and H = lse - sum p z, from the running sums of arXiv:1805.02867.
    """
    check_floats("input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input must have at least one class in its last dimension, got shape {tuple(input.shape)}")
    x = options(ignore_index, 0.0, 0.0, softcap, logit_scale)
    check_target(target, input.shape[:-1], None, x, input)
    rows, flat = traceable(input.reshape(-1, input.shape[-1]), target.reshape(-1))
    try:
        results = apply(_TokenLogprobs, rows, flat, *x) if needs_grad(rows) else _token_logprobs(rows, flat, *x)
    except IndexError:
        check_labels(target, input.shape[-1], ignore_index)
        raise
    return in_shape(results, target, return_lse)


def in_shape(results, target, return_lse) -> TokenLogprobs | tuple[TokenLogprobs, Tensor]:
    logprob, entropy, lse, argmax = (t.reshape(target.shape) for t in results[:4])
    return (TokenLogprobs(logprob, entropy, argmax), lse) if return_lse else TokenLogprobs(logprob, entropy, argmax)


def _check(input, weight, group):
    check_floats("input", input)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of classes, got a scalar")
    if _classes(input) == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    check_group(group)
    if weight is not None:
        check_weight(weight, input, _classes(input), group)


def parallel():
    """Imported at the first use: torch.distributed takes its time."""
    from minkernels.cross_entropy import _parallel

    return _parallel


class Shards:
    """What _parallel.py asks of this op."""

    @staticmethod
    def stats(target, weight, x, input):
        return softmax_stats(input, target, weight, *x, True, False)[0]

    @staticmethod
    def grads(k, target, weight, x, wanted, group, input):
        return (softmax_grad(input, target, weight, k, *x),)


def _classes(input):
    return input.shape[min(1, input.dim() - 1)]


def _classes_out(input):
    """The shape of one value a row: (V,) has one row, (N, V, d1, ...) has N d1 ..."""
    return () if input.dim() == 1 else (input.shape[0], *input.shape[2:])


def _rows(t, classes=1):
    """(N, V), or (N, V, D); of labels, classes=0, (N,) or (N, D)."""
    if t.dim() < 1 + classes:
        return t[None]
    return t.flatten(1 + classes) if t.dim() > 2 + classes else t


def grad_early(input):
    """Whether the forward may write the gradient for an upstream of 1, to be scaled later: float16 would underflow before a
    GradScaler's factor came; a compiled graph or a functorch transform recomputes, since it cannot hand the same buffer on; and what
    hooks put away until the backward, as a checkpoint's do, is not to leave something as large behind."""
    if input.dtype == torch.float16 or torch.compiler.is_compiling():
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def kept_by_graph(input):
    """input, for a Function whose eager form needs it no more after its forward: it may be written to then. The backward of a compiled
    graph reads it again, and nobody would notice. Inductor takes the clone away where nothing writes."""
    return input.clone() if torch.compiler.is_compiling() and not torch.compiler.is_exporting() else input


def _fwd_fake(input, target, weight, *options):
    *_, reduction, _, with_grad = options
    return new_loss(input, reduction), saved_stats(input, target), torch.empty_like(input) if with_grad else input.new_empty(0)


def _stats_fake(input, target, weight, *options):
    *_, entropy = options
    rows = per_row(input) if entropy else 0
    return new_stats(input, target.numel(), 6 if entropy else 5), input.new_empty(rows, dtype=torch.int64)


_fwd = define(
    "cross_entropy_fwd",
    # input is (N, V) or (N, V, D), target labels without the V or as input. stats and coefficients: _options.py. grad: for an upstream
    # gradient of 1; empty if it was not asked for.
    f"(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, str reduction, bool empty_zero, bool with_grad)"
    " -> (Tensor loss, Tensor stats, Tensor grad)",
    fake=_fwd_fake,
    reference=reference.fwd,
    cpu=None,
    cuda="minkernels.cross_entropy._triton:fwd",
)
softmax_stats = define(
    "softmax_stats",
    # shard: the classes are a part of all, and a label that names none of them is no error. entropy: its column, and argmax.
    f"(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, bool shard, bool entropy) -> (Tensor stats, Tensor argmax)",
    fake=_stats_fake,
    reference=reference.stats,
    cpu="minkernels.cross_entropy._cpu:stats",
    cuda="minkernels.cross_entropy._triton:stats",
)
softmax_grad = once_differentiable(
    define(
        "softmax_grad",
        f"(Tensor input, Tensor target, Tensor? weight, Tensor coefficients, {SCHEMA}) -> Tensor",
        fake=lambda input, *_: torch.empty_like(input),
        reference=reference.grad,
        cpu="minkernels.cross_entropy._cpu:grad",
        cuda="minkernels.cross_entropy._triton:grad",
    )
)
scale_ = define(
    "scale_",
    "(Tensor(a!) x, Tensor scale) -> ()",
    fake=lambda x, scale: None,
    reference=reference.scale_,
    cpu="minkernels.cross_entropy._cpu:scale_",
    cuda="minkernels.cross_entropy._triton:scale_",
)


@once_differentiable
def _probs_grad(input, target, weight, stats, coefficients, *x):
    return probs_grad(input, target, weight, stats, coefficients, Options(*x))


def take_early(ctx, dloss: Tensor):
    """ctx.early, what the forward has written, to one backward: a later one, and one at the same time, recomputes, and changes nothing
    given before. None where a derivative of the gradient is wanted, which would be taken for 0; where there are many upstream gradients
    at once; if that can be seen, where one is not finite: what is ignored would be 0 * inf, NaN; and in compiled autograd, whose graph
    would take it again."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or dloss.dim():
        return None
    if torch._C._functorch.is_legacy_batchedtensor(dloss):  # of autograd.grad(is_grads_batched=True)
        return None
    if _is_number(dloss) and not math.isfinite(dloss.item()):
        return None
    return vars(ctx).pop("early", None)


def scale(grad: Tensor, dloss: Tensor):
    """grad *= dloss, in place. That dloss is 1 is seen here if it may be: to call an operator takes longer than a small loss."""
    if not (_is_number(dloss) and dloss.item() == 1):
        scale_(grad, dloss)


def _is_number(dloss: Tensor) -> bool:
    """Whether its value may be looked at: it is there, and to look is to wait for nothing."""
    return type(dloss) is Tensor and dloss.is_cpu and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, _, _, _, _, _, with_grad = inputs
        _, stats, grad = output
        ctx.save_for_backward(*tensors, stats)
        ctx.options = inputs[3:-1]
        ctx.early = grad if with_grad else None
        ctx.mark_non_differentiable(stats, grad)
        ctx.set_materialize_grads(False)  # else zeros as large as the logits, for the outputs that have no gradient

    @staticmethod
    def backward(ctx, dloss, _dstats, _dgrad):
        if dloss is None:
            return (None,) * 11
        no_gradient(ctx, weight=2)
        dtarget, grad = None, take_early(ctx, dloss)
        if grad is not None:
            scale(grad, dloss)
        else:
            input, target, weight, stats = ctx.saved_tensors
            *x, reduction, empty_zero = ctx.options
            k = coefficients(dloss, input.shape[1], target, weight, stats, Options(*x), reduction, empty_zero)
            if ctx.needs_input_grad[0]:
                grad = softmax_grad(input, target, weight, k, *x)
            if ctx.needs_input_grad[1]:
                dtarget = _probs_grad(input, target, weight, stats, k, *x)
        return grad, dtarget, *(None,) * 9


def logprobs_of(stats: Tensor, target: Tensor, ignore_index: int):
    """(rows,) log-probability of the label, entropy, and lse."""
    m, d, _, rel, _, E = stats.unbind(-1)
    ignored, log_d = is_ignored(target, ignore_index), d.log()
    return tuple(t.masked_fill(ignored, 0.0) for t in (-rel - log_d, log_d + E / d, m + log_d))


def logprob_coefficients(stats: Tensor, dlogprob: Tensor | None, dentropy: Tensor | None, dlse: Tensor | None) -> Tensor:
    """From the gradients of what logprobs_of returns; None for what nobody used."""
    m, d, *_, E = stats.unbind(-1)
    zero = torch.zeros_like(m)
    H = zero if dlogprob is None else -dlogprob
    Q = zero if dentropy is None else dentropy / d
    P = H if dlse is None else H + dlse
    if dentropy is not None:
        P = P - Q * E
    return torch.stack([m, P / d, Q, H, zero], -1)


def _token_logprobs(input, target, *options):
    stats, argmax = softmax_stats(input, target, None, *options, False, True)
    return *logprobs_of(stats, target, options[0]), argmax, stats


class _TokenLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, target, *options):
        return _token_logprobs(input, target, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, *ctx.options = inputs
        ctx.save_for_backward(input, target, output[4])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dlogprob, dentropy, dlse, _dargmax, _dstats):
        if dlogprob is None and dentropy is None and dlse is None:
            return (None,) * 7
        input, target, stats = ctx.saved_tensors
        k = logprob_coefficients(stats, dlogprob, dentropy, dlse)
        return softmax_grad(input, target, None, k, *ctx.options), *(None,) * 6

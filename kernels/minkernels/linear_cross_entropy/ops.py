"""A linear layer and a softmax loss in one, the logits never whole: what it promises."""

import math

import torch
from torch import Tensor

from minkernels._checks import as_int, check_floats, check_reduction
from minkernels._library import apply, autocast_dtype, define, needs_grad, no_gradient, once_differentiable, traceable
from minkernels.cross_entropy._arguments import check_empty, check_group, check_target, check_weight, options
from minkernels.cross_entropy._options import SCHEMA, Options, accumulator, check_labels, coefficients, is_labels, new_stats
from minkernels.cross_entropy.ops import (
    TokenLogprobs,
    grad_early,
    in_shape,
    logprob_coefficients,
    logprobs_of,
    parallel,
    scale,
    take_early,
)  # fmt: skip
from minkernels.linear_cross_entropy import reference


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    empty: str = "nan",
    memory_budget: int | None = None,
    group=None,
) -> Tensor:
    """cross_entropy(F.linear(input, linear_weight, linear_bias), target), a chunk of rows at a time: the logits never exist whole.

    Shapes: N rows (tokens), H features, V classes.
    Args:
        input: (N, H), (H,) or (..., H): float16, bfloat16, float32, or float64 (CPU only).
        linear_weight: (V, H), or (V, d1, ..., H) for a loss of d1, ... positions a row (input is then (N, H)); same dtype.
        target: labels (...) or (N, d1, ...), or probabilities with V classes in dimension 1, (..., V) where there are no d1, ...
        linear_bias: linear_weight.shape[:-1], same dtype.
        weight, reduction, label_smoothing, z_loss, softcap, logit_scale, empty: as those of cross_entropy.
        ignore_index: as that of cross_entropy; None is -100. On a CPU rows with this label are not multiplied at all.
        memory_budget: bytes for the logits of a chunk, whose gradient is written over them. Default 1 GiB on a GPU, or 2048 rows if
            they take more; 16 MiB on a CPU, or 512 rows.
        group: as that of cross_entropy: linear_weight and linear_bias hold the V classes of this rank, input, target and weight are the
            same on every rank; the gradient of input is summed over them. The backward forms the logits once more.
    Returns: the loss in nats, for "none" one for each row and position, else a scalar; float32 for 16-bit input. The gradient of
        linear_weight is summed over chunks in float32, and neither product is formed for an input or a weight that needs no gradient.
    Under autocast input, linear_weight and linear_bias are cast as F.linear does; the loss is not.
    Raises: as cross_entropy; ValueError also for a memory_budget that does not hold one row of logits.
    Deterministic as far as PyTorch's matrix products are: on a CPU their bits may depend on the number of threads.
    A scalar loss forms all gradients in its forward; "none", float16, compiled graphs and a second backward form the logits once more.
    Source: F.linear_cross_entropy of PyTorch 2.13, of which this has the names and the semantics; its options=, which choose how it goes
        by chunks, are memory_budget here.
    """
    input, linear_weight, linear_bias, weight, memory_budget = _check(input, linear_weight, linear_bias, weight, memory_budget, group)
    x = options(-100 if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    (V, *positions, _), lead = linear_weight.shape, input.shape[:-1]
    check_target(target, (*lead, *positions), (*lead, V, *positions) if group is None else None, x, input, linear_weight)
    check_reduction(reduction)
    check_empty(empty)
    args = traceable(*_flat(input, linear_weight, target, linear_bias))
    args = *args, weight, *x, reduction, empty == "zero", memory_budget
    wanted = [t is not None and t.requires_grad for t in args[:4]]
    split = None if group is None else parallel().split(V, target.numel(), weight, input.device, group)
    try:
        if split is not None:
            shards = _Shards(memory_budget)
            loss = parallel().Parallel.apply(shards, args[2], weight, x, reduction, empty == "zero", split, args[0], args[1], args[3])
        elif needs_grad(*args[:4]):
            early = reduction != "none" and not wanted[2] and grad_early(input)
            loss = apply(_LinearCrossEntropy, *args, *(early and want for want in (wanted[0], wanted[1], wanted[3])))[0]
        else:
            loss = _fwd(*args, False, False, False)[0]
    except IndexError:  # of the labels as the kernels see them; the caller's are to be named
        check_labels(target, V if split is None else split.total, x.ignore_index)
        raise
    return loss.reshape((*lead, *positions)) if reduction == "none" else loss


def linear_token_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    return_lse: bool = False,
) -> TokenLogprobs | tuple[TokenLogprobs, Tensor]:
    """token_logprobs(F.linear(input, linear_weight, linear_bias), target), a chunk of rows at a time: the logits never exist whole.

    Args: input (..., H), linear_weight (V, H), target (...); the others as those of linear_cross_entropy and token_logprobs.
    Returns: (logprob, entropy, argmax), each (...), with return_lse that and lse (...); the backward forms the logits once more.
    Raises: as linear_cross_entropy.
    """
    input, linear_weight, linear_bias, _, memory_budget = _check(input, linear_weight, linear_bias, None, memory_budget, None)
    x = options(ignore_index, 0.0, 0.0, softcap, logit_scale)
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight must be (V, H), got {tuple(linear_weight.shape)}")
    check_target(target, input.shape[:-1], None, x, input, linear_weight)
    args = *traceable(*_flat(input, linear_weight, target, linear_bias)), *x, memory_budget
    try:
        results = apply(_LinearTokenLogprobs, *args) if needs_grad(*args[:4]) else _logprobs(*args)
    except IndexError:
        check_labels(target, len(linear_weight), ignore_index)
        raise
    return in_shape(results, target, return_lse)


def _check(input, linear_weight, linear_bias, weight, memory_budget, group):
    """The tensors, cast as autocast wants them, weight to the dtype of the arithmetic."""
    check_floats("input", input)
    check_floats("linear_weight", linear_weight)
    if linear_weight.dim() < 2 or linear_weight.shape[0] == 0:
        raise ValueError(f"linear_weight must be (V, H) or (V, d1, ..., H) with at least one class, got {tuple(linear_weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != linear_weight.shape[-1]:
        fit = f"(..., H={linear_weight.shape[-1]}) to fit linear_weight {tuple(linear_weight.shape)}"
        raise ValueError(f"input must be {fit}, got {tuple(input.shape)}")
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise ValueError(f"input must be (N, H) for linear_weight {tuple(linear_weight.shape)}, got {tuple(input.shape)}")
    if linear_bias is not None:
        check_floats("linear_bias", linear_bias)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ValueError(f"linear_bias must be {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}")
    check_group(group)
    if weight is not None:
        check_weight(weight, input, linear_weight.shape[0], group)
    low = autocast_dtype(input)
    if low is not None and input.dtype != torch.float64:
        input, linear_weight, linear_bias = (t if t is None else t.to(low) for t in (input, linear_weight, linear_bias))
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and (t.dtype != input.dtype or t.device != input.device):
            raise TypeError(f"{name} is {t.dtype} on {t.device}, but input is {input.dtype} on {input.device}: they must agree")
    budget = 0
    if memory_budget is not None:
        budget = as_int("memory_budget", memory_budget)
        row = linear_weight.shape[:-1].numel() * input.element_size()
        if budget < row:
            raise ValueError(f"memory_budget must hold one row of logits, {row} bytes, got {budget}")
    return input, linear_weight, linear_bias, weight if weight is None else weight.to(accumulator(input)).contiguous(), budget


def _flat(input, linear_weight, target, linear_bias):
    """input (N, H), linear_weight (V, H) or (V, D, H), target (N,) or (N, D) or with V in dimension 1, linear_bias (V,) or (V, D)."""
    after = 1 if is_labels(target) else 2
    if linear_weight.dim() == 2:
        target = target.reshape(-1) if after == 1 else target.reshape(-1, len(linear_weight))
        return input.reshape(math.prod(input.shape[:-1]), input.shape[-1]), linear_weight, target, linear_bias
    return input, linear_weight.flatten(1, -2), target.flatten(after), linear_bias if linear_bias is None else linear_bias.flatten(1)


class _Shards:
    """What cross_entropy/_parallel.py asks of this op."""

    def __init__(self, memory_budget):
        self.memory_budget = memory_budget

    def stats(self, target, weight, x, input, linear_weight, linear_bias):
        return linear_softmax_stats(input, linear_weight, target, linear_bias, weight, *x, True, False, self.memory_budget)[0]

    def grads(self, k, target, weight, x, wanted, group, *leaves):
        input, linear_weight, linear_bias = leaves
        dinput, *grads, _ = linear_softmax_grad(input, linear_weight, target, linear_bias, weight, k, None, *x, self.memory_budget, *wanted)
        if wanted[0]:
            torch.distributed.all_reduce(dinput, group=group)
        return (g if want else None for g, want in zip((dinput, *grads), wanted, strict=True))


def _rows(input, linear_weight):
    return input.shape[0] * math.prod(linear_weight.shape[1:-1])  # numel() of a size is a constant to a graph


def _fwd_fake(input, linear_weight, target, linear_bias, weight, *options):
    *_, reduction, _, _, dinput, dweight, dbias = options
    stats = new_stats(input, _rows(input, linear_weight), 2 if is_labels(target) else 3)
    loss = stats.new_empty((input.shape[0], *linear_weight.shape[1:-1]) if reduction == "none" else ())
    return loss, stats, *_grads_fake(input, linear_weight, linear_bias, dinput, dweight, dbias)


def _grads_fake(input, linear_weight, linear_bias, dinput, dweight, dbias):
    return (
        torch.empty_like(input) if dinput else input.new_empty(0),
        torch.empty_like(linear_weight, memory_format=torch.contiguous_format) if dweight else input.new_empty(0),
        torch.empty_like(linear_bias) if dbias else input.new_empty(0),
    )


def _stats_fake(input, linear_weight, target, linear_bias, weight, *options):
    *_, entropy, _ = options
    rows = _rows(input, linear_weight)
    return new_stats(input, rows, 6 if entropy else 5), input.new_empty(target.shape if entropy else 0, dtype=torch.int64)


def _grad_fake(input, linear_weight, target, linear_bias, weight, coefficients, stats, *options):
    return *_grads_fake(input, linear_weight, linear_bias, *options[-3:]), input.new_empty(0) if stats is None else torch.empty_like(target)


def _products(count):
    """The flop formula of so many matrix products of an operator whose first arguments are input and linear_weight."""
    return lambda input, linear_weight, *args, **_: 2 * count(args) * math.prod(input) * math.prod(linear_weight[:-1])


INPUTS = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
WANTED = "bool dinput, bool dweight, bool dbias"
_fwd = define(
    "linear_cross_entropy_fwd",
    # As cross_entropy_fwd; the gradients that are wanted, for an upstream gradient of 1, else nothing. memory_budget: 0 is the default.
    f"({INPUTS}{SCHEMA}, str reduction, bool empty_zero, int memory_budget, {WANTED})"
    " -> (Tensor loss, Tensor stats, Tensor dinput, Tensor dweight, Tensor dbias)",
    fake=_fwd_fake,
    reference=reference.fwd,
    cpu="minkernels.linear_cross_entropy._cpu:fwd",
    cuda="minkernels.linear_cross_entropy._triton:fwd",
    flops=_products(lambda args: 1 + args[-3] + args[-2]),
)
linear_softmax_stats = define(
    "linear_softmax_stats",
    f"({INPUTS}{SCHEMA}, bool shard, bool entropy, int memory_budget) -> (Tensor stats, Tensor argmax)",
    fake=_stats_fake,
    reference=reference.stats,
    cpu="minkernels.linear_cross_entropy._cpu:stats",
    cuda="minkernels.linear_cross_entropy._triton:stats",
    flops=_products(lambda args: 1),
)
linear_softmax_grad = once_differentiable(
    define(
        "linear_softmax_grad",
        # stats: those of linear_cross_entropy_fwd, where the gradient of a target that is probabilities is wanted.
        f"({INPUTS}Tensor coefficients, Tensor? stats, {SCHEMA}, int memory_budget, {WANTED})"
        " -> (Tensor dinput, Tensor dweight, Tensor dbias, Tensor dtarget)",
        fake=_grad_fake,
        reference=reference.grad,
        cpu="minkernels.linear_cross_entropy._cpu:grad",
        cuda="minkernels.linear_cross_entropy._triton:grad",
        flops=_products(lambda args: 1 + args[-3] + args[-2]),
    )
)


class _LinearCrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, stats, *grads = output
        ctx.save_for_backward(*inputs[:5], stats)
        ctx.options, wanted = inputs[5:-3], inputs[-3:]
        ctx.early = [g if want else None for g, want in zip(grads, wanted, strict=True)] if any(wanted) else None
        ctx.mark_non_differentiable(stats, *grads)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 16
        no_gradient(ctx, weight=4)
        dtarget, early = None, take_early(ctx, dloss)
        if early is not None:
            dinput, dweight, dbias = early
            for grad in early:
                if grad is not None:
                    scale(grad if grad.dim() == 2 else grad.view(len(grad), -1), dloss)
        else:
            *tensors, stats = ctx.saved_tensors
            _, linear_weight, target, _, weight = tensors
            *x, reduction, empty_zero, memory_budget = ctx.options
            k = coefficients(dloss, len(linear_weight), target, weight, stats, Options(*x), reduction, empty_zero)
            wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3, 2)]
            grads = linear_softmax_grad(*tensors, k, stats if wanted[3] else None, *x, memory_budget, *wanted[:3])
            dinput, dweight, dbias, dtarget = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return dinput, dweight, dtarget, dbias, *(None,) * 12


def _logprobs(input, linear_weight, target, linear_bias, *options):
    *x, memory_budget = options
    stats, argmax = linear_softmax_stats(input, linear_weight, target, linear_bias, None, *x, False, True, memory_budget)
    return *logprobs_of(stats, target, x[0]), argmax, stats


class _LinearTokenLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _logprobs(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4], output[4])
        ctx.options = inputs[4:]
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dlogprob, dentropy, dlse, *_):
        if dlogprob is None and dentropy is None and dlse is None:
            return (None,) * 10
        *tensors, stats = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        k = logprob_coefficients(stats, dlogprob, dentropy, dlse)
        dinput, dweight, dbias, _ = linear_softmax_grad(*tensors, None, k, None, *ctx.options, wanted[0], wanted[1], wanted[3])
        return dinput if wanted[0] else None, dweight if wanted[1] else None, None, dbias if wanted[3] else None, *(None,) * 6

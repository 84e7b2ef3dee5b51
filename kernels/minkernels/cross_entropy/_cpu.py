"""How softmax losses are fast on a CPU: csrc/ops/cpu/cross_entropy_kernel.h."""

import torch

from minkernels._memory import empty_like
from minkernels.cross_entropy._options import label_error, new_loss, new_stats, per_row, saved_stats

_fwd = torch.ops.minkernels._cross_entropy_fwd.default
_stats = torch.ops.minkernels._softmax_stats.default
_grad = torch.ops.minkernels._softmax_grad.default
_CODES = {"none": 0, "mean": 1, "sum": 2}  # csrc/ops/cpu/cross_entropy.h


def fwd(input, target, weight, *options, divisor=None, out=None):
    """divisor: what a mean divides by, where these rows are a part of it. out: where the gradient goes, which may be input."""
    *options, reduction, empty_zero, with_grad = options
    loss, stats = new_loss(input, reduction), saved_stats(input, target)
    grad = out if out is not None else empty_like(input) if with_grad else input.new_empty(0)
    divisor = None if divisor is None else float(divisor)
    bad_row = _fwd(input, target, weight, *options, _CODES[reduction], divisor, empty_zero, loss, stats, grad if with_grad else None)
    if bad_row >= 0:
        raise label_error(target, bad_row, input.shape[1])
    return loss, stats, grad


def stats(input, target, weight, *options):
    *options, shard, entropy = options
    rows = per_row(input)
    stats, argmax = new_stats(input, target.numel(), 6 if entropy else 5), input.new_empty(rows if entropy else 0, dtype=torch.int64)
    bad_row = _stats(input, target, weight, *options, shard, stats, argmax if entropy else None)
    if bad_row >= 0:
        raise label_error(target, bad_row, input.shape[1])
    return stats, argmax


def grad(input, target, weight, coefficients, *options, out=None):
    grad = empty_like(input) if out is None else out
    _grad(input, target, weight, coefficients, *options, grad)
    return grad


def scale_(x, scale):
    if scale.item() != 1:
        x.mul_(scale)

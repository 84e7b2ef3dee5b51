"""How softmax losses are fast on a CPU: csrc/ops/cpu/cross_entropy_kernel.h."""

import torch

from minkernels._memory import empty_like
from minkernels.cross_entropy._options import new_loss, new_stats, per_row, saved_stats

fwd = torch.ops.minkernels.cross_entropy_fwd.default  # C++ alone
_part = torch.ops.minkernels._cross_entropy_part.default
_stats = torch.ops.minkernels._softmax_stats.default
_grad = torch.ops.minkernels._softmax_grad.default


def part(input, target, weight, *options, divisor, out):
    """fwd of some rows. divisor: what the mean over all divides by. out: where the gradient goes, which may be input; or None."""
    *options, reduction, empty_zero, _ = options
    loss, stats = new_loss(input, reduction), saved_stats(input, target)
    _part(input, target, weight, *options, reduction, float(divisor), empty_zero, loss, stats, out)
    return loss, stats, out


def stats(input, target, weight, *options):
    *options, shard, entropy = options
    rows = per_row(input)
    stats, argmax = new_stats(input, target.numel(), 6 if entropy else 5), input.new_empty(rows if entropy else 0, dtype=torch.int64)
    _stats(input, target, weight, *options, shard, stats, argmax if entropy else None)
    return stats, argmax


def grad(input, target, weight, coefficients, *options, out=None):
    grad = empty_like(input) if out is None else out
    _grad(input, target, weight, coefficients, *options, grad)
    return grad


def scale_(x, scale):
    if scale.item() != 1:
        x.mul_(scale)

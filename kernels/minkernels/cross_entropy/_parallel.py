"""The losses where the classes are split over the ranks of a process group: each makes the statistics of its own, they are gathered
once, and every rank then knows the loss, and the coefficients of its part of the gradient."""

import torch
import torch.distributed as dist
from torch import Tensor

from minkernels.cross_entropy._options import Options, check_labels, coefficients, is_ignored, row_weights, weighted


def shard(target: Tensor, V: int, x: Options, group) -> tuple[Tensor, Options, int]:
    """Labels as this rank's V classes number them, the options that go with them, and how many classes there are in all."""
    total = V * dist.get_world_size(group)
    label, ignored = target.long(), is_ignored(target, x.ignore_index)
    if target.device.type == "cpu":
        check_labels(target, total, x.ignore_index)
    else:
        torch._assert_async((ignored | ((label >= 0) & (label < total))).all(), f"target out of range for {total} classes")
    nowhere = -total - 1  # no label minus the start of a shard is this
    local = (label - V * dist.get_rank(group)).masked_fill(ignored, nowhere)
    return local, x._replace(ignore_index=nowhere), total


def own(weight: Tensor | None, V: int, group) -> Tensor | None:
    """This rank's part of the class weights."""
    return None if weight is None else weight[V * dist.get_rank(group) :][:V]


def gather(stats: Tensor, target: Tensor, V: int, group) -> Tensor:
    """(rows, 5) of all classes from those of each rank."""
    world = dist.get_world_size(group)
    parts = [torch.empty_like(stats) for _ in range(world)]
    dist.all_gather(parts, stats, group=group)
    m, d, T, rel, U = torch.stack(parts).unbind(-1)  # (world, rows)
    top = m.amax(0)
    above = top - m  # NaN where all logits are -inf, as the loss then is
    owner = (target.reshape(1, -1).long() // V).clamp(0, world - 1)
    factor = torch.where(m == float("-inf"), 0.0, (-above).exp())
    U = (torch.where(T == 0, 0.0, T * above) + U).sum(0)
    return torch.stack([top, (d * factor).sum(0), T.sum(0), (rel + above).gather(0, owner)[0], U], -1)


def reduced(stats: Tensor, total: int, target: Tensor, weight: Tensor | None, x: Options, reduction: str, empty_zero: bool) -> Tensor:
    """The loss from the statistics of all classes: (rows,) or a scalar."""
    m, d, T, rel, U = stats.unbind(-1)
    w, log_d = row_weights(target, weight, x.ignore_index, stats.dtype), d.log()
    loss = (1 - x.label_smoothing) * w * (log_d + rel)
    if x.label_smoothing:
        loss = loss + x.label_smoothing / total * (T * log_d + U)
    if x.z_loss:
        loss = loss + x.z_loss * w * (m + log_d) ** 2
    loss = loss.masked_fill(is_ignored(target.reshape(-1), x.ignore_index), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / weighted(w.sum(), empty_zero) if reduction == "mean" else loss.sum()


class Parallel(torch.autograd.Function):
    """op is Shards of cross_entropy, or what linear_cross_entropy has in its place: how many classes this rank has, their statistics, and
    the gradients of `leaves`."""

    @staticmethod
    def forward(ctx, op, target, weight, x, reduction, empty_zero, group, *leaves):
        ctx.set_materialize_grads(False)
        V = op.classes(*leaves)
        local, local_x, total = shard(target, V, x, group)
        stats = gather(op.stats(local, own(weight, V, group), local_x, *leaves), target, V, group)
        ctx.save_for_backward(target, weight, stats, local, *leaves)
        ctx.rest = op, local_x, x, total, reduction, empty_zero, group
        return reduced(stats, total, target, weight, x, reduction, empty_zero)

    @staticmethod
    def backward(ctx, dloss):
        if dloss is None:
            return (None,) * (7 + len(ctx.saved_tensors) - 4)
        target, weight, stats, local, *leaves = ctx.saved_tensors
        op, local_x, x, total, reduction, empty_zero, group = ctx.rest
        k = coefficients(dloss, total, target, weight, stats, x, reduction, empty_zero)
        grads = op.grads(k, local, own(weight, op.classes(*leaves), group), local_x, ctx.needs_input_grad[7:], group, *leaves)
        return *(None,) * 7, *grads

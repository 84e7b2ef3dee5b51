"""The losses where the classes are split over the ranks of a process group: each makes the statistics of its own, they are gathered
once, and every rank then knows the loss, and the coefficients of its part of the gradient."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minkernels.cross_entropy._options import Options, check_labels, coefficients, is_ignored, names_no_class, row_weights, weighted

NOWHERE = -(2**31)  # no label less the first class of a rank is this


class Split(NamedTuple):
    """The classes of a group: those of this rank begin at `first`. first and total are tensors where to read them would wait for a GPU."""

    group: dist.ProcessGroup
    V: int
    first: int | Tensor
    total: int | Tensor
    ends: Tensor  # (ranks,): where the classes of each end


def split(V: int, rows: int, weight: Tensor | None, device: torch.device, group) -> Split:
    """Raises on every rank if the rows, or weight and the classes, do not agree; on a GPU that is asserted."""
    numbers = torch.full((2,), V, device=device)
    numbers[1] = rows
    parts = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, numbers, group=group)
    classes, all_rows = torch.stack(parts).unbind(1)
    ends = classes.cumsum(0)
    first, total = (ends - classes)[dist.get_rank(group)], ends[-1]
    if device.type == "cpu":
        first, total = first.item(), total.item()
        if (all_rows != rows).any():
            raise ValueError(f"every rank of group must have the same rows, got {', '.join(map(str, all_rows.tolist()))} of them")
        if weight is not None and len(weight) != total:
            raise ValueError(f"weight must be (V={total},), the classes of all ranks, got {tuple(weight.shape)}")
    else:
        torch._assert_async((all_rows == rows).all(), "every rank of group must have the same rows")
        if weight is not None:
            torch._assert_async(total == len(weight), "weight must have the classes of all ranks")
    return Split(group, V, first, total, ends)


def shard(target: Tensor, x: Options, split: Split) -> tuple[Tensor, Options]:
    """Labels as this rank numbers its classes, and the options that go with them."""
    local = (target.long() - split.first).masked_fill(is_ignored(target, x.ignore_index), NOWHERE)
    return local, x._replace(ignore_index=NOWHERE)


def own(weight: Tensor | None, split: Split) -> Tensor | None:
    """This rank's part of the class weights."""
    return None if weight is None else weight[split.first + torch.arange(split.V, device=weight.device)]


def gather(stats: Tensor, target: Tensor, ignore_index: int, split: Split) -> Tensor:
    """(rows, 5) of all classes from those of each rank. Raises on every rank if one has wrong labels: the others would wait for it."""
    wrong = names_no_class(target, split.total, ignore_index).any()
    stats = torch.cat([stats, wrong.to(stats.dtype).expand(1, 5)])
    parts = [torch.empty_like(stats) for _ in split.ends]
    dist.all_gather(parts, stats, group=split.group)
    every = torch.stack(parts)
    every, wrong = every[:, :-1], every[:, -1, 0]
    if stats.device.type != "cpu":
        torch._assert_async(~wrong.any(), "target is out of range for the classes of all ranks")
    elif wrong.any():
        check_labels(target, split.total, ignore_index)
        raise RuntimeError(f"target is out of range on rank {', '.join(map(str, wrong.nonzero().flatten().tolist()))} of group")
    m, d, T, rel, U = every.unbind(-1)  # (world, rows)
    top = m.amax(0)
    above = top - m  # NaN where all logits are -inf, as the loss then is
    none = m == float("-inf")
    owner = torch.bucketize(target.reshape(1, -1).long(), split.ends, right=True).clamp(max=len(parts) - 1)
    factor = torch.where(none, 0.0, (-above).exp())
    U = (torch.where(T == 0, 0.0, T * above) + U).sum(0)
    rel = torch.where(none, torch.inf, rel) + above  # of a shard without a finite logit it is NaN
    return torch.stack([top, (d * factor).sum(0), T.sum(0), rel.gather(0, owner)[0], U], -1)


def reduced(stats: Tensor, total: int | Tensor, target: Tensor, weight: Tensor | None, x: Options, reduction: str, empty_zero: bool):
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
    """op is Shards of cross_entropy, or what linear_cross_entropy has in its place: the statistics of this rank's classes, and the
    gradients of `leaves`."""

    @staticmethod
    def forward(ctx, op, target, weight, x, reduction, empty_zero, split, *leaves):
        ctx.set_materialize_grads(False)
        local, local_x = shard(target, x, split)
        stats = gather(op.stats(local, own(weight, split), local_x, *leaves), target, x.ignore_index, split)
        ctx.save_for_backward(target, weight, stats, local, *leaves)
        ctx.rest = op, local_x, x, reduction, empty_zero, split
        return reduced(stats, split.total, target, weight, x, reduction, empty_zero)

    @staticmethod
    def backward(ctx, dloss):
        if dloss is None:
            return (None,) * (7 + len(ctx.saved_tensors) - 4)
        target, weight, stats, local, *leaves = ctx.saved_tensors
        op, local_x, x, reduction, empty_zero, split = ctx.rest
        k = coefficients(dloss, split.total, target, weight, stats, x, reduction, empty_zero)
        grads = op.grads(k, local, own(weight, split), local_x, ctx.needs_input_grad[7:], split.group, *leaves)
        return *(None,) * 7, *grads

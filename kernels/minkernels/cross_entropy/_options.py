"""What every backend shares: the options as they travel, what the kernels leave of a row, and the coefficients of its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

LABELS = torch.int64, torch.int32, torch.uint8


class Options(NamedTuple):
    """What the operators take after input, target and weight, in this order."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0


SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale"

# Columns of stats, (rows, 2 to 6), for z the logits as the softmax takes them: m = max z; d = sum exp(z - m); T = sum c;
# m - z[label]; U = sum c (m - z); sum exp(z - m) (m - z). c are the class weights, times the target where that is probabilities;
# T and U are kept only where a target or smoothing spreads over the classes. lse = m + log d in one number could not tell 2**24 from
# 2**24 + ln 2. Columns of coefficients, (rows, 5): m, P, Q, H, S of
#     d loss / dz[j] = exp(z[j] - m) (P + Q (m - z[j])) - S c[j] - H [j == label].
# Rows are those of input with its classes moved to the end.


def accumulator(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


def is_labels(target: Tensor) -> bool:
    return target.dtype in LABELS


def per_row(input: Tensor) -> list:
    """The shape of one value a row."""
    return [*input.shape[:1], *input.shape[2:]]


def new_stats(input: Tensor, rows, columns: int) -> Tensor:
    return input.new_empty((rows, columns), dtype=accumulator(input))


def saved_stats(input: Tensor, target: Tensor) -> Tensor:
    """Empty: what the backward of cross_entropy needs."""
    return new_stats(input, target.numel(), 2) if is_labels(target) else new_stats(input, target[:, 0].numel(), 3)


def new_loss(input: Tensor, reduction: str) -> Tensor:
    return input.new_empty(per_row(input) if reduction == "none" else (), dtype=accumulator(input))


def is_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """Which labels are ignore_index: as int64, since PyTorch would wrap it into their dtype, and -100 would be the uint8 label 156."""
    return target.long() == ignore_index


def all_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """(N,) the rows without a label that counts, of (N,) or (N, D)."""
    ignored = is_ignored(target, ignore_index)
    return ignored if target.dim() == 1 else ignored.all(1)


def names_no_class(target: Tensor, V: int | Tensor, ignore_index: int) -> Tensor:
    """Of each label, whether it should and does not."""
    label = target.long()
    return (label != ignore_index) & ((label < 0) | (label >= V))


def check_labels(target: Tensor, V: int, ignore_index: int) -> None:
    """Raises the one error that only the data can show: the first label that names no class."""
    if is_labels(target):
        bad = names_no_class(target, V, ignore_index)
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise IndexError(f"target{at or ''} is {target[tuple(at)].item()}, out of range for {V} classes (0 to {V - 1})")


def weighted(sums: Tensor, empty_zero: bool) -> Tensor:
    """What a mean divides by; where nothing counts, infinity instead of 0 if that is to give 0 and not NaN."""
    return torch.where(sums == 0, torch.inf, sums) if empty_zero else sums


def row_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """(rows,) of labels: 0 where ignored, else 1 or the weight of the class."""
    target = target.reshape(-1)
    counts = ~is_ignored(target, ignore_index)
    if weight is None:
        return counts.to(dtype)
    return weight[target.long().masked_fill(~counts, 0)] * counts


def divisor(target: Tensor, V: int, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean divides by: the weights of the rows that count, or their number."""
    if not is_labels(target):
        return torch.full((), target.numel() // V, dtype=dtype, device=target.device)
    if weight is None:
        return (target.numel() - is_ignored(target, ignore_index).sum()).to(dtype)
    return row_weights(target, weight, ignore_index, dtype).sum()


def coefficients(dloss: Tensor, V: int, target: Tensor, weight: Tensor | None, stats: Tensor, x: Options, reduction: str, empty_zero: bool):
    """Those of cross_entropy over V classes, whose stats are its saved ones: in the order of row_coefficients() in C++, and in as few
    operations as the options allow, since each may be a launch."""
    m, d, zero, s = stats[:, 0], stats[:, 1], torch.zeros_like(stats[:, 0]), x.label_smoothing
    f = dloss / weighted(divisor(target, V, weight, x.ignore_index, stats.dtype), empty_zero) if reduction == "mean" else dloss
    f = f.reshape(-1)
    if is_labels(target):
        plain = weight is None and not s and not x.z_loss
        w = ~is_ignored(target.reshape(-1), x.ignore_index) if plain else row_weights(target, weight, x.ignore_index, stats.dtype)
        total = w * (1 - s) if s else w
        H = f * total
        S = (f * (s / V)).expand_as(m) if s else zero
        if s:
            total = total + s / V * (V if weight is None else weight.sum())
    else:
        w, total, H, S = 1.0, stats[:, 2], zero, f.expand_as(m)
    if x.z_loss:
        total = total + 2 * x.z_loss * w * (m + d.log())
    P = H if total is w else f * total
    return torch.stack([m, P / d, zero, H, S], -1)


def transformed(input: Tensor, x: Options) -> Tensor:
    """z: the logits as the softmax takes them, in the dtype of the arithmetic."""
    z = input.to(accumulator(input))
    if x.softcap:
        return x.softcap * (z * (x.logit_scale / x.softcap)).tanh()
    return z if x.logit_scale == 1 else z * x.logit_scale


def probs_grad(input: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, coefficients: Tensor, x: Options) -> Tensor:
    """The gradient of a target that is probabilities: (1 - label_smoothing) weight (lse - z), in plain PyTorch."""
    shape = [input.shape[0], 1, *input.shape[2:]]
    m, log_d, S = stats[:, 0].reshape(shape), stats[:, 1].log().reshape(shape), coefficients[:, 4].reshape(shape)
    grad = ((m - transformed(input, x)) + log_d) * (S * (1 - x.label_smoothing))
    if weight is not None:
        grad = grad * weight.reshape([-1] + [1] * (input.dim() - 2))
    return grad.to(target.dtype)  # not copied into a tensor like target, which vmap may not have widened

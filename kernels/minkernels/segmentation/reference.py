"""What the segmentation losses mean, in plain PyTorch: any device, any float dtype, fp64 in and fp64 out, so that it can judge."""

import torch
import torch.nn.functional as F

from minkernels.segmentation._targets import check_targets


def sigmoid_loss_fwd(input, target, weight, pos_weight, mask, alpha, gamma, reduction, with_grad):
    if input.device.type == "cpu":
        check_targets(input, target, mask)
    loss, grad = _pointwise(input, target, weight, pos_weight, mask, alpha, gamma)
    count = input.numel() if mask is None else mask.sum()
    scale = loss.new_ones(())
    if reduction == "mean":
        scale = torch.as_tensor(count, dtype=loss.dtype, device=loss.device).reciprocal().nan_to_num(posinf=0.0)
    if reduction == "none":
        loss = torch.empty_like(input, dtype=loss.dtype).copy_(loss)
    else:
        loss = loss.sum() / (count if reduction == "mean" else 1)  # nothing counts: 0 / 0, NaN as in PyTorch
    return loss, scale, torch.empty_like(input).copy_(grad * scale) if with_grad else input.new_empty(0)


def sigmoid_loss_bwd(dloss, input, target, weight, pos_weight, mask, scale, alpha, gamma):
    grad = _pointwise(input, target, weight, pos_weight, mask, alpha, gamma)[1] * (dloss * scale)
    return torch.empty_like(input).copy_(_keep(grad, mask))


def bce_dice_fwd(input, target, pos_weight, mask, bce_weight, dice_weight, smooth, squared, per_image, reduction):
    if input.device.type == "cpu":
        check_targets(input, target, mask)
    x, t, bce, _, p = _dice_terms(input, target, pos_weight, mask)
    over = tuple(range(2, x.dim())) if per_image else (0, *range(2, x.dim()))
    sizes = p * p + t * t if squared else p + t

    def entries(t):  # sum() over no dimensions would be over all
        return t.sum(over) if over else t

    bces, both, sizes = entries(bce), entries(p * t), entries(sizes)
    count = entries(torch.ones_like(x) if mask is None else mask.to(x.dtype))
    above, below, present = 2 * both + smooth, sizes + smooth, count > 0
    dice = 1 - above / below
    if reduction == "mean":
        total, per_dice = count.sum().expand(count.shape), present.sum().to(x.dtype)
        loss = bce_weight * (bces.sum() / count.sum()) + dice_weight * (_keep(dice, present).sum() / per_dice)
    else:
        total, per_dice = count, 1
        loss = _keep(bce_weight * (bces / count) + dice_weight * dice, present)
        loss = loss.sum() if reduction == "sum" else loss
    factors = torch.stack([
        bce_weight / total,
        -2 * dice_weight / per_dice / below,
        dice_weight / per_dice * above / below / below * (2 if squared else 1),
    ], -1)  # fmt: skip
    return loss, _keep(factors, present[..., None])


def bce_dice_bwd(input, target, pos_weight, mask, factors, squared):
    x, t, _, dbce, p = _dice_terms(input, target, pos_weight, mask)
    of_bce, of_target, of_p = (_per_channel(f, x) for f in factors.to(x.dtype).unbind(-1))
    grad = dbce * of_bce + p * (-x).sigmoid() * (t * of_target + (p * of_p if squared else of_p))
    return torch.empty_like(input).copy_(_keep(grad, mask))


def _dice_terms(input, target, pos_weight, mask):
    """Logits and targets of at least fp32, BCE and its derivative, and the probabilities; all zero where the mask is False."""
    if target.dim() < input.dim():
        target = target[:, None] == torch.arange(input.shape[1], device=input.device).view(-1, *[1] * (input.dim() - 2))
    weights = None if pos_weight is None else _per_channel(pos_weight, input)
    bce, dbce = _pointwise(input, target, None, weights, mask, -1.0, 0.0)
    x, t = (_keep(v.to(bce.dtype), mask) for v in (input, target))
    return x, t, bce, dbce, _keep(x.sigmoid(), mask)


def _pointwise(input, target, weight, pos_weight, mask, alpha, gamma):
    """The loss of each element and its derivative by x; fp32, or fp64 for fp64 inputs."""
    x, t = (_keep(v.to(torch.promote_types(input.dtype, torch.float32)), mask) for v in (input, target))
    positive = t if pos_weight is None else t * pos_weight.to(x.dtype)
    p, q = x.sigmoid(), (-x).sigmoid()
    loss = -positive * F.logsigmoid(x) - (1 - t) * F.logsigmoid(-x)
    grad = (1 - t) * p - positive * q
    if gamma > 0:
        miss = p * (1 - t) + q * t  # 1 - p_t, where p_t itself would round to 1
        slope = gamma * (p * q * (1 - 2 * t) / miss).masked_fill(miss == 0, 0.0)
        grad = miss**gamma * (slope * loss + grad)
        loss = miss**gamma * loss
    factor = torch.ones_like(x) if weight is None else weight.to(x.dtype)
    if alpha >= 0:
        factor = factor * (alpha * t + (1 - alpha) * (1 - t))
    return _keep(loss * factor, mask), _keep(grad * factor, mask)


def _keep(t, mask):
    return t if mask is None else t.masked_fill(~mask, 0.0)


def _per_channel(t, x):
    """(C,) or (N, C) beside (N, C, *spatial)."""
    return t.reshape(*t.shape, *[1] * (x.dim() - 2))

"""What cross_entropy means, in plain PyTorch: any device, any float dtype, fp64 in and fp64 out, so that it can judge."""

import torch

from minkernels.cross_entropy._labels import label_error


def fwd(input, target, ignore_index, reduction, with_grad):
    x, target, valid = _inputs(input, target, ignore_index)
    logp = x.log_softmax(-1)
    loss = (-logp.gather(-1, target[:, None])[:, 0]).masked_fill(~valid, 0.0)
    if reduction == "mean":
        loss = loss.sum() / valid.sum()  # every target ignored: 0 / 0, NaN as in PyTorch
    elif reduction == "sum":
        loss = loss.sum()
    top = x.amax(-1)
    stats = torch.stack([top, (x - top[:, None]).exp().sum(-1)], -1)  # an ignored row is all zeros here, and means nothing
    grad = _grad(loss.new_ones(()), target, valid, logp, reduction, input) if with_grad else input.new_empty(0)
    return loss, stats, grad


def bwd(dloss, input, target, stats, ignore_index, reduction):
    x, target, valid = _inputs(input, target, ignore_index)
    logp = (x - stats[:, :1]) - stats[:, 1:].log()
    return _grad(dloss, target, valid, logp, reduction, input)


def scale_(x, scale):
    x.mul_(scale)


def _inputs(input, target, ignore_index):
    """Logits of at least fp32 with the ignored rows zeroed (they may hold NaN), labels safe to gather, and which rows count."""
    V, valid, target = input.shape[1], target != ignore_index, target.long()
    if input.device.type == "cpu" and (bad := valid & ((target < 0) | (target >= V))).any():
        raise label_error(target, int(bad.nonzero()[0]), V)
    x = input.to(torch.promote_types(input.dtype, torch.float32)).masked_fill(~valid[:, None], 0.0)
    return x, target.masked_fill(~valid, 0), valid


def _grad(dloss, target, valid, logp, reduction, input):
    p = logp.exp()
    p.scatter_add_(1, target[:, None], p.new_full((len(target), 1), -1.0))
    scale = dloss / valid.sum() if reduction == "mean" else dloss
    return torch.empty_like(input).copy_((p * scale.expand(valid.shape)[:, None]).masked_fill(~valid[:, None], 0.0))

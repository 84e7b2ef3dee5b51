"""What the softmax losses mean, in plain PyTorch: any device, any float dtype, fp64 in and fp64 out, so that it can judge."""

import torch

from minkernels.cross_entropy._options import Options, check_labels, coefficients, is_labels, per_row, row_weights, transformed, weighted


def fwd(input, target, weight, *options):
    *options, reduction, empty_zero, with_grad = options
    x = Options(*options)
    z, label, valid = _rows(input, target, x, shard=False)
    logp, V = z.log_softmax(-1), input.shape[1]
    c = torch.ones_like(z) if weight is None else weight.to(z.dtype).expand_as(z)
    if is_labels(target):
        w = row_weights(target, weight, x.ignore_index, z.dtype)
        loss = -(1 - x.label_smoothing) * w * logp.gather(-1, label[:, None])[:, 0]
        if x.label_smoothing:
            loss = loss - x.label_smoothing / V * (c * logp).sum(-1)
    else:
        c = c * (_flat(target).to(z.dtype) * (1 - x.label_smoothing) + x.label_smoothing / V)
        w, loss = torch.ones_like(z[:, 0]), -(c * logp).sum(-1)
    if x.z_loss:
        loss = loss + x.z_loss * w * z.logsumexp(-1) ** 2
    loss = loss.masked_fill(~valid, 0.0)
    top = z.amax(-1)
    stats = torch.stack([top, (z - top[:, None]).exp().sum(-1)] + [c.sum(-1)] * (not is_labels(target)), -1)
    if reduction == "mean":
        loss = loss.sum() / weighted(w.sum(), empty_zero)  # nothing counts: 0 / 0, NaN as in PyTorch
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.reshape(per_row(input))
    if not with_grad:
        return loss, stats, input.new_empty(0)
    k = coefficients(torch.ones_like(loss), input.shape[1], target, weight, stats, x, reduction, empty_zero)
    return loss, stats, grad(input, target, weight, k, *options)


def stats(input, target, weight, *options):
    *options, shard, entropy = options
    x = Options(*options)
    z, label, valid = _rows(input, target, x, shard)
    top = z.amax(-1, keepdim=True)
    below, zero = top - z, torch.zeros_like(z[:, 0])
    e = (-below).exp()
    T, U = zero, zero
    if x.label_smoothing:
        c = torch.ones_like(z) if weight is None else weight.to(z.dtype).expand_as(z)
        T, U = c.sum(-1), (c * below).sum(-1)
    here = torch.ones_like(valid) if not shard else _inside(target.reshape(-1).long(), input.shape[1])
    columns = [top[:, 0], e.sum(-1), T, below.gather(-1, label[:, None])[:, 0].masked_fill(~here, 0.0), U]
    if entropy:
        columns.append(torch.where(e > 0, e * below, 0.0).sum(-1))
    argmax = z.argmax(-1).masked_fill(~valid, -1).reshape(per_row(input)) if entropy else input.new_empty(0, dtype=torch.int64)
    return torch.stack(columns, -1).masked_fill(~valid[:, None], 0.0), argmax


def grad(input, target, weight, coefficients, *options):
    x = Options(*options)
    z, label, valid = _rows(input, target, x, shard=True)
    m, P, Q, H, S = (k.to(z.dtype)[:, None] for k in coefficients.unbind(-1))
    e, V = (z - m).exp(), input.shape[1]
    c = torch.ones_like(z) if weight is None else weight.to(z.dtype).expand_as(z)
    if not is_labels(target):
        c = c * (_flat(target).to(z.dtype) * (1 - x.label_smoothing) + x.label_smoothing / V)
    g = e * P + torch.where((e > 0) & (Q != 0), e * Q * (m - z), 0.0) - torch.where(S != 0, S * c, 0.0)
    if is_labels(target):
        g.scatter_add_(1, label[:, None], (-H[:, 0] * _inside(target.reshape(-1).long(), V))[:, None])
    g = g * (x.logit_scale * (1 - (z / x.softcap) ** 2 if x.softcap else 1))
    g = g.masked_fill(~valid[:, None], 0.0)
    rows = [*per_row(input), V]
    return torch.empty_like(input).copy_(g.reshape(rows).movedim(-1, 1))


def scale_(x, scale):
    x.mul_(scale)


def _flat(t):
    """(N, V, ...) as (rows, V)."""
    return t.movedim(1, -1).reshape(-1, t.shape[1]) if t.numel() else t.reshape(0, t.shape[1])


def _inside(label, V):
    return (label >= 0) & (label < V)


def _rows(input, target, x, shard):
    """z with the ignored rows zeroed (they may hold NaN), labels safe to gather, and which rows count."""
    z, V = _flat(input), input.shape[1]
    if not is_labels(target):
        valid = torch.ones(len(z), dtype=torch.bool, device=z.device)
        return transformed(z, x), None, valid
    label = target.reshape(-1).long()
    valid, inside = label != x.ignore_index, _inside(label, V)
    if not shard and input.device.type == "cpu":
        check_labels(target, V, x.ignore_index)
    return transformed(z.masked_fill(~valid[:, None], 0.0), x), label.masked_fill(~(valid & inside), 0), valid

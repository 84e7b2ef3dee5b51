"""What the IoU family means, in plain PyTorch: any device, any float dtype, fp64 in and fp64 out, so that it can judge."""

import math

import torch

from minkernels.boxes._outputs import grads


def pairs_fwd(boxes1, boxes2, kind, fmt, eps):
    return _value(*_both_sets(boxes1, boxes2, fmt), kind, eps, aligned=False)


def pairs_bwd(dout, boxes1, boxes2, kind, fmt, eps, need1, need2):
    da, db = _derivative(*_both_sets(boxes1, boxes2, fmt), kind, eps, aligned=False)
    d1, d2 = grads(boxes1, boxes2, need1, need2)
    if need1:
        d1.copy_(_to_format([_times(d, dout).sum(-1) for d in da], fmt))
    if need2:
        d2.copy_(_to_format([_times(d, dout).sum(-2) for d in db], fmt))
    return d1, d2


def match(boxes, gts, fmt):
    iou = pairs_fwd(boxes, gts, "iou", fmt, 0.0)
    iou = iou.masked_fill(iou.isnan(), -math.inf)
    return *_best(iou), *_best(iou.mT)


def loss_fwd(input, target, kind, fmt, eps, reduction):
    loss = 1 - _value(_corners(input, fmt), _corners(target, fmt), kind, eps, aligned=True)
    if reduction == "none":
        return loss
    return loss.sum() / (max(loss.numel(), 1) if reduction == "mean" else 1)


def loss_bwd(dloss, input, target, kind, fmt, eps, need_input, need_target):
    da, db = _derivative(_corners(input, fmt), _corners(target, fmt), kind, eps, aligned=True)
    d1, d2 = grads(input, target, need_input, need_target)
    if need_input:
        d1.copy_(_to_format([_times(d, -dloss) for d in da], fmt))
    if need_target:
        d2.copy_(_to_format([_times(d, -dloss) for d in db], fmt))
    return d1, d2


def _corners(boxes, fmt):
    """x1, y1, x2, y2 of at least fp32."""
    a, b, c, d = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).unbind(-1)
    if fmt == "xywh":
        return a, b, a + c, b + d
    if fmt == "cxcywh":
        return a - 0.5 * c, b - 0.5 * d, a + 0.5 * c, b + 0.5 * d
    return a, b, c, d


def _to_format(d, fmt):
    """The gradient by what the format holds, from that by the corners."""
    x1, y1, x2, y2 = d
    if fmt == "xywh":
        d = x1 + x2, y1 + y2, x2, y2
    elif fmt == "cxcywh":
        d = x1 + x2, y1 + y2, 0.5 * (x2 - x1), 0.5 * (y2 - y1)
    return torch.stack(list(d), -1)


def _both_sets(boxes1, boxes2, fmt):
    """Corners whose products broadcast to (..., N, M)."""
    return [c[..., :, None] for c in _corners(boxes1, fmt)], [c[..., None, :] for c in _corners(boxes2, fmt)]


def _ratio(x, y):
    """x / y, and 0 / 0 = 0."""
    return torch.where((x == 0) & (y == 0), 0.0, x / y)


def _inverse(x):
    return torch.where(x == 0, 0.0, 1 / x)


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _angle(box):
    return _ratio(box[2] - box[0], box[3] - box[1]).atan()


def _overlap(a, b):
    """Width and height before they are clamped, intersection, union."""
    w = torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])
    h = torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])
    inter = w.clamp(min=0) * h.clamp(min=0)
    return w, h, inter, _area(a) + _area(b) - inter


def _hull(a, b):
    return torch.maximum(a[2], b[2]) - torch.minimum(a[0], b[0]), torch.maximum(a[3], b[3]) - torch.minimum(a[1], b[1])


def _distance(a, b):
    """Between the centres, along x and y."""
    return (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2, (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2


def _value(a, b, kind, eps, aligned):
    """torchvision's formulas: a loss (aligned) adds eps to every denominator, a pairwise function clamps the hull."""
    more = eps if aligned else 0.0
    _, _, inter, union = _overlap(a, b)
    iou = _ratio(inter, union + more)
    if kind == "iou":
        return iou
    w, h = _hull(a, b) if aligned else (side.clamp(min=0) for side in _hull(a, b))
    if kind == "giou":
        return iou - _ratio(w * h - union, w * h + more)
    ex, ey = _distance(a, b)
    diou = iou - _ratio(ex * ex + ey * ey, w * w + h * h + eps)
    if kind == "diou":
        return diou
    v = 4 / math.pi**2 * (_angle(a) - _angle(b)) ** 2
    return diou - _ratio(v, 1 - iou + v + eps).detach() * v


def _derivative(a, b, kind, eps, aligned):
    """The derivatives of _value by the corners of a and of b."""
    more = eps if aligned else 0.0
    w, h, inter, union = _overlap(a, b)
    inverse = _inverse(union + more)
    iou = inter * inverse
    by_inter, by_area = (1 + iou) * inverse, -iou * inverse
    by_hull_w = by_hull_h = torch.zeros_like(iou)
    hull_w, hull_h = _hull(a, b)
    open_w, open_h = (1.0, 1.0) if aligned else (hull_w >= 0, hull_h >= 0)
    if not aligned:
        hull_w, hull_h = hull_w.clamp(min=0), hull_h.clamp(min=0)
    if kind == "giou":
        inverse = _inverse(hull_w * hull_h + more)
        by_inter, by_area = by_inter - inverse, by_area + inverse
        by_hull = -(union + more) * inverse * inverse
        by_hull_w, by_hull_h = by_hull * hull_h, by_hull * hull_w
    away_x = away_y = turn = torch.zeros_like(iou)
    if kind in ("diou", "ciou"):
        ex, ey = _distance(a, b)
        inverse = _inverse(hull_w * hull_w + hull_h * hull_h + eps)
        spread = 2 * (ex * ex + ey * ey) * inverse * inverse
        by_hull_w, by_hull_h = spread * hull_w, spread * hull_h
        away_x, away_y = ex * inverse, ey * inverse
    if kind == "ciou":
        angle = _angle(a) - _angle(b)
        v = 4 / math.pi**2 * angle**2
        turn = -8 / math.pi**2 * _ratio(v, 1 - iou + v + eps) * angle
    # An edge has all, half or none of the gradient of a maximum or minimum.
    gate_w, gate_h = (w > 0, h > 0) if aligned else (w >= 0, h >= 0)
    by_w, by_h = by_inter * gate_w * h.clamp(min=0), by_inter * gate_h * w.clamp(min=0)
    by_hull_w, by_hull_h = by_hull_w * open_w, by_hull_h * open_h
    left, top = _share(a[0] > b[0], a[0] == b[0]), _share(a[1] > b[1], a[1] == b[1])
    right, bottom = _share(a[2] < b[2], a[2] == b[2]), _share(a[3] < b[3], a[3] == b[3])

    def one_side(box, left, top, right, bottom, sign):
        width, height = box[2] - box[0], box[3] - box[1]
        inverse = _inverse(width * width + height * height)
        of_w, of_h = by_area * height + sign * turn * height * inverse, by_area * width - sign * turn * width * inverse
        return (
            -left * by_w - (1 - left) * by_hull_w - of_w - sign * away_x,
            -top * by_h - (1 - top) * by_hull_h - of_h - sign * away_y,
            right * by_w + (1 - right) * by_hull_w + of_w - sign * away_x,
            bottom * by_h + (1 - bottom) * by_hull_h + of_h - sign * away_y,
        )

    return one_side(a, left, top, right, bottom, 1), one_side(b, 1 - left, 1 - top, 1 - right, 1 - bottom, -1)


def _share(first, equal):
    return torch.where(first, 1.0, torch.where(equal, 0.5, 0.0))


def _times(d, upstream):
    return torch.where(upstream == 0, 0.0, d * upstream)


def _best(iou):
    """The largest value of each row and where it is first."""
    if not iou.shape[-1]:
        return iou.new_zeros(iou.shape[:-1]), iou.new_full(iou.shape[:-1], -1, dtype=torch.int64)
    at = iou.argmax(-1)
    best = iou.gather(-1, at[..., None])[..., 0]
    return best.masked_fill(best == -math.inf, 0.0), at.masked_fill(best == -math.inf, -1)

"""What the family means, in plain PyTorch: each operation rounds once, so that every road gives the same boxes."""

import torch

from minkernels.nms import reference as nms
from minkernels.yolo._options import Options, arithmetic, class_error, loss_factor, outputs

INF = float("inf")


def detect(pred, *options):
    x = Options(*options)
    boxes, raw = decode(pred, x)
    raw = torch.where(raw > x.least(raw.dtype), raw, -INF)  # NaN too
    if not x.multi_label:
        raw, classes = raw.max(2, keepdim=True)  # the first of equal ones
    P, C = raw.shape[1:]
    some = min(x.max_candidates, P * C)
    raw, candidate = raw.flatten(1).sort(dim=1, descending=True, stable=True)
    raw, candidate = raw[:, :some], candidate[:, :some]
    classes = candidate % C if x.multi_label else classes[..., 0].gather(1, candidate)
    boxes = boxes.gather(1, (candidate // C)[..., None].expand(-1, -1, 4))

    scores = torch.where(raw > -INF, raw, float("nan"))  # which takes no part
    ids = None if x.class_agnostic else classes
    indices, counts, _ = nms.nms_padded(boxes, scores, ids, x.iou_threshold, None, x.max_output, False)
    found, i = indices >= 0, indices.clamp(min=0)
    out = outputs(pred, x.max_output)
    if some == 0:
        i = i[:, :0]
    out[0].zero_(), out[1].zero_(), out[2].fill_(-1), out[3].copy_(counts)
    n = i.shape[1]
    found, scores = found[:, :n], scores.gather(1, i)
    out[0][:, :n] = torch.where(found[..., None], boxes.gather(1, i[..., None].expand(-1, -1, 4)), 0.0)
    out[1][:, :n] = torch.where(found, scores.double().sigmoid().to(scores.dtype) if x.logits else scores, 0.0)
    out[2][:, :n] = torch.where(found, classes.gather(1, i), -1)
    return out


def decode(pred, x):
    """(B, P, 4) corners in pixels, and (B, P, C) raw scores: logits of head "v8", else probabilities."""
    pred = pred.to(arithmetic(pred))
    if x.head.startswith("v8"):
        cx, cy, w, h = pred[:, :4].unbind(1)
        raw = pred[:, 4:].mT
    else:
        B, S, boxes, C = len(pred), x.grid(pred), x.boxes_per_cell, x.num_classes
        cells = S * S
        if x.head == "v1":
            cell = pred.flatten(1, 2)
            box, probs = cell[..., : 5 * boxes].unflatten(2, (boxes, 5)), cell[..., 5 * boxes :]
            confidence = box[..., 4]
        else:
            probs, confidence, box = pred.split((cells * C, cells * boxes, cells * boxes * 4), 1)
            probs, confidence, box = (
                t.reshape(B, cells, *shape) for t, shape in ((probs, (C,)), (confidence, (boxes,)), (box, (boxes, 4)))
            )
        raw = (confidence[..., None] * probs[:, :, None]).flatten(1, 2)
        number = torch.arange(cells, device=pred.device)[:, None]
        px, py, w, h = box[..., :4].unbind(-1)
        cx, cy = (px + number % S) / S * x.width, (py + number // S) / S * x.height
        if x.sqrt_wh:
            w, h = w * w, h * h
        w, h = w * x.width, h * x.height
        cx, cy, w, h = (t.flatten(1) for t in (cx, cy, w, h))
    return torch.stack([cx - w * 0.5, cy - h * 0.5, cx + w * 0.5, cy + h * 0.5], -1), raw


def loss_fwd(pred, boxes, classes, boxes_per_cell, coord, noobj, reduction):
    bad = (classes < -1) | (classes >= pred.shape[3] - 5 * boxes_per_cell)
    if bad.any():
        raise class_error(classes, int(bad.flatten().nonzero()[0]), pred.shape[3] - 5 * boxes_per_cell)
    errors, weights, _ = _errors(pred, boxes, classes, boxes_per_cell, coord, noobj)
    loss = (weights * errors * errors).flatten(1).sum(1)
    return loss if reduction == "none" else loss.sum() * loss_factor(pred, reduction)


def loss_bwd(dloss, pred, boxes, classes, boxes_per_cell, coord, noobj, reduction):
    errors, weights, counts = _errors(pred, boxes, classes, boxes_per_cell, coord, noobj)
    upstream = (dloss * loss_factor(pred, reduction)).view(-1, 1, 1, 1)
    return torch.empty_like(pred).copy_(torch.where(counts, 2 * weights * upstream * errors, 0.0))


def _errors(pred, boxes, classes, boxes_per_cell, coord, noobj):
    """Of every value of pred: the error, 0 where it does not count; how much its square counts; whether it does."""
    pred, K, has = pred.to(arithmetic(pred)), pred.shape[1], (classes >= 0)[..., None]
    boxes, truth = pred[..., : 5 * boxes_per_cell].unflatten(-1, (boxes_per_cell, 5)), torch.where(has, boxes, 0.0)[..., None, :]
    overlap = _iou(
        torch.cat((boxes[..., :2] / K, boxes[..., 2:4] * boxes[..., 2:4]), -1), torch.cat((truth[..., :2] / K, truth[..., 2:]), -1)
    )
    best, mine = overlap.max(-1, keepdim=True)  # a NaN; else of equal ones the first
    mine = has & (torch.arange(boxes_per_cell, device=pred.device) == mine)  # (N, K, K, B)
    place = torch.where(mine[..., None], boxes[..., :4] - torch.cat((truth[..., :2], truth[..., 2:].sqrt()), -1), 0.0)
    confidence = boxes[..., 4] - torch.where(mine, best, 0.0)
    label = torch.arange(pred.shape[-1] - 5 * boxes_per_cell, device=pred.device) == classes[..., None]
    kind = torch.where(has, pred[..., 5 * boxes_per_cell :] - label.to(pred.dtype), 0.0)
    weights = torch.full_like(confidence, noobj).masked_fill(mine, 1.0)[..., None]
    weights = torch.cat((torch.full_like(place, coord), weights), -1).flatten(-2), torch.ones_like(kind)
    counts = torch.cat((mine[..., None].expand(place.shape), torch.ones_like(mine)[..., None]), -1).flatten(-2), has.expand(kind.shape)
    errors = torch.cat((place, confidence[..., None]), -1).flatten(-2), kind
    return tuple(torch.cat(both, -1) for both in (errors, weights, counts))


def _iou(a, b):
    """Of boxes as centre and sizes; 0 / 0 is 0."""
    half_a, half_b = 0.5 * a[..., 2:], 0.5 * b[..., 2:]
    a1, a2, b1, b2 = a[..., :2] - half_a, a[..., :2] + half_a, b[..., :2] - half_b, b[..., :2] + half_b
    inter = (torch.minimum(a2, b2) - torch.maximum(a1, b1)).clamp(min=0).prod(-1)
    union = (a2 - a1).prod(-1) + (b2 - b1).prod(-1) - inter
    return torch.where(union == 0, 0.0, inter / union)

"""What yolo_detect means, in plain PyTorch: each operation rounds once, so that every road gives the same boxes."""

import torch

from minkernels.nms import reference as nms
from minkernels.yolo._options import Options, arithmetic, outputs

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

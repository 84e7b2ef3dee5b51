"""What non-maximum suppression means, in plain PyTorch: the greedy loop, all images at once, one kept box of each at a time."""

import torch

from minkernels.nms._common import CUT, FILTERED, KEPT, round_down


def nms(boxes, scores, idxs, iou_threshold):
    classes = None if idxs is None else idxs[None]
    none = torch.zeros_like(scores[None], dtype=torch.bool)
    indices, counts, _ = _greedy(boxes[None], scores[None], classes, iou_threshold, none, len(scores))
    return indices[0, : int(counts[0])]


def nms_padded(boxes, scores, class_ids, iou_threshold, score_threshold, max_output, with_suppressor):
    dropped = boxes.isnan().any(-1) | scores.isnan()
    if score_threshold is not None:
        wide = scores.dtype == torch.float64
        dropped |= ~(scores > score_threshold if wide else scores.float() > round_down(score_threshold))
    indices, counts, suppressor = _greedy(boxes, scores, class_ids, iou_threshold, dropped, max_output)
    return indices, counts, suppressor if with_suppressor else suppressor.new_empty(0)


def _greedy(boxes, scores, class_ids, iou_threshold, dropped, max_output):
    """The greedy rule: by descending score, a box is kept unless its IoU with a kept box of its class is above the threshold."""
    acc = torch.promote_types(boxes.dtype, torch.float32)
    threshold = iou_threshold if acc == torch.float64 else round_down(iou_threshold)
    B, N = scores.shape
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # a NaN first
    x1, y1, x2, y2 = boxes.to(acc).gather(1, order[..., None].expand(B, N, 4)).unbind(-1)
    area = (x2 - x1) * (y2 - y1)
    classes = None if class_ids is None else class_ids.gather(1, order)
    dropped = dropped.gather(1, order)
    undecided = ~dropped
    place = torch.arange(N, device=boxes.device).expand(B, N)
    suppressor = torch.where(dropped, FILTERED, CUT)
    indices, counts = order.new_full((B, max_output), -1), order.new_zeros(B)
    last = counts - 1  # the place of the box that was kept last
    while (going := undecided.any(-1) & (counts < max_output)).any():
        b = going.nonzero()[:, 0]
        k = undecided[b].int().argmax(-1)  # the first of them
        kept = order[b, k]
        indices[b, counts[b]] = kept
        counts[b] += 1
        last[b] = k
        undecided[b, k] = False
        suppressor[b, k] = KEPT

        w = torch.minimum(x2[b], x2[b, k, None]) - torch.maximum(x1[b], x1[b, k, None])
        h = torch.minimum(y2[b], y2[b, k, None]) - torch.maximum(y1[b], y1[b, k, None])
        inter = w.clamp(min=0) * h.clamp(min=0)
        hit = undecided[b] & (inter / (area[b, k, None] + area[b] - inter) > threshold)  # false where it is NaN
        if classes is not None:
            hit &= classes[b] == classes[b, k, None]
        undecided[b] &= ~hit
        suppressor[b] = torch.where(hit, kept[:, None], suppressor[b])
    full = (counts == max_output)[:, None]
    suppressor = suppressor.masked_fill(full & (place > last[:, None]) & ~dropped, CUT)
    return indices, counts, torch.empty_like(suppressor).scatter_(1, order, suppressor)

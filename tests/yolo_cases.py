"""Raw head outputs that the tests of yolo_detect draw, and the detector that any user would write."""

import math

import torch

HEADS = "v1", "v1-planar", "v8", "v8-probs"


def draw(head, B, size, C, dtype=torch.float32, boxes_per_cell=2, odd=False, ties=False):
    """size: S of the v1 heads, anchors of the others."""
    if head.startswith("v8"):
        centre = 80 * torch.rand(B, 2, size)
        pred = torch.cat([centre, 5 + 40 * torch.rand(B, 2, size), torch.randn(B, C, size)], 1)
        if head == "v8-probs":
            pred[:, 4:] = pred[:, 4:].sigmoid()
        if ties:
            pred[:, 4:] = (pred[:, 4:] * 2).round() / 2
    else:
        grid = B, size, size
        box, conf, probs = torch.rand(*grid, boxes_per_cell, 4), torch.rand(*grid, boxes_per_cell), torch.rand(*grid, C)
        if ties:
            conf, probs = (conf * 2).round() / 2, (probs * 2).round() / 2
        if head == "v1":
            pred = torch.cat([torch.cat([box, conf[..., None]], -1).flatten(3), probs], -1)
        else:
            pred = torch.cat([probs.flatten(1), conf.flatten(1), box.flatten(1)], 1)
    if odd:
        for value in (math.nan, math.inf, -math.inf):
            pred[torch.rand(pred.shape) < 0.01] = value
    return pred.to(dtype)


def plain_iou(a, b):
    w, h = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    both = w * h
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def plain_detect(pred, head, C, image_size, score_threshold, iou_threshold, max_output, boxes_per_cell=2, agnostic=False, multi=False):
    """One image, box by box, in float64: a list of (box, score, class)."""
    found = []
    if head.startswith("v8"):
        for a in range(pred.shape[1]):
            scores = pred[4:, a].sigmoid() if head == "v8" else pred[4:, a]
            found.append((*pred[:4, a], scores))
    else:
        S, height, width = round(math.sqrt(pred.numel() / (5 * boxes_per_cell + C))), *image_size
        flat = pred.flatten()
        for row in range(S):
            for column in range(S):
                cell = row * S + column
                for box in range(boxes_per_cell):
                    if head == "v1":
                        x, y, w, h, confidence = pred[row, column, 5 * box : 5 * box + 5]
                        probs = pred[row, column, 5 * boxes_per_cell :]
                    else:
                        probs, confidence = flat[cell * C : cell * C + C], flat[S * S * C + cell * boxes_per_cell + box]
                        start = S * S * (C + boxes_per_cell) + 4 * (cell * boxes_per_cell + box)
                        x, y, w, h = flat[start : start + 4]
                    centre = (column + x) / S * width, (row + y) / S * height
                    found.append((*centre, w * w * width, h * h * height, confidence * probs))
    candidates = []
    for cx, cy, w, h, scores in found:
        box = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        for c in range(C) if multi else [int(scores.argmax())]:
            if scores[c] > score_threshold:
                candidates.append((box, float(scores[c]), c))
    kept = []
    for box, score, c in sorted(candidates, key=lambda x: -x[1]):
        if len(kept) < max_output and not any((agnostic or c == d) and plain_iou(box, other) > iou_threshold for other, _, d in kept):
            kept.append((box, score, c))
    return kept

"""Raw head outputs and targets that the tests of the family draw; the detector that any user would write, and the paper's loss."""

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


def draw_targets(N, K, C, share=0.4):
    """boxes and classes as yolo_loss takes them; where there is no object, the boxes hold anything."""
    boxes, classes = torch.rand(N, K, K, 4), torch.randint(C, (N, K, K))
    classes[torch.rand(N, K, K) > share] = -1
    boxes[..., 2:] = 0.05 + boxes[..., 2:] / 2
    boxes[(classes < 0)[..., None] & (torch.rand(boxes.shape) < 0.5)] = math.nan
    return boxes, classes


def plain_loss(pred, boxes, classes, B, coord=5.0, noobj=0.5):
    """Equation 3 of the paper, cell by cell: (N,)."""
    (N, K), losses = pred.shape[:2], []
    for n in range(N):
        total = pred.new_zeros(())
        for row in range(K):
            for column in range(K):
                cell, label, responsible = pred[n, row, column], int(classes[n, row, column]), None
                guesses = [cell[5 * b : 5 * b + 5] for b in range(B)]
                if label >= 0:
                    x, y, w, h = boxes[n, row, column].to(pred.dtype)
                    truth = torch.stack([(x + column) / K - w / 2, (y + row) / K - h / 2, (x + column) / K + w / 2, (y + row) / K + h / 2])
                    ious = []
                    for px, py, sw, sh, _ in (g.detach() for g in guesses):
                        px, py, w2, h2 = (px + column) / K, (py + row) / K, sw * sw / 2, sh * sh / 2
                        ious.append(float(plain_iou(torch.stack([px - w2, py - h2, px + w2, py + h2]), truth)))
                    responsible = ious.index(max(ious))
                    px, py, sw, sh, confidence = guesses[responsible]
                    total = total + coord * ((px - x) ** 2 + (py - y) ** 2 + (sw - w.sqrt()) ** 2 + (sh - h.sqrt()) ** 2)
                    total = total + (confidence - ious[responsible]) ** 2
                    for c, p in enumerate(cell[5 * B :]):
                        total = total + (p - float(c == label)) ** 2
                for b, guess in enumerate(guesses):
                    if b != responsible:
                        total = total + noobj * guess[4] ** 2
        losses.append(total)
    return torch.stack(losses)


def responsible_cases():
    """pred of three boxes a cell, boxes and classes of as many images of one cell, and which box is responsible: the highest IoU; of equal
    ones, 0 among them, the first; the first one that holds a NaN."""
    good, bad, nan = [0.5, 0.5, 0.5, 0.5, 0.2], [0.5, 0.5, 0.1, 0.1, 0.2], [0.5, math.nan, 0.5, 0.5, 0.2]
    far, point = [0.5, 0.5, 0.0, 0.0, 0.2], [9.0, 9.0, 0.0, 0.0, 0.2]
    cases = [
        ((bad, good, good), 1), ((good, bad, good), 0), ((far, point, far), 0), ((good, nan, nan), 1), ((bad, bad, good), 2),
        ((far, far, good), 0),  # its truth is a point, too: 0 / 0 is 0
    ]  # fmt: skip
    pred = torch.tensor([[[*a, *b, *c, 0.0]] for (a, b, c), _ in cases])[:, None]
    boxes = torch.tensor([0.5, 0.5, 0.25, 0.25]).repeat(len(cases), 1, 1, 1)
    boxes[-1, ..., 2:] = 0.0
    return pred, boxes, torch.zeros(len(cases), 1, 1, dtype=torch.int64), [b for _, b in cases]


def check_responsible(fwd, bwd):
    """Coordinates of the others have no gradient."""
    pred, boxes, classes, expected = responsible_cases()
    loss = fwd(pred, boxes, classes, 3, 5.0, 0.0, "none")
    assert loss.isnan().tolist() == [False, False, False, True, False, False]
    grad = bwd(torch.ones(len(expected)), pred, boxes, classes, 3, 5.0, 0.0, "none")[:, 0, 0, :15].unflatten(1, (3, 5))
    assert [g.nan_to_num(1.0).any(1).nonzero().flatten().tolist() for g in grad] == [[b] for b in expected]
    assert abs(loss[1] - ((0.2 - 1) ** 2 + 1)) < 1e-5  # its IoU is 1; and the class
    assert abs(loss[5] - (0.2**2 + 1)) < 1e-5  # its IoU is 0


def check_upstream(fwd, bwd):
    """One number or one of each image, expanded or not; what does not count has a gradient of 0 even where the upstream is infinite."""
    pred, (boxes, classes) = torch.rand(3, 4, 4, 13), draw_targets(3, 4, 3)
    each = bwd(torch.full((3,), 1.5), pred, boxes, classes, 2, 5.0, 0.5, "none")
    assert torch.equal(bwd(torch.tensor(1.5).expand(3), pred, boxes, classes, 2, 5.0, 0.5, "none"), each)
    assert torch.equal(bwd(torch.tensor(1.5), pred, boxes, classes, 2, 5.0, 0.5, "sum"), each)
    counts = fwd(pred, boxes, classes, 2, 5.0, 0.5, "none").isfinite().all() and each != 0
    found = bwd(torch.tensor(math.inf), pred, boxes, classes, 2, 5.0, 0.5, "sum")
    assert torch.equal(found.isinf(), counts) and torch.equal(found == 0, ~counts)

"""Boxes, scores and classes that the tests of Soft-NMS and Matrix NMS draw."""

import math

import torch

KINDS = "clusters", "grid", "equal", "ties", "odd", "huge"


def draw(kind, B, N, classes, dtype=torch.float32):
    """boxes (B, N, 4), scores (B, N), class_ids (B, N) or None."""
    centre = 100 * torch.rand(B, N, 2) if kind != "clusters" else 60 * torch.randint(0, 3, (B, N, 2)) + 6 * torch.randn(B, N, 2)
    size = 5 + 30 * torch.rand(B, N, 2)
    boxes, scores = torch.cat([centre - size / 2, centre + size / 2], -1), torch.rand(B, N)
    if kind == "grid":  # IoUs that are equal to thresholds: whole numbers
        boxes = torch.randint(0, 6, (B, N, 4)).float()
    if kind == "equal":
        boxes[:] = torch.tensor([1.0, 2.0, 30.0, 40.0])
    if kind in ("ties", "grid"):
        scores = torch.randint(0, 5, (B, N)) / 4
    if kind == "odd":  # NaN, infinities, empty and inverted boxes, scores at and below the threshold
        for value in (math.nan, math.inf, -math.inf, 0.0):
            boxes[torch.rand(boxes.shape) < 0.05] = value
        for value in (math.nan, math.inf, -math.inf, 0.25, -1.0):
            scores[torch.rand(scores.shape) < 0.05] = value
        boxes = torch.where(torch.rand(B, N, 1) < 0.2, boxes[..., [2, 1, 0, 3]], boxes)
    if kind == "huge":
        boxes *= 1e18  # areas that overflow
    class_ids = None if classes == 1 else torch.randint(0, classes, (B, N)) * (2**40 + 1) - 2**41
    return boxes.to(dtype), scores.to(dtype), class_ids

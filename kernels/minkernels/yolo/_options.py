"""What every road of the family shares: options, results, and the filter's threshold."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minkernels.nms._common import round_down

HEADS = {"v1": 0, "v1-planar": 1, "v8": 2, "v8-probs": 2}  # as the kernels number them: csrc/ops/cpu/yolo.h, _triton.py
SCHEMA = (
    "str head, int boxes_per_cell, int num_classes, float height, float width, bool sqrt_wh, float score_threshold, float iou_threshold, "
    "int max_output, bool class_agnostic, bool multi_label, int max_candidates"
)


class Detections(NamedTuple):
    boxes: Tensor  # (B, K, 4) x1, y1, x2, y2 in pixels; 0 where there is none
    scores: Tensor  # (B, K); 0 where there is none
    classes: Tensor  # (B, K) int64; -1 where there is none
    counts: Tensor  # (B,) int64


class Options(NamedTuple):
    head: str
    boxes_per_cell: int
    num_classes: int
    height: float
    width: float
    sqrt_wh: bool
    score_threshold: float
    iou_threshold: float
    max_output: int
    class_agnostic: bool
    multi_label: bool
    max_candidates: int

    @property
    def logits(self) -> bool:
        return self.head == "v8"

    def grid(self, pred: Tensor) -> int:
        """Cells in a row of a v1 head."""
        if self.head == "v1":
            return pred.shape[1]
        return math.isqrt(pred.shape[1] // (5 * self.boxes_per_cell + self.num_classes))

    def places(self, pred: Tensor) -> int:
        """Boxes of an image that the head predicts."""
        return pred.shape[2] if self.head.startswith("v8") else self.grid(pred) ** 2 * self.boxes_per_cell

    def least(self, dtype: torch.dtype) -> float:
        """A raw score passes if it is above: the threshold as dtype and the head have it, rounded down."""
        t = self.score_threshold
        if self.logits:
            t = -math.inf if t == 0 else math.inf if t == 1 else math.log(t) - math.log1p(-t)
        return t if dtype == torch.float64 else round_down(t)


def arithmetic(pred: Tensor) -> torch.dtype:
    return torch.promote_types(pred.dtype, torch.float32)


def outputs(pred: Tensor, max_output: int):
    shape, dtype = (pred.shape[0], max_output), arithmetic(pred)
    return (
        pred.new_empty((*shape, 4), dtype=dtype),
        pred.new_empty(shape, dtype=dtype),
        pred.new_empty(shape, dtype=torch.int64),
        pred.new_empty(shape[0], dtype=torch.int64),
    )


def loss_output(pred: Tensor, reduction: str) -> Tensor:
    return pred.new_empty(pred.shape[:1] if reduction == "none" else (), dtype=arithmetic(pred))


def loss_factor(pred: Tensor, reduction: str) -> float:
    """What the sum over the images is multiplied by."""
    return 1.0 if reduction != "mean" else 1 / len(pred) if len(pred) else math.nan


def class_error(classes: Tensor, cell: int, num_classes: int) -> IndexError:
    K = classes.shape[1]
    at = cell // K // K, cell // K % K, cell % K
    found = f"classes{list(at)} is {classes[at].item()}"
    return IndexError(f"{found}, out of range for {num_classes} classes (0 to {num_classes - 1}, or -1 for a cell without an object)")

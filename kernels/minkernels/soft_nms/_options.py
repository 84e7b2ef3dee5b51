"""What every road of Soft-NMS and Matrix NMS shares: results, and numbers as the arithmetic takes them."""

from typing import NamedTuple

import torch
from torch import Tensor

from minkernels.nms._common import round_down


class RescoredNMS(NamedTuple):
    indices: Tensor  # (B, max_output) int64, by descending score; -1 where there is none
    scores: Tensor  # (B, max_output), lowered by the boxes above; 0 where there is none
    counts: Tensor  # (B,) int64


def arithmetic(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of them is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def outputs(boxes, scores, max_output):
    shape = boxes.shape[0], max_output
    return (
        boxes.new_empty(shape, dtype=torch.int64),
        boxes.new_empty(shape, dtype=arithmetic(boxes, scores)),
        boxes.new_empty(shape[0], dtype=torch.int64),
    )


def below(x: float, dtype: torch.dtype) -> float:
    """The largest number of dtype that is at most x: score > below(x) of a score in dtype is score > x without rounding."""
    return x if dtype == torch.float64 else round_down(x)

"""Soft-NMS and Matrix NMS of a batch: what they promise."""

from torch import Tensor

from minkernels._checks import as_int, check_number, check_unit
from minkernels._library import define
from minkernels.nms.ops import check_boxes
from minkernels.soft_nms import reference
from minkernels.soft_nms._options import RescoredNMS, outputs

METHODS = "linear", "gaussian"


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    class_ids: Tensor | None = None,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_output: int,
) -> RescoredNMS:
    """Soft-NMS: every selected box lowers the scores of those that overlap it, instead of removing them.

    The exact sequential algorithm, of every image: the box with the highest score so far is selected (of equal ones the first), then
    each box of its class that is left has its score multiplied by 1 - IoU where IoU > iou_threshold (linear), or by
    exp(-IoU**2 / sigma) (gaussian); and again, while a score is above min_score.

    Shapes: B images, N boxes each, K = max_output.
    Args:
        boxes: (B, N, 4) as x1, y1, x2, y2, in any unit: float16, bfloat16, float32, or float64 (CPU only); any strides; N < 2**31. A
            box with a NaN is dropped; one whose x2 < x1 or y2 < y1 overlaps nothing.
        scores: (B, N), of any of these dtypes. A NaN is dropped.
        class_ids: (B, N) int64, int32, int16, int8 or uint8, any values: only boxes of a class change each other. Default: one class.
        method: "linear" or "gaussian". iou_threshold: of linear alone, 0 to 1. sigma: of gaussian alone, 1e-30 to 1e30.
        min_score: 0 to 1; scores must be above it, before as after.
        max_output: K, at least 1: the selection of an image stops there, over all of its classes.
    Returns: RescoredNMS(indices (B, K) int64, into N, in the order of selection, which is that of the scores, -1 padded; scores (B, K)
        as they were when selected, 0 padded; counts (B,) int64). Scores are float32; float64 if boxes or scores are. No gradient:
        inputs that require one are detached. The same bits on every device and for any number of threads: the arithmetic is float32
        without contraction (float64 for float64), the exponential a fixed polynomial; thresholds count as they are given, unrounded.
        An IoU that is 0 / 0 or inf / inf counts as 0.
    Raises: ValueError for shapes or values that do not fit; TypeError for unsupported dtypes and mixed devices.
    Memory: O(N) beside the results; no host synchronisation.
    Source: Soft-NMS, Bodla et al. 2017, arXiv:1704.04503, equations 2 and 3 (strict as its authors' code: a box at iou_threshold stays).
    """
    boxes, scores, class_ids, max_output = _check(boxes, scores, class_ids, method, sigma, min_score, max_output)
    check_unit("iou_threshold", iou_threshold)
    numbers = float(iou_threshold), float(sigma), float(min_score)
    return RescoredNMS(*_soft_nms(boxes, scores, class_ids, method, *numbers, max_output))


def matrix_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    class_ids: Tensor | None = None,
    method: str = "gaussian",
    sigma: float = 2.0,
    min_score: float,
    max_output: int,
) -> RescoredNMS:
    """Matrix NMS: the score of box j is multiplied by min over the boxes i of its class with a higher score (of equal ones, before it) of
    f(IoU of i and j) / f(c of i), where c of i is the largest IoU of i with a box above it; f(x) = exp(-sigma x**2) (gaussian), or
    1 - x (linear; a box i with c = 1 lowers nothing: the box that it equals does). No iteration: all at once.

    Args:
        boxes, scores, class_ids, max_output: as soft_nms takes them.
        method: "gaussian" or "linear". sigma: of gaussian alone, 1e-30 to 1e30.
        min_score: 0 to 1; scores must be above it, before as after.
    Returns: RescoredNMS, as soft_nms, by descending new score (of equal ones the first).
    Raises: as soft_nms.
    Memory: O(N) beside the results, no N x N tensor; no host synchronisation.
    Source: SOLOv2, Wang et al. 2020, arXiv:2003.10152, section 3.3, equations 3 to 5.
    """
    boxes, scores, class_ids, max_output = _check(boxes, scores, class_ids, method, sigma, min_score, max_output)
    return RescoredNMS(*_matrix_nms(boxes, scores, class_ids, method, float(sigma), float(min_score), max_output))


def _check(boxes, scores, class_ids, method, sigma, min_score, max_output):
    check_boxes(boxes, scores, None if class_ids is None else ("class_ids", class_ids), 3)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_number("sigma", sigma)
    if not 1e-30 <= sigma <= 1e30:  # it and 1 / sigma are to be float32
        raise ValueError(f"sigma must be 1e-30 to 1e30, got {sigma}")
    check_unit("min_score", min_score)
    return boxes.detach(), scores.detach(), class_ids, as_int("max_output", max_output, 1)


_soft_nms = define(
    "soft_nms",
    "(Tensor boxes, Tensor scores, Tensor? class_ids, str method, float iou_threshold, float sigma, float min_score, int max_output)"
    " -> (Tensor indices, Tensor scores, Tensor counts)",
    fake=lambda boxes, scores, *rest: outputs(boxes, scores, rest[-1]),
    reference=reference.soft_nms,
    cpu="minkernels.soft_nms._cpu:soft_nms",
    cuda="minkernels.soft_nms._triton:soft_nms",
)
_matrix_nms = define(
    "matrix_nms",
    "(Tensor boxes, Tensor scores, Tensor? class_ids, str method, float sigma, float min_score, int max_output)"
    " -> (Tensor indices, Tensor scores, Tensor counts)",
    fake=lambda boxes, scores, *rest: outputs(boxes, scores, rest[-1]),
    reference=reference.matrix_nms,
    cpu="minkernels.soft_nms._cpu:matrix_nms",
    cuda="minkernels.soft_nms._triton:matrix_nms",
)

"""Non-maximum suppression: what it promises."""

from typing import NamedTuple

import torch
from torch import Tensor

from minkernels._checks import INTEGER_NAMES, INTEGERS, as_int, check_floats, check_number, check_tensor, check_unit
from minkernels._library import define
from minkernels.nms import reference
from minkernels.nms._common import new_outputs

MOST_BOXES = 2**31 - 1  # of an image: their places are 32-bit numbers in the kernels


class PaddedNMS(NamedTuple):
    indices: Tensor  # (B, max_output) int64, -1 behind the last box
    counts: Tensor  # (B,) int64
    suppressor: Tensor | None  # (B, N) int64


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The boxes that are left when each takes away those of lower score that overlap it: torchvision.ops.nms, everywhere as on its CPU.

    Args:
        boxes: (N, 4) corners x1, y1, x2, y2, in any unit: float16, bfloat16, float32, or float64 (CPU only); any strides; N < 2**31.
        scores: (N,) of any of these dtypes.
        iou_threshold: 0 to 1. A box goes when its IoU with a kept box is larger, not when it is equal.
    Returns: (K,) int64, the kept boxes by descending score; of equal scores the lower index comes first. The same on every device, bit for
        bit: IoU in float32 with IEEE division and no contraction (float64 for float64), compared with the threshold rounded down.
        A box with a NaN is kept and suppresses nothing, and so is one without area; a NaN score sorts first.
    Raises: ValueError for shapes or thresholds that do not fit; TypeError for unsupported dtypes and mixed devices.
    The size of the result depends on the data, so on a GPU the call waits for it: nms_padded does not. No gradient. Memory: about 100 bytes
    a box, on a GPU up to 1 MB more.
    Source: the greedy rule as torchvision's CPU kernel has it.
    """
    check_boxes(boxes, scores, None, 2)
    check_unit("iou_threshold", iou_threshold)
    return _nms(*_detached(boxes, scores), None, float(iou_threshold))


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """nms for each class on its own, in one call: torchvision.ops.batched_nms, but exactly, where its offsets round coordinates.

    Args:
        boxes, scores, iou_threshold: as those of nms.
        idxs: (N,) int64, int32, int16, int8 or uint8, any values: the class of each box, or its image and level.
    Returns: (K,) int64, the kept boxes of all classes by descending score, as nms does.
    Raises: as nms.
    """
    check_boxes(boxes, scores, ("idxs", idxs), 2)
    check_unit("iou_threshold", iou_threshold)
    return _nms(*_detached(boxes, scores), idxs.long(), float(iou_threshold))


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    *,
    class_ids: Tensor | None = None,
    iou_threshold: float,
    score_threshold: float | None = None,
    max_output: int,
    return_suppressor: bool = False,
) -> PaddedNMS:
    """nms for the images of a batch and their classes, into tensors of a fixed size: no host waits for a count, no loop over images.

    Args:
        boxes: (B, N, 4) corners x1, y1, x2, y2: float16, bfloat16, float32, or float64 (CPU only); any strides; N < 2**31.
        scores: (B, N) of any of these dtypes.
        class_ids: (B, N) as idxs of batched_nms: boxes of different classes do not suppress each other. None: all are of one.
        iou_threshold: 0 to 1. A box goes when its IoU with a kept box is larger, not when it is equal.
        score_threshold: only boxes with score > score_threshold take part; None: all. A box with a NaN, in its score too, never does.
        max_output: at least 1, how many boxes of an image are kept at most, over its classes; work stops when there are as many.
        return_suppressor: whether the third result is wanted.
    Returns: PaddedNMS(indices, counts, suppressor).
        indices: (B, max_output) int64, of the kept boxes by descending score (of equal scores the lower index first), then -1.
        counts: (B,) int64, how many were kept.
        suppressor: (B, N) int64 or None: the first kept box, by descending score, that suppressed this one; -1 for a kept box; -2 for one
            that took no part; -3 for one that comes after the max_output-th kept box, and was not looked at.
        The same on every device, bit for bit, as nms.
    Raises: ValueError for shapes or values that do not fit; TypeError for unsupported dtypes and mixed devices.
    Memory: about 100 bytes a box, on a CPU of as many images as there are threads, on a GPU up to 1 MB an image more. Source: as nms.
    """
    check_boxes(boxes, scores, None if class_ids is None else ("class_ids", class_ids), 3)
    check_unit("iou_threshold", iou_threshold)
    if score_threshold is not None:
        check_number("score_threshold", score_threshold)
        score_threshold = float(score_threshold)
    max_output = as_int("max_output", max_output, 1)
    if not isinstance(return_suppressor, bool):
        raise TypeError(f"return_suppressor must be a bool, got {return_suppressor!r}")
    classes = None if class_ids is None else class_ids.long()
    args = *_detached(boxes, scores), classes, float(iou_threshold), score_threshold, max_output, return_suppressor
    outputs = _nms_padded(*args)
    return PaddedNMS(*outputs[:2], outputs[2] if return_suppressor else None)


def _detached(*tensors):
    return (t.detach() if t.requires_grad else t for t in tensors)


def check_boxes(boxes, scores, classes, dims):
    """classes: None, or the name of that argument and the argument."""
    check_floats("boxes", boxes)
    check_floats("scores", scores)
    *shape, four = boxes.shape or (0,)
    if len(shape) + 1 != dims or four != 4:
        raise ValueError(f"boxes must be {'(N, 4)' if dims == 2 else '(B, N, 4)'}, got {tuple(boxes.shape)}")
    for name, t in (("scores", scores), classes) if classes else (("scores", scores),):
        check_tensor(name, t)
        if [*t.shape] != shape:
            raise ValueError(f"{name} must be {tuple(shape)} to fit boxes {tuple(boxes.shape)}, got {tuple(t.shape)}")
        if t.device != boxes.device:
            raise TypeError(f"{name} is on {t.device}, but boxes is on {boxes.device}")
    if classes and classes[1].dtype not in INTEGERS:
        raise TypeError(f"{classes[0]} must be {INTEGER_NAMES}, got {classes[1].dtype}")
    if isinstance(shape[-1], int) and shape[-1] > MOST_BOXES:  # an exported graph's may be any
        raise ValueError(f"boxes must be fewer than 2**31 an image, got {shape[-1]}")


def _nms_fake(boxes, scores, idxs, iou_threshold):
    return scores.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _padded_fake(boxes, scores, class_ids, iou_threshold, score_threshold, max_output, with_suppressor):
    return new_outputs(scores, max_output, with_suppressor)


_nms = define(
    "nms",
    "(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> Tensor",
    fake=_nms_fake,
    reference=reference.nms,
    cpu=None,
    cuda="minkernels.nms._triton:nms",
)
_nms_padded = define(
    "nms_padded",
    # class_ids and idxs are int64. suppressor: empty if it was not asked for.
    "(Tensor boxes, Tensor scores, Tensor? class_ids, float iou_threshold, float? score_threshold, SymInt max_output, bool with_suppressor)"
    " -> (Tensor indices, Tensor counts, Tensor suppressor)",
    fake=_padded_fake,
    reference=reference.nms_padded,
    cpu="minkernels.nms._cpu:nms_padded",
    cuda="minkernels.nms._triton:nms_padded",
)

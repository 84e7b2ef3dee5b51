"""NMS by csrc/ops/cuda/nms.cu: one launch for images of up to 1024 boxes, two a tile for larger ones. No GPU has run it yet, so that
_triton.py serves; tests and benches call this by name where the library was built with nvcc."""

import torch

from minkernels._library import cpp
from minkernels.nms._common import new_outputs, round_down


def built() -> bool:
    return cpp() and hasattr(torch.ops.minkernels, "_nms_cuda")


def nms(boxes, scores, idxs, iou_threshold):
    classes = None if idxs is None else idxs[None]
    indices, counts, _ = _greedy(boxes[None], scores[None], classes, iou_threshold, False, None, len(scores), False)
    return indices[0, : int(counts)].clone()  # not a view of N elements


def nms_padded(boxes, scores, class_ids, iou_threshold, score_threshold, max_output, with_suppressor):
    return _greedy(boxes, scores, class_ids, iou_threshold, True, score_threshold, max_output, with_suppressor)


def _greedy(boxes, scores, class_ids, iou_threshold, drop, score_threshold, max_output, with_suppressor):
    outputs = indices, counts, suppressor = new_outputs(scores, max_output, with_suppressor)
    low = None if score_threshold is None else round_down(score_threshold)
    args = boxes, scores, class_ids, round_down(iou_threshold), drop, low
    torch.ops.minkernels._nms_cuda.default(*args, indices, counts, suppressor if with_suppressor else None)
    return outputs

"""How NMS is fast on a CPU: csrc/ops/cpu/nms_kernel.h."""

import torch

from minkernels.nms._common import new_outputs

_nms = torch.ops.minkernels._nms.default


def nms(boxes, scores, idxs, iou_threshold):
    indices = scores.new_empty(len(scores), dtype=torch.int64)
    count = _nms(boxes, scores, idxs, iou_threshold, False, None, indices, None, None)
    return indices[:count].clone()  # not a view of N elements


def nms_padded(boxes, scores, class_ids, iou_threshold, score_threshold, max_output, with_suppressor):
    indices, counts, suppressor = new_outputs(scores, max_output, with_suppressor)
    _nms(boxes, scores, class_ids, iou_threshold, True, score_threshold, indices, counts, suppressor if with_suppressor else None)
    return indices, counts, suppressor

"""How Soft-NMS and Matrix NMS are fast on a CPU: csrc/ops/cpu/soft_nms.cpp."""

import torch

from minkernels.soft_nms._options import arithmetic, below, outputs

_rescored_nms = torch.ops.minkernels._rescored_nms.default


def soft_nms(boxes, scores, class_ids, method, iou_threshold, sigma, min_score, max_output):
    return _nms(boxes, scores, class_ids, False, method, iou_threshold, 1 / sigma, min_score, max_output)


def matrix_nms(boxes, scores, class_ids, method, sigma, min_score, max_output):
    return _nms(boxes, scores, class_ids, True, method, 0.0, sigma, min_score, max_output)


def _nms(boxes, scores, class_ids, matrix, method, iou_threshold, factor, min_score, max_output):
    dtype, results = arithmetic(boxes, scores), outputs(boxes, scores, max_output)
    tensors = boxes.to(dtype).contiguous(), scores.to(dtype).contiguous(), None if class_ids is None else class_ids.long().contiguous()
    _rescored_nms(*tensors, matrix, method == "gaussian", below(iou_threshold, dtype), factor, below(min_score, dtype), *results)
    return results

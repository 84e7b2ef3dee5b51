"""How NMS is fast on a CPU: csrc/ops/cpu/nms_kernel.h."""

import torch

from minkernels.nms._common import new_outputs

nms = torch.ops.minkernels.nms.default  # the library's own, once it is loaded: Python would take as long as a few hundred boxes
_nms_padded = torch.ops.minkernels._nms_padded.default


def nms_padded(boxes, scores, class_ids, iou_threshold, score_threshold, max_output, with_suppressor):
    outputs = indices, counts, suppressor = new_outputs(scores, max_output, with_suppressor)
    _nms_padded(boxes, scores, class_ids, iou_threshold, score_threshold, indices, counts, suppressor if with_suppressor else None)
    return outputs

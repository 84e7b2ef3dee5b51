"""How the family is fast on a CPU: csrc/ops/cpu/yolo.cpp finds and decodes the candidates, and NMS takes over; yolo_loss.h is the loss."""

import torch

from minkernels.nms import _cpu as nms
from minkernels.yolo._options import HEADS, Options, arithmetic, class_error, loss_factor, loss_output, outputs

_candidates = torch.ops.minkernels._yolo_candidates.default
_detections = torch.ops.minkernels._yolo_detections.default
_loss_fwd = torch.ops.minkernels._yolo_loss_fwd.default
_loss_bwd = torch.ops.minkernels._yolo_loss_bwd.default


def detect(pred, *options):
    x = Options(*options)
    pred = pred if x.head.startswith("v8") else pred.contiguous()
    numbers = HEADS[x.head], x.boxes_per_cell, x.num_classes, x.height, x.width, x.sqrt_wh
    boxes, scores, classes = _candidates(pred, *numbers, x.least(arithmetic(pred)), x.multi_label, x.max_candidates)
    indices, counts, _ = nms.nms_padded(boxes, scores, None if x.class_agnostic else classes, x.iou_threshold, None, x.max_output, False)
    *results, out_counts = outputs(pred, x.max_output)
    _detections(boxes, scores, classes, indices, x.logits, *results)
    return *results, out_counts.copy_(counts)


def loss_fwd(pred, boxes, classes, boxes_per_cell, coord, noobj, reduction):
    loss, labels = loss_output(pred, reduction), classes.long().contiguous()
    bad = _loss_fwd(pred, boxes.contiguous(), labels, boxes_per_cell, coord, noobj, loss_factor(pred, reduction), loss)
    if bad >= 0:
        raise class_error(classes, bad, pred.shape[3] - 5 * boxes_per_cell)
    return loss


def loss_bwd(dloss, pred, boxes, classes, boxes_per_cell, coord, noobj, reduction):
    grad, labels = torch.zeros_like(pred), classes.long().contiguous()
    _loss_bwd(dloss, pred, boxes.contiguous(), labels, boxes_per_cell, coord, noobj, loss_factor(pred, reduction), grad)
    return grad

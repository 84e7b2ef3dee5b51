"""How the IoU family is fast on a CPU: csrc/ops/cpu/boxes_kernel.h."""

import math

import torch

from minkernels.boxes._outputs import grads, loss_output, match_outputs, pair_output

_pairs_fwd = torch.ops.minkernels._box_pairs_fwd.default
_pairs_bwd = torch.ops.minkernels._box_pairs_bwd.default
_match = torch.ops.minkernels._iou_match.default
_loss_fwd = torch.ops.minkernels._iou_loss_fwd.default
_loss_bwd = torch.ops.minkernels._iou_loss_bwd.default
_KINDS = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3}  # csrc/ops/cpu/boxes.h
_FORMATS = {"xyxy": 0, "xywh": 1, "cxcywh": 2}


def pairs_fwd(boxes1, boxes2, kind, fmt, eps):
    out = pair_output(boxes1, boxes2)
    _pairs_fwd(_sets(boxes1), _sets(boxes2), _KINDS[kind], _FORMATS[fmt], eps, out)
    return out


def pairs_bwd(dout, boxes1, boxes2, kind, fmt, eps, need1, need2):
    d1, d2 = grads(boxes1, boxes2, need1, need2)
    _pairs_bwd(_sets(dout), _sets(boxes1), _sets(boxes2), _KINDS[kind], _FORMATS[fmt], eps, d1 if need1 else None, d2 if need2 else None)
    return d1, d2


def match(boxes, gts, fmt):
    outputs = match_outputs(boxes, gts)
    _match(_sets(boxes), _sets(gts), _FORMATS[fmt], *outputs)
    return outputs


def loss_fwd(input, target, kind, fmt, eps, reduction):
    loss, P = loss_output(input, reduction), input.numel() // 4
    total = _loss_fwd(_rows(input), _rows(target), _KINDS[kind], _FORMATS[fmt], eps, loss if reduction == "none" else None)
    if reduction != "none":
        loss.fill_(total / max(P, 1) if reduction == "mean" else total)
    return loss


def loss_bwd(dloss, input, target, kind, fmt, eps, need_input, need_target):
    d1, d2 = grads(input, target, need_input, need_target)
    _loss_bwd(
        dloss.reshape(-1), _rows(input), _rows(target), _KINDS[kind], _FORMATS[fmt], eps, d1 if need_input else None,
        d2 if need_target else None,
    )  # fmt: skip
    return d1, d2


def _sets(t):
    """(..., N, 4) as (sets, N, 4); a copy where leading dimensions do not lie one stride apart."""
    return t if t.dim() == 3 else t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:])


def _rows(t):
    return t if t.dim() == 2 else t.reshape(t.numel() // 4, 4)

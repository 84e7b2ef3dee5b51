"""How outputs are allocated: what every backend and the fakes share. All are contiguous."""

import torch


def pair_output(boxes1, boxes2):
    return boxes1.new_empty((*boxes1.shape[:-1], boxes2.shape[-2]))


def grads(boxes1, boxes2, need1, need2):
    """Empty where nobody asked for it."""
    return boxes1.new_empty(boxes1.shape if need1 else 0), boxes2.new_empty(boxes2.shape if need2 else 0)


def match_outputs(boxes, gts):
    indices = [t.new_empty(t.shape[:-1], dtype=torch.int64) for t in (boxes, gts)]
    return boxes.new_empty(boxes.shape[:-1]), indices[0], gts.new_empty(gts.shape[:-1]), indices[1]


def loss_output(input, reduction):
    return input.new_empty(input.shape[:-1] if reduction == "none" else (), dtype=torch.promote_types(input.dtype, torch.float32))

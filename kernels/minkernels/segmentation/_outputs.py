"""How outputs are allocated: what every backend but the reference, and the fakes, share."""

import torch


def sigmoid_loss_outputs(input, reduction, with_grad):
    """loss; scale, what the gradient of each element is multiplied by; grad for an upstream of 1, empty if nobody asked for it."""
    wide = torch.promote_types(input.dtype, torch.float32)
    loss = torch.empty_like(input, dtype=wide) if reduction == "none" else input.new_empty((), dtype=wide)
    return loss, input.new_empty((), dtype=wide), torch.empty_like(input) if with_grad else input.new_empty(0)


def bce_dice_outputs(input, per_image, reduction):
    """loss; factors (N, C, 3) or (C, 3), of the gradient: of the BCE's derivative, of p (1 - p) t, and of p (1 - p), times p if squared."""
    wide = torch.promote_types(input.dtype, torch.float32)
    entries = input.shape[:2] if per_image else input.shape[1:2]
    return input.new_empty(entries if reduction == "none" else (), dtype=wide), input.new_empty((*entries, 3), dtype=wide)

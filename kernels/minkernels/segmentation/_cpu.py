"""How the segmentation losses are fast on a CPU: csrc/ops/cpu/segmentation_kernel.h."""

import torch

from minkernels._memory import empty_like
from minkernels.segmentation._outputs import bce_dice_outputs
from minkernels.segmentation._targets import check_targets

sigmoid_loss_fwd = torch.ops.minkernels.sigmoid_loss_fwd.default  # C++ alone
sigmoid_loss_bwd = torch.ops.minkernels.sigmoid_loss_bwd.default
_bce_dice_fwd = torch.ops.minkernels._bce_dice_fwd.default
_bce_dice_bwd = torch.ops.minkernels._bce_dice_bwd.default


def bce_dice_fwd(input, target, pos_weight, mask, bce_weight, dice_weight, smooth, squared, per_image, reduction):
    loss, factors = bce_dice_outputs(input, per_image, reduction)
    weights = None if pos_weight is None else pos_weight.double().contiguous()
    numbers = bce_weight, dice_weight, smooth, squared, per_image, reduction
    if _bce_dice_fwd(input, target, weights, mask, *numbers, loss, factors):
        check_targets(input, target, mask)
    return loss, factors


def bce_dice_bwd(input, target, pos_weight, mask, factors, squared):
    grad = empty_like(input)
    weights = None if pos_weight is None else pos_weight.double().contiguous()
    _bce_dice_bwd(input, target, weights, mask, factors.contiguous(), squared, grad)
    return grad

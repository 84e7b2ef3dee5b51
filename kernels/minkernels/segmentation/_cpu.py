"""How the segmentation losses are fast on a CPU: csrc/ops/cpu/segmentation_kernel.h. C++ alone."""

import torch

sigmoid_loss_fwd = torch.ops.minkernels.sigmoid_loss_fwd.default
sigmoid_loss_bwd = torch.ops.minkernels.sigmoid_loss_bwd.default
bce_dice_fwd = torch.ops.minkernels.bce_dice_fwd.default
bce_dice_bwd = torch.ops.minkernels.bce_dice_bwd.default

"""nn.Modules over the ops: the same arguments as PyTorch's, where there is one."""

from torch import Tensor, nn

from minkernels.segmentation.ops import bce_dice_loss, bce_with_logits, sigmoid_focal_loss


class BCEWithLogitsLoss(nn.Module):
    """bce_with_logits, for nn.BCEWithLogitsLoss: weight and pos_weight are buffers, under the same names."""

    def __init__(self, weight: Tensor | None = None, *, reduction: str = "mean", pos_weight: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return bce_with_logits(input, target, self.weight, pos_weight=self.pos_weight, mask=mask, reduction=self.reduction)

    def extra_repr(self):
        return f"reduction={self.reduction!r}"


class BCEDiceLoss(nn.Module):
    """bce_dice_loss with its options; pos_weight is a buffer."""

    def __init__(
        self,
        *,
        bce_weight: float = 1.0,
        dice_weight: float = 1.0,
        smooth: float = 1.0,
        squared: bool = False,
        per: str = "image",
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
    ):
        super().__init__()
        self.register_buffer("pos_weight", pos_weight)
        self.options = dict(
            bce_weight=bce_weight, dice_weight=dice_weight, smooth=smooth, squared=squared, per=per, reduction=reduction
        )

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return bce_dice_loss(input, target, pos_weight=self.pos_weight, mask=mask, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SigmoidFocalLoss(nn.Module):
    """sigmoid_focal_loss with its options."""

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"):
        super().__init__()
        self.options = dict(alpha=alpha, gamma=gamma, reduction=reduction)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return sigmoid_focal_loss(input, target, mask=mask, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

"""nn.Modules over the ops: PyTorch's names of arguments where there is one, by keyword."""

import math

from torch import Tensor, nn

from minkernels.cross_entropy.ops import cross_entropy
from minkernels.linear_cross_entropy.ops import linear_cross_entropy
from minkernels.segmentation.ops import bce_dice_loss, bce_with_logits, sigmoid_focal_loss


class _Loss(nn.Module):
    """Options that forward hands on as they are."""

    def __init__(self, **options):
        super().__init__()
        self.names = tuple(options)
        for name, value in options.items():  # attributes, as PyTorch's modules have them: set anew, they count
            setattr(self, name, value)

    @property
    def options(self):
        return {name: getattr(self, name) for name in self.names}

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CrossEntropyLoss(_Loss):
    """cross_entropy, for nn.CrossEntropyLoss: weight is a buffer under the same name. The options after label_smoothing are
    cross_entropy's."""

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        empty: str = "nan",
    ):
        super().__init__(
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, empty=empty,
        )  # fmt: skip
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, **self.options)


class LinearCrossEntropyLoss(_Loss):
    """linear_cross_entropy with its linear layer, for nn.LinearCrossEntropyLoss: the same parameters under the same names. The options
    after label_smoothing are linear_cross_entropy's."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        empty: str = "nan",
        memory_budget: int | None = None,
    ):
        super().__init__(
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, empty=empty, memory_budget=memory_budget,
        )  # fmt: skip
        self.classes = num_classes, *out_features
        self.linear = nn.Linear(in_features, math.prod(self.classes), bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight, linear_bias = self.linear.weight.view(*self.classes, -1), self.linear.bias
        linear_bias = linear_bias if linear_bias is None else linear_bias.view(self.classes)
        return linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, **self.options)


class BCEWithLogitsLoss(_Loss):
    """bce_with_logits, for nn.BCEWithLogitsLoss: weight and pos_weight are buffers, under the same names."""

    def __init__(self, weight: Tensor | None = None, *, reduction: str = "mean", pos_weight: Tensor | None = None):
        super().__init__(reduction=reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return bce_with_logits(input, target, self.weight, pos_weight=self.pos_weight, mask=mask, **self.options)


class BCEDiceLoss(_Loss):
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
        super().__init__(bce_weight=bce_weight, dice_weight=dice_weight, smooth=smooth, squared=squared, per=per, reduction=reduction)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return bce_dice_loss(input, target, pos_weight=self.pos_weight, mask=mask, **self.options)


class SigmoidFocalLoss(_Loss):
    """sigmoid_focal_loss with its options."""

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"):
        super().__init__(alpha=alpha, gamma=gamma, reduction=reduction)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return sigmoid_focal_loss(input, target, mask=mask, **self.options)

"""Plain nn modules."""

from collections.abc import Iterator

from torch import Tensor, nn

from minkernels.cross_entropy.ops import cross_entropy
from minkernels.swap.changes import Left, Swap, forward


def plan(model: nn.Module, **_) -> Iterator[Swap | Left]:
    for where, module in model.named_modules():
        if type(module) is nn.CrossEntropyLoss:
            yield Swap(where, "nn.CrossEntropyLoss", "cross_entropy", module, (forward(module, _cross_entropy),))


def _cross_entropy(module: nn.CrossEntropyLoss, input: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(
        input, target, module.weight, ignore_index=module.ignore_index, reduction=module.reduction, label_smoothing=module.label_smoothing
    )

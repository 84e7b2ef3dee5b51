"""A training step of a model of minmodels on our ops, beside the same model on PyTorch's."""

import copy
from collections.abc import Callable
from functools import cache, partial

import torch

from bench.timing import max_error
from minmodels.kernels import using

IMPLS = {"minkernels": "fused", "torch": "torch"}  # the kernels that the model runs on


def loss_of(model, batch, *, kernels, autocast=None):
    with using(kernels), torch.autocast(batch[0].device.type, autocast, enabled=autocast is not None):
        return model(*batch)


def training_step(initial: torch.nn.Module, batch: list[torch.Tensor], dtype: torch.dtype, one_by_one=False) -> tuple[dict, Callable]:
    """({impl: a step of AdamW}, judge of the first one's loss), as bench.timing wants them; dtype: float32, or that of autocast.

    one_by_one: the fp64 loss is taken a sequence at a time, for the memory; every target must count, so that means may be averaged.
    """
    autocast = None if dtype == torch.float32 else dtype

    def step(model, optimizer, kernels):
        loss = loss_of(model, batch, kernels=kernels, autocast=autocast)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    @cache
    def exact():
        wide = [t.double() if t.is_floating_point() else t for t in batch]
        parts, model = zip(*(t.split(1) for t in wide), strict=True) if one_by_one else [wide], copy.deepcopy(initial).double()
        with torch.no_grad():
            return (torch.stack([loss_of(model, part, kernels="torch") for part in parts]).mean(),)

    steps = {}
    for name, kernels in IMPLS.items():
        model = copy.deepcopy(initial)
        steps[name] = partial(step, model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), kernels)
    return steps, lambda outputs: max_error(outputs, exact(), dtype)

"""The modules: PyTorch's own in their place, with their state, give the same."""

import pytest
import torch
from torch import nn

from minkernels import cross_entropy, modules


def test_cross_entropy_loss(library):
    x, target, weight = torch.randn(6, 9), torch.randint(0, 9, (6,)), torch.rand(9)
    for options in ({}, dict(ignore_index=3, reduction="sum", label_smoothing=0.1)):
        theirs = nn.CrossEntropyLoss(weight, **options)
        ours = modules.CrossEntropyLoss(torch.zeros(9), **options)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x, target), theirs(x, target))
    more = dict(z_loss=0.01, softcap=5.0, logit_scale=0.5, empty="zero")
    assert torch.equal(modules.CrossEntropyLoss(**more)(x, target), cross_entropy(x, target, **more))
    assert "z_loss=0.01" in repr(modules.CrossEntropyLoss(**more))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch 2.13 has it")
@pytest.mark.parametrize("out_features", [(), (4, 3)])
def test_linear_cross_entropy_loss(out_features, library):
    options = dict(out_features=out_features, bias=True, reduction="mean", ignore_index=2, label_smoothing=0.1)
    theirs = nn.LinearCrossEntropyLoss(5, 10, **options)
    ours = modules.LinearCrossEntropyLoss(5, 10, **options, memory_budget=1000)
    ours.load_state_dict(theirs.state_dict())
    input, target = torch.randn(7, 5), torch.randint(0, 10, (7, *out_features))
    losses = ours(input, target), theirs(input, target)
    torch.testing.assert_close(*losses)
    grads = (torch.autograd.grad(loss, module.parameters()) for loss, module in zip(losses, (ours, theirs), strict=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)

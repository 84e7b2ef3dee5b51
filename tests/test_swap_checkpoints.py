"""Swapped models and activation checkpointing: what a backward computes again is what the forward computed."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from minkernels import swap, swapped
from swap_cases import Attention, ours

pytestmark = pytest.mark.usefixtures("library")


class Checkpointed(Attention):
    def forward(self, x):
        return self.proj(checkpoint(self.heads_of, x, use_reentrant=False).transpose(1, 2).flatten(2))


def test_checkpoints():
    """A backward recomputes outside the scope of a forward: such a module is left. Around a swapped module all is well."""
    model, x = nn.ModuleList([Checkpointed(), Attention()]), torch.randn(2, 5, 32, requires_grad=True)
    report = swap(model)
    assert [r.where for r in report.replaced] == ["1"] and [left.where for left in report.left] == ["0"]
    assert "checkpoint, sdpa  because: what it recomputes" in str(report)
    expected = [*torch.autograd.grad(model[1](x).square().sum(), x)]
    recomputed = torch.autograd.grad(checkpoint(model[1], x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close([*recomputed], expected, rtol=0, atol=0)

    def attend_dropping(v):
        return sdpa(v, v, v.flip(-1), dropout_p=0.5)

    v, scopes = torch.randn(1, 2, 9, 8, requires_grad=True), dict(context_fn=lambda: (swapped(), swapped()))
    grads = []
    for call in (attend_dropping, functools.partial(checkpoint, attend_dropping, use_reentrant=False, **scopes)):
        torch.manual_seed(3)
        with swapped():
            out, names = ours(call, v)
        assert names == ["attention_fwd"]
        grads.append(torch.autograd.grad(out.square().sum(), v)[0])
    assert torch.equal(*grads)


class Dropping(nn.Module):
    """Its parent calls the same function, and its own scope would be around the first run alone."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def attend(self, x):
        return sdpa(x, x, x.flip(-1), dropout_p=0.5)

    def forward(self, x):
        return checkpoint(self.attend, x, use_reentrant=self.reentrant)


def checkpointed(function):
    @functools.wraps(function)
    def recomputed(*args):
        return checkpoint(function, *args, use_reentrant=False)

    return recomputed


@checkpointed
def attend_twice(x):
    return sdpa(x, x, sdpa(x, x, x))


class Method(nn.Module):
    @checkpointed
    def forward(self, x):
        return sdpa(x, x, x)


class Function(nn.Module):
    def forward(self, x):
        return attend_twice(x)


class Attribute(nn.Module):
    """As transformers' GradientCheckpointingLayer."""

    def forward(self, x):
        return self._gradient_checkpointing_func(sdpa, x, x, sdpa(x, x, x))

    _gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


@pytest.mark.parametrize("kind", [Method, Function, Attribute])
def test_checkpoints_by_another_name(kind):
    model, x = kind(), torch.randn(1, 2, 9, 8, requires_grad=True)
    report = swap(model)
    assert not report.replaced and "because: what it recomputes" in str(report)
    model(x).sum().backward()


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return sdpa(x, x, self.inner(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside(reentrant):
    model, x, grads = Around(nn.Sequential(Dropping(reentrant))), torch.randn(1, 2, 9, 8, requires_grad=True), []
    for _ in range(2):
        torch.manual_seed(3)
        x.grad = None
        model(x).square().sum().backward()
        grads.append(x.grad)
        report = swap(model)
    assert torch.equal(*grads)
    assert not report.replaced and "what inner.0 recomputes" in str(report)

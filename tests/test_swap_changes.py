"""What a swap keeps of a module, and what others do to it since."""

import copy
import functools
import inspect
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from minkernels import swap, swapped, unswap
from swap_cases import Attention, Model, batch, ours

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:enable_nested_tensor:UserWarning"),
]


def test_swapped_before_stays():
    model = Model()
    swap(model)
    with swapped(model) as report:
        assert report.replaced == () and len(report.already) == 7
    assert len(unswap(model)) == 7


def test_only_what_the_scope_swapped_is_taken_back():
    model = Model()
    swap(model.encoder)
    with swapped(model) as report:
        assert (len(report.replaced), len(report.already)) == (2, 5)
    assert len(unswap(model)) == 5 and not unswap(model)


def test_what_was_set_since_stays():
    model = Attention()
    swap(model)
    model.forward = around = functools.partial(lambda inner, x: inner(x) + 1, model.forward)
    unswap(model)
    assert model.forward is around
    with torch.no_grad():
        assert ours(model, torch.randn(2, 5, 32))[1] == ["attention_fwd"]  # it still calls ours


def test_forward_replaced_by_others():
    model = nn.Sequential(Attention(), nn.CrossEntropyLoss())
    for module in model:
        module.forward = functools.partial(type(module).forward, module)  # as accelerate does
    kept = [module.forward for module in model]
    report = swap(model)
    assert not report.replaced and [x.why for x in report.left] == ["something else has replaced its forward"] * 2
    assert [module.forward for module in model] == kept


@pytest.mark.parametrize("make", [Attention, nn.CrossEntropyLoss], ids=["in-its-forward", "known"])
def test_a_method_that_is_taken_apart_and_bound_again(make):
    """As accelerate's prepare_model() and unwrap_model() do."""
    module = make()
    given = (torch.randn(2, 5, 32),) if make is Attention else (torch.randn(4, 7), torch.arange(4))
    swap(module)
    module.forward = types.MethodType(module.forward.__func__, module)
    with torch.no_grad():
        assert ours(module, *given)[1] == ["attention_fwd" if make is Attention else "cross_entropy_fwd"]
    assert len(unswap(module)) == 1 and "forward" not in vars(module)


def test_copies():
    model, (x, target, padding) = Model(), batch()
    swap(model)
    expected = model(x, target, padding)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        names = ours(twin, x, target, padding)[1]
        assert names == ["attention_fwd"] * 3 + ["cross_entropy_fwd"]
        assert torch.equal(twin(x, target, padding), expected)
        with torch.no_grad():
            twin.head.weight.zero_()  # its own weights, not those of the first
        assert torch.equal(model(x, target, padding), expected)
        assert len(unswap(twin)) == 7 and ours(twin, x, target, padding)[1] == []
    assert ours(model.double().eval(), x.double(), target, padding)[1] == names


class Odd(nn.Module):
    """Its forward has a default that cannot be copied, and an annotation that cannot be pickled."""

    def forward(self, x, logger=sys, *, scale: type("Unnamed", (), {}) = None):
        return sdpa(x, x, x, scale=scale)


def test_copies_of_a_forward_with_any_signature():
    model, x = Odd(), torch.randn(1, 2, 5, 8)
    names = [*inspect.signature(model.forward).parameters]
    swap(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [*inspect.signature(twin.forward).parameters] == names
        assert ours(twin, x, scale=0.5)[1] == ["attention_fwd"]


def test_what_was_undone_is_swapped_again():
    model, (x, target, padding) = Model(), batch()
    first, inner = swap(model), model.encoder.layers[0].self_attn
    del model.loss.forward, model.attn.forward
    inner.forward = functools.partial(lambda forward, *args, **options: forward(*args, **options), inner.forward)  # somebody's, around ours
    again = swap(model)
    assert [r.where for r in again.replaced] == ["attn", "loss"] and len(again.already) == len(first.replaced) - 3
    assert [left.where for left in again.left] == ["encoder.layers.0.self_attn"]
    assert ours(model, x, target, padding)[1] == ["attention_fwd"] * 3 + ["cross_entropy_fwd"]
    del model.loss.forward
    with swapped(model) as report:
        assert [r.where for r in report.replaced] == ["loss"]
    assert "forward" not in vars(model.loss) and "forward" in vars(model.attn)
    unswap(model)
    assert not any("forward" in vars(m) for m in model.modules() if m is not inner)


@pytest.mark.parametrize("function", [swap, unswap])
def test_shallow_copies_are_refused(function):
    model = nn.Sequential(nn.CrossEntropyLoss())
    swap(model)
    twin = nn.Sequential(copy.copy(model[0]))
    with pytest.raises(ValueError, match=r"0 is a shallow copy of a swapped module(.*)copy\.deepcopy"):
        function(twin)
    assert "forward" in vars(model[0])

"""What the BCE, focal and Dice losses promise: PyTorch's results, masks that hide anything, and the edges."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from minkernels import bce_dice_loss, bce_with_logits
from minkernels.segmentation import reference
from segmentation_cases import (
    REDUCTIONS,
    grad_of,
    losses,
    make,
)


def test_samples_of_pytorch(library):
    """PyTorch's own samples of F.binary_cross_entropy_with_logits."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    (op,) = (op for op in op_db if op.name == "nn.functional.binary_cross_entropy_with_logits")
    names, seen = list(inspect.signature(F.binary_cross_entropy_with_logits).parameters)[1:], 0
    for sample in op.sample_inputs("cpu", torch.float32, requires_grad=False):
        options = dict(zip(names, sample.args, strict=False)) | sample.kwargs
        ours = {name: value for name, value in options.items() if name not in ("target", "weight")}
        x = sample.input
        actual = bce_with_logits(x, options["target"], options.get("weight"), **ours)
        torch.testing.assert_close(actual, F.binary_cross_entropy_with_logits(x, **options))
        dloss = torch.randn_like(actual)
        expected = grad_of(lambda x: F.binary_cross_entropy_with_logits(x, **options), x, dloss)  # noqa: B023
        own = grad_of(lambda x: bce_with_logits(x, options["target"], options.get("weight"), **ours), x, dloss)  # noqa: B023
        torch.testing.assert_close(own, expected)
        seen += 1
    assert seen > 5


@losses
def test_a_masked_element_may_hold_anything(loss_of, library):
    x, t = make((2, 3, 8, 9))
    mask = torch.rand(2, 1, 8, 9) > 0.4
    hidden = ~mask.expand(x.shape)
    clean = x.masked_fill(hidden, 0.0).requires_grad_()
    expected = loss_of(clean, t, mask=mask)
    for value in (math.nan, math.inf, -math.inf, 3e38):
        dirty = x.masked_fill(hidden, value).requires_grad_()
        loss = loss_of(dirty, t.masked_fill(hidden, value), mask=mask)
        assert torch.equal(loss, expected)
        (dx,) = torch.autograd.grad(loss, dirty)
        assert (dx[hidden] == 0).all() and torch.equal(dx, torch.autograd.grad(expected, clean, retain_graph=True)[0])


def test_weights_under_the_mask_may_hold_anything_and_so_may_the_upstream_gradient(library):
    x, t = make((6, 50))
    mask = torch.rand(6, 50) > 0.4
    weight = torch.rand(6, 50).masked_fill(~mask, math.nan)
    dx = grad_of(lambda x: bce_with_logits(x, t, weight, pos_weight=weight, mask=mask, reduction="none").log(), x, torch.ones(6, 50))
    assert (dx[~mask] == 0).all() and dx.isfinite().all()


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # float16 never takes the early gradient
def test_nothing_counts(loss_of, dtype, library):
    x, t = make((2, 3, 8, 9), dtype)
    x.requires_grad_()
    loss = loss_of(x, t, mask=torch.zeros(8, 9, dtype=torch.bool))
    assert loss.isnan() and (torch.autograd.grad(loss, x)[0] == 0).all()
    assert loss_of(x, t, mask=torch.zeros(8, 9, dtype=torch.bool), reduction="sum") == 0
    assert (loss_of(x, t, mask=torch.zeros(8, 9, dtype=torch.bool), reduction="none") == 0).all()


@losses
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)])
def test_no_elements(loss_of, shape, library):
    x = torch.zeros(shape, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = loss_of(x, torch.zeros(shape), reduction=reduction)
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert dx.shape == shape and (reduction != "mean" or loss.isnan()) and (reduction != "sum" or loss == 0)


def test_a_mask_takes_entries_out_of_the_mean(library):
    """Without its second image, the loss is that of the first."""
    x, t = make((2, 3, 8, 9))
    mask = torch.tensor([True, False]).view(2, 1, 1, 1)
    torch.testing.assert_close(bce_dice_loss(x, t, mask=mask), bce_dice_loss(x[:1], t[:1]))
    torch.testing.assert_close(bce_dice_loss(x, t, mask=mask[:, 0].expand(2, 8, 9)), bce_dice_loss(x[:1], t[:1]))  # (N, *spatial)


@pytest.mark.parametrize("per", ["image", "batch"])
def test_mean_is_the_mean_of_none_without_a_mask(per, library):
    x, t = make((2, 3, 8, 9))
    torch.testing.assert_close(bce_dice_loss(x, t, per=per), bce_dice_loss(x, t, per=per, reduction="none").mean())


def test_the_reference_is_exact_in_fp64():
    """Thirds, which are no float32."""
    x = torch.zeros(1, 3, 1, dtype=torch.float64)
    _, factors = reference.bce_dice_fwd(x, x, None, None, 1.0, 1.0, 1.0, False, True, "mean")
    expected = torch.tensor([1 / 3, -2 / 3 / 1.5, 1 / 3 / 1.5 / 1.5], dtype=torch.float64)  # of sizes p = 0.5 and smooth 1
    torch.testing.assert_close(factors, expected.expand(1, 3, 3), rtol=1e-15, atol=0)


def test_smooth_0_and_nothing_there(library):
    """The plain formula's 0 / 0."""
    x, t = torch.full((1, 1, 4), -200.0), torch.zeros(1, 1, 4)
    assert bce_dice_loss(x, t, smooth=0.0).isnan() and bce_dice_loss(x, t) == 0


@pytest.mark.parametrize("early", [True, False])
def test_huge_logits(early, library):
    x = torch.tensor([1e30, 1e30, -1e30, -1e30, 100.0, -100.0], requires_grad=True)
    t = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    loss = bce_with_logits(x, t, reduction="sum" if early else "none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss.sum(), torch.tensor(2e30))
    torch.testing.assert_close(dx, torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0, 0.0]))


def test_infinities_as_in_pytorch_but_one(library):
    inf = math.inf
    x, t = torch.tensor([inf, inf, -inf, -inf, math.nan]), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    assert expected[3].isnan()
    expected[3] = inf
    torch.testing.assert_close(bce_with_logits(x, t, reduction="none"), expected, equal_nan=True)


def test_a_pos_weight_of_0(library):
    x, t = make((3, 40), target="hard")
    zero = torch.zeros(40)
    torch.testing.assert_close(bce_with_logits(x, t, pos_weight=zero), F.binary_cross_entropy_with_logits(x, t, pos_weight=zero))

"""The segmentation losses as PyTorch sees them: gradcheck, compile, export, transforms, autocast; and their errors."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from minkernels import bce_dice_loss, bce_with_logits, modules, sigmoid_focal_loss
from minkernels.segmentation._targets import check_targets
from segmentation_cases import REDUCTIONS, grad_of, losses, make


@losses
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(loss_of, reduction, library):
    x, t = make((2, 3, 4, 5), torch.float64)
    mask = torch.rand(x.shape) > 0.3
    assert torch.autograd.gradcheck(lambda x: loss_of(x, t, mask=mask, reduction=reduction), (x.requires_grad_(),))


@pytest.mark.parametrize("loss_of", [bce_with_logits, bce_dice_loss])
def test_a_hidden_gradient_of_the_target_is_refused(loss_of, library):
    x = torch.randn(5, 2, 3, 4)
    with pytest.raises(ValueError, match="target requires a gradient, and there is none for it"):
        torch.func.grad(lambda t: torch.vmap(loss_of)(x, t).sum())(x.sigmoid())


def test_masked_elements_have_no_gradient_whatever_comes_from_above(library):
    x, keep = torch.randn(2, 3, requires_grad=True), torch.tensor([True, False, True])
    loss = bce_with_logits(x, torch.zeros(2, 3), mask=keep)
    for _ in range(2):
        (dx,) = torch.autograd.grad(loss, x, torch.tensor(math.inf), retain_graph=True)
        assert (dx[:, 1] == 0).all() and dx[:, 0].isinf().all()


def test_buffers_broadcast_in_a_dynamic_graph(library):
    loss = modules.BCEWithLogitsLoss(weight=torch.rand(9), pos_weight=torch.rand(9))
    x, t = torch.randn(6, 9), torch.rand(6, 9)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, mask=torch.ones(9).bool()), loss(x, t))


def test_a_mask_of_dice_broadcasts(library):
    x, t, mask = torch.randn(3, 3, 4, 4), torch.rand(3, 3, 4, 4), torch.tensor([True, False, True]).view(3, 1, 1)
    torch.testing.assert_close(bce_dice_loss(x, t, mask=mask), bce_dice_loss(x[:, ::2], t[:, ::2]))


@losses
def test_loss_of_16_bit_logits_is_fp32(loss_of, library):
    x, t = make((2, 3, 4, 5), torch.bfloat16)
    assert loss_of(x, t).dtype == torch.float32


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_backward_changes_nothing_given_before(loss_of, dtype, library):
    x, t = make((2, 3, 4, 5), dtype)
    x = x.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()  # dense in another order
    loss = loss_of(x, t)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 3, x)
    torch.testing.assert_close(second, kept * 3, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-6)
    assert torch.equal(first, kept) and second.data_ptr() != first.data_ptr()


@pytest.mark.parametrize("upstream", ["expanded", "uneven"])
def test_upstream_gradients_of_none(upstream, library):
    x, t = make((6, 11))
    dloss = torch.ones(()).expand(6, 11) if upstream == "expanded" else torch.randn(12, 22)[::2, ::2]
    ours = grad_of(lambda x: bce_with_logits(x, t, reduction="none"), x, dloss)
    torch.testing.assert_close(ours, grad_of(lambda x: F.binary_cross_entropy_with_logits(x, t, reduction="none"), x, dloss))


@losses
def test_input_is_not_changed(loss_of, library):
    x, t = make((2, 3, 4, 5))
    before = x.clone(), t.clone()
    grad_of(lambda x: loss_of(x, t), x, torch.tensor(2.0))
    leaf = x.requires_grad_()
    loss_of(leaf, t).backward()
    assert torch.equal(x.detach(), before[0]) and torch.equal(t, before[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_registration(reduction, permuted, device):
    x, t = (v.to(device) for v in make((2, 3, 4, 5)))
    x = x.transpose(1, 3).contiguous().transpose(1, 3) if permuted else x
    weight, mask = torch.rand(5, device=device).expand(x.shape), torch.rand(4, 5, device=device).expand(x.shape) > 0.3
    ops, tensors = torch.ops.minkernels, (x, t, weight, None, mask)
    opcheck(ops.sigmoid_loss_fwd.default, (*tensors, 0.25, 2.0, reduction, reduction != "none"))
    loss, scale, _ = ops.sigmoid_loss_fwd(*tensors, 0.25, 2.0, reduction, False)
    opcheck(ops.sigmoid_loss_bwd.default, (torch.randn_like(loss), *tensors, scale, 0.25, 2.0))
    for per_image in (True, False):
        opcheck(ops.bce_dice_fwd.default, (x, t, None, mask, 1.0, 1.0, 1.0, False, per_image, reduction))
        factors = ops.bce_dice_fwd(x, t, None, mask, 1.0, 1.0, 1.0, False, per_image, reduction)[1]
        opcheck(ops.bce_dice_bwd.default, (x, t, None, mask, factors, False))


@losses
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(loss_of, backend, reduction, library):
    def step(x, t, mask):
        return (loss_of(x * 2, t, mask=mask, reduction=reduction) * 0.5).sum()

    torch.compiler.reset()  # past some recompiles of one function, fullgraph raises
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for N in (6, 9):
        (x, t), mask = make((N, 3, 11)), torch.rand(11) > 0.3
        ours = grad_of(lambda x: compiled(x, t, mask), x, torch.ones(()))  # noqa: B023
        torch.testing.assert_close(ours, grad_of(lambda x: step(x, t, mask), x, torch.ones(())))  # noqa: B023


@losses
def test_export(loss_of, library):
    class Model(torch.nn.Module):
        def forward(self, x, t):
            return loss_of(x * 2, t)

    x, t = make((4, 3, 11))
    batch = torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(Model(), (x, t), dynamic_shapes=[{0: batch}] * 2)
    x, t = make((7, 3, 11))
    torch.testing.assert_close(program.module()(x, t), loss_of(x * 2, t))


@losses
def test_functional_transforms(loss_of, library):
    x, t = make((4, 3, 9))
    torch.testing.assert_close(torch.func.grad(lambda x: loss_of(x, t))(x), grad_of(lambda x: loss_of(x, t), x, torch.ones(())))
    rows = torch.func.vmap(torch.func.grad(lambda x, t: loss_of(x[None], t[None])))(x, t)
    torch.testing.assert_close(rows[1], grad_of(lambda x: loss_of(x, t[1:2]), x[1:2], torch.ones(()))[0])
    each = torch.func.vmap(lambda x, t: loss_of(x[None], t[None]))(x, t)
    torch.testing.assert_close(each[2], loss_of(x[2:3], t[2:3]))


@losses
def test_autocast_changes_nothing(loss_of, library):
    x, t = make((4, 3, 9))
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(x, t)
    assert torch.equal(inside, loss_of(x, t))


@losses
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative_raises(loss_of, reduction, library):
    x, t = make((3, 2, 5))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(loss_of(x, t, reduction=reduction).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (dx.sum() + x.sum()).backward()


X, T = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
MAP = torch.zeros(2, 4, dtype=torch.int64)
BAD = {  # what every loss refuses
    "not a tensor": (dict(input=[1.0]), TypeError, "input must be a tensor, got list"),
    "dtype": (dict(input=X.int()), TypeError, "input must be float16, bfloat16, float32 or float64, got torch.int32"),
    "target not a tensor": (dict(target=None), TypeError, "target must be a tensor, got NoneType"),
    "target shape": (dict(target=T[:1]), ValueError, "target must have the shape of input, (2, 3, 4), got (1, 3, 4)"),
    "target dtype": (dict(target=T.cfloat()), TypeError, "target must be a float, bool, uint8, int32 or int64 tensor, got torch.complex64"),
    "target device": (dict(target=T.to("meta")), TypeError, "target is on meta, but input is on cpu"),
    "target grad": (dict(target=T.clone().requires_grad_()), ValueError, "target requires a gradient"),
    "sparse target": (dict(target=T.to_sparse()), TypeError, "target must be a dense tensor, got one of layout torch.sparse_coo"),
    "target value": (
        dict(target=torch.tensor([0, 1, 7, 9], dtype=torch.uint8).expand(2, 3, 4)),
        IndexError,
        "target[0, 0, 2] is 7: an integer target is 0 or 1 wherever it counts",
    ),
    "negative target": (dict(target=-T.int() - 1), IndexError, "target[0, 0, 0] is -1: an integer target is 0 or 1"),
    "mask dtype": (dict(mask=T), TypeError, "mask must be bool, got torch.float32"),
    "mask shape": (dict(mask=T[:, :2] > 0), ValueError, "mask must broadcast to input (2, 3, 4), got (2, 2, 4)"),
    "mask device": (dict(mask=T.bool().to("meta")), TypeError, "mask is on meta, but input is on cpu"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
}
BAD_OF = {
    "bce": {
        "weight dtype": (dict(weight=T.int()), TypeError, "weight must be float16, bfloat16, float32 or float64, got torch.int32"),
        "weight shape": (dict(weight=torch.ones(3)), ValueError, "weight must broadcast to input (2, 3, 4), got (3,)"),
        "weight rank": (dict(weight=torch.ones(1, 2, 3, 4)), ValueError, "weight must broadcast to input (2, 3, 4), got (1, 2, 3, 4)"),
        "weight grad": (dict(weight=torch.ones(4).requires_grad_()), ValueError, "weight requires a gradient"),
        "pos_weight": (dict(pos_weight=[1.0]), TypeError, "pos_weight must be a tensor, got list"),
    },
    "focal": {
        "alpha": (dict(alpha=1.5), ValueError, "alpha must be at most 1 (negative: no weighting), got 1.5"),
        "alpha type": (dict(alpha="a"), TypeError, "alpha must be a number, got 'a'"),
        "gamma": (dict(gamma=-1), ValueError, "gamma must be at least 0, got -1"),
        "gamma nan": (dict(gamma=math.nan), ValueError, "gamma must be finite, got nan"),
    },
    "dice": {
        "rank": (dict(input=X[0, 0]), ValueError, "input must be (N, C, *spatial), got shape (4,)"),
        "float map": (dict(target=MAP.float()), TypeError, "target of shape (2, 4) is a class map, which must be uint8, int32 or int64"),
        "map of one class": (dict(input=X[:, :1], target=MAP), ValueError, "but input has one class: give target[:, None]"),
        "class": (dict(target=MAP + torch.tensor([0, 3, 0, 4])), IndexError, "target[0, 1] is 3, out of range for 3 classes (0 to 2)"),
        "negative class": (dict(target=MAP - 1), IndexError, "target[0, 0] is -1, out of range for 3 classes (0 to 2)"),
        "per": (dict(per="class"), ValueError, "per must be image or batch, got 'class'"),
        "smooth": (dict(smooth=-1.0), ValueError, "smooth must be at least 0, got -1.0"),
        "squared": (dict(squared=1), TypeError, "squared must be a bool, got 1"),
        "bce_weight": (dict(bce_weight=math.inf), ValueError, "bce_weight must be finite, got inf"),
        "pos_weight": (dict(pos_weight=torch.ones(2)), ValueError, "pos_weight must be (C=3,), got (2,)"),
    },
}
FUNCTIONS = {"bce": bce_with_logits, "focal": sigmoid_focal_loss, "dice": bce_dice_loss}
BAD_CASES = [(name, *case) for name in FUNCTIONS for case in (*BAD.values(), *BAD_OF[name].values())]
BAD_IDS = [f"{name}-{case}" for name in FUNCTIONS for case in (*BAD, *BAD_OF[name])]


@pytest.mark.parametrize("name, change, error, message", BAD_CASES, ids=BAD_IDS)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(name, change, error, message, grad, library):
    good = dict(input=X.clone().requires_grad_(grad), target=T)
    FUNCTIONS[name](**good)
    with pytest.raises(error, match=re.escape(message)):
        FUNCTIONS[name](**good | change)


def test_a_bad_target_under_the_mask_is_none(library):
    t = torch.tensor([0, 1, 255], dtype=torch.uint8)
    loss = bce_with_logits(torch.zeros(3), t, mask=t != 255)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    pixels = torch.tensor([[0, 1, 255, 2]], dtype=torch.uint8)
    assert bce_dice_loss(torch.zeros(1, 3, 4), pixels, mask=pixels != 255).isfinite()
    with pytest.raises(IndexError, match="255"):  # one class of the pixel counts
        bce_dice_loss(torch.zeros(1, 3, 4), pixels, mask=torch.tensor([False, True, False]).view(1, 3, 1))


def test_modules(library):
    x, t = make((2, 3, 8, 9))
    mask, weight, pos_weight = torch.rand(8, 9) > 0.3, torch.rand(9), torch.rand(3, 1, 1)
    ours = modules.BCEWithLogitsLoss(weight, reduction="sum", pos_weight=pos_weight)
    theirs = torch.nn.BCEWithLogitsLoss(weight, reduction="sum", pos_weight=pos_weight)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x, t), theirs(x, t))
    assert torch.equal(ours(x, t, mask), bce_with_logits(x, t, weight, pos_weight=pos_weight, mask=mask, reduction="sum"))
    options = dict(bce_weight=0.5, dice_weight=2.0, smooth=0.1, squared=True, per="batch", pos_weight=torch.rand(3), reduction="none")
    assert torch.equal(modules.BCEDiceLoss(**options)(x, t, mask), bce_dice_loss(x, t, mask=mask, **options))
    options = dict(alpha=0.4, gamma=1.0, reduction="mean")
    assert torch.equal(modules.SigmoidFocalLoss(**options)(x, t, mask), sigmoid_focal_loss(x, t, mask=mask, **options))
    assert "reduction='sum'" in repr(ours) and "gamma=1.0" in repr(modules.SigmoidFocalLoss(**options))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("kind", ["none", "channel", "element"])
def test_a_target_that_names_no_class_is_the_one_that_the_reference_names(dtype, kind, library):
    torch.manual_seed(0)
    for _ in range(30):
        x, t = torch.randn(2, 3, 4, 5), torch.randint(0, 4, (2, 5, 4)).to(dtype).transpose(1, 2)
        t[torch.rand(t.shape) < 0.7] = 1
        mask = None if kind == "none" else torch.rand(2, 1 if kind == "channel" else 3, 4, 5) < 0.3
        try:
            check_targets(x, t, mask)
        except IndexError as expected:
            with pytest.raises(IndexError, match=f"^{re.escape(str(expected))}"):
                bce_dice_loss(x, t, mask=mask)
        else:
            bce_dice_loss(x, t, mask=mask)

"""The IoU family as PyTorch sees it: compile, export, transforms; and its errors."""

import math
import re

import pytest
import torch
from torch.library import opcheck

import minkernels
from boxes_cases import KINDS, PAIRWISE, REDUCTIONS, formats, kinds, make_boxes, pairwise
from minkernels import iou_loss, iou_match


@pytest.mark.parametrize("kind", KINDS[:3])  # alpha of ciou is a constant of the gradient, not of the value: see test_reference
@formats
def test_gradcheck(kind, fmt, library):
    a = make_boxes(2, 3, dtype=torch.float64, fmt=fmt) / 10
    b = a.flip(1) + 0.3 * torch.rand(2, 3, 4, dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    torch.autograd.gradcheck(lambda a, b: PAIRWISE[kind](a, b, fmt=fmt), (a, b))
    torch.autograd.gradcheck(lambda a, b: iou_loss(a, b, kind=kind, fmt=fmt, reduction="mean"), (a, b))


def test_second_derivatives_raise(library):
    a, b = make_boxes(4).requires_grad_(), make_boxes(4)
    for out in (minkernels.box_iou(a, b).sum(), iou_loss(a, b, reduction="sum")):
        (grad,) = torch.autograd.grad(out, a, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            grad.sum().backward()


def test_autocast_casts_nothing(library):
    a, b = make_boxes(6), make_boxes(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(minkernels.box_iou(a, b), pairwise(a, b, "iou")) and iou_loss(a, b).dtype == torch.float32


def test_inputs_are_not_changed(library):
    a, b = make_boxes(2, 40, fmt="cxcywh").requires_grad_(), make_boxes(2, 40, fmt="cxcywh").requires_grad_()
    before = a.detach().clone(), b.detach().clone()
    for kind in KINDS:
        (PAIRWISE[kind](a, b, fmt="cxcywh").sum() + iou_loss(a, b, kind=kind, fmt="cxcywh").sum()).backward()
    iou_match(a, b, fmt="cxcywh")
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_registration(library):
    a, b, kind = make_boxes(2, 5), make_boxes(2, 7), "ciou"
    ops = torch.ops.minkernels
    opcheck(ops.box_pairs_fwd.default, (a, b, kind, "xywh", 1e-7))
    opcheck(ops.box_pairs_fwd.default, (a[:1].expand(2, 5, 4), b.double().float(), kind, "xywh", 1e-7))
    for need in ((True, True), (True, False), (False, True)):
        opcheck(ops.box_pairs_bwd.default, (torch.randn(2, 5, 7), a, b, kind, "cxcywh", 1e-7, *need))
        opcheck(ops.iou_loss_bwd.default, (torch.randn(2, 5), a, a + 1, kind, "xyxy", 1e-7, *need))
    for reduction in REDUCTIONS:
        opcheck(ops.iou_loss_fwd.default, (a.bfloat16(), a.bfloat16() + 1, kind, "xyxy", 1e-7, reduction))
    opcheck(ops.iou_match.default, (a, b, "xyxy"))


def step(a, b):
    values = minkernels.box_iou(a, b), minkernels.complete_box_iou(a, b, fmt="cxcywh")
    return *values, iou_loss(a, b[..., : a.shape[-2], :], kind="giou", reduction="mean"), *iou_match(a, b)


def test_compile(library):
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (5, 9):
        a, b = make_boxes(2, n).requires_grad_(), make_boxes(2, n + 3).requires_grad_()
        actual, expected = compiled(a, b), step(a, b)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
        grads = [torch.autograd.grad(sum(t.sum() for t in out[:3]), (a, b)) for out in (actual, expected)]
        torch.testing.assert_close(grads[0], grads[1])


def test_export(library):
    class Model(torch.nn.Module):
        def forward(self, a, b):
            return step(a, b)

    a, b = make_boxes(2, 5), make_boxes(2, 8)
    n = torch.export.Dim("n", min=2, max=100)
    program = torch.export.export(Model(), (a, b), dynamic_shapes=({1: n}, {1: n + 3})).module()
    a, b = make_boxes(2, 20), make_boxes(2, 23)
    assert all(torch.equal(x, y) for x, y in zip(program(a, b), step(a, b), strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@kinds
def test_grad_and_vmap(kind, library):
    a, b = make_boxes(3, 5), make_boxes(3, 5)
    for function in (PAIRWISE[kind], lambda x, y: iou_loss(x, y, kind=kind)):
        assert torch.equal(torch.func.vmap(function)(a, b), function(a, b))
        grad = torch.func.vmap(torch.func.grad(lambda x, y: function(x, y).sum()))(a, b)  # noqa: B023
        leaf = a.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(function(leaf, b).sum(), leaf)[0])
    assert torch.equal(torch.func.vmap(iou_match, in_dims=(0, None))(a, b[0]).best_gt, iou_match(a, b[0]).best_gt)


# Bad input

GOOD = make_boxes(3), make_boxes(3)
BAD = {  # what replaces the first or second argument, or options
    "list": (dict(first=[1.0]), TypeError, "{0} must be a tensor, got list"),
    "bool": (dict(first=torch.ones(3, 4).bool()), TypeError, "{0} must be "),
    "complex": (dict(second=torch.ones(3, 4).cfloat()), TypeError, "{1} must be "),
    "width": (dict(first=torch.ones(3, 5)), ValueError, "{0} must be (..., "),
    "dtypes": (dict(second=GOOD[1].double()), TypeError, "{0} and {1} must have one dtype, got torch.float32 and torch.float64"),
    "devices": (dict(second=GOOD[1].to("meta")), TypeError, "{0} and {1} must be on one device, got cpu and meta"),
    "fmt": (dict(fmt="yxyx"), ValueError, "fmt must be one of xyxy, xywh, cxcywh, got 'yxyx'"),
}
PAIRWISE_BAD = {
    "rank": (dict(first=torch.ones(4)), ValueError, "{0} must be (..., number of boxes, 4), got (4,)"),
    "second": (dict(second=torch.ones(3, 3)), ValueError, "{1} must be (..., number of boxes, 4), got (3, 3)"),
    "leading": (
        dict(first=torch.ones(2, 3, 4), second=torch.ones(3, 3, 4)),
        ValueError,
        "the leading dimensions of {0} and {1} must broadcast, got (2, 3, 4) and (3, 3, 4)",
    ),
}
EPS_BAD = {
    "negative eps": (dict(eps=-1e-7), ValueError, "eps must be at least 0, got -1e-07"),
    "eps nan": (dict(eps=math.nan), ValueError, "eps must be finite, got nan"),
    "eps type": (dict(eps="a"), TypeError, "eps must be a number, got 'a'"),
}
LOSS_BAD = {
    "shapes": (dict(second=torch.ones(2, 4)), ValueError, "target must have the shape of input, (3, 4), got (2, 4)"),
    "scalar": (dict(first=torch.ones(()), second=torch.ones(())), ValueError, "input must be (..., 4), got ()"),
    "integers": (dict(first=torch.ones(3, 4).int()), TypeError, "input must be float16, bfloat16, float32 or float64, got torch.int32"),
    "kind": (dict(kind="eiou"), ValueError, "kind must be one of iou, giou, diou, ciou, got 'eiou'"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
}
FUNCTIONS = {  # the function, its names of the two, and which cases it has
    "box_iou": (minkernels.box_iou, ("boxes1", "boxes2"), BAD | PAIRWISE_BAD),
    "generalized_box_iou": (minkernels.generalized_box_iou, ("boxes1", "boxes2"), BAD | PAIRWISE_BAD),
    "distance_box_iou": (minkernels.distance_box_iou, ("boxes1", "boxes2"), BAD | PAIRWISE_BAD | EPS_BAD),
    "complete_box_iou": (minkernels.complete_box_iou, ("boxes1", "boxes2"), BAD | PAIRWISE_BAD | EPS_BAD),
    "iou_match": (iou_match, ("boxes", "gts"), BAD | PAIRWISE_BAD),
    "iou_loss": (iou_loss, ("input", "target"), BAD | LOSS_BAD | EPS_BAD),
}
BAD_CASES = {f"{name}-{case}": (f, names, *bad[case]) for name, (f, names, bad) in FUNCTIONS.items() for case in bad}


@pytest.mark.parametrize("function, names, change, error, message", BAD_CASES.values(), ids=BAD_CASES)
def test_bad_input(function, names, change, error, message, library):
    function(*GOOD)
    change = dict(change)
    first, second = change.pop("first", GOOD[0]), change.pop("second", GOOD[1])
    with pytest.raises(error, match=re.escape(message.format(*names))):
        function(first, second, **change)

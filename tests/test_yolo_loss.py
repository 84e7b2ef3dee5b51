"""yolo_loss: the reference and the C++ kernel against the paper's sums cell by cell in float64, and the public op's promises."""

import math
import re

import pytest
import torch
from torch.library import opcheck

from judge import assert_close
from minkernels import yolo_loss
from minkernels.yolo import reference
from yolo_cases import check_responsible, check_upstream, draw_targets, plain_loss

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
roads = pytest.mark.parametrize("road", ["reference", "kernel"])
REDUCTIONS = "none", "mean", "sum"


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def ops_of(road):
    ops = torch.ops.minkernels
    return (reference.loss_fwd, reference.loss_bwd) if road == "reference" else (ops.yolo_loss_fwd, ops.yolo_loss_bwd)


def make(N, K, B, C, dtype=torch.float32):
    boxes, classes = draw_targets(N, K, C)
    return torch.rand(N, K, K, 5 * B + C).to(dtype), boxes.to(wide(dtype)), classes


def ours(pred, *targets, **options):
    """Loss and gradient."""
    leaf = pred.detach().requires_grad_()
    loss = yolo_loss(leaf, *targets, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@roads
@dtypes
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (2, 1, 1, 1), (2, 3, 3, 17)], ids=str)
def test_is_the_paper(shape, dtype, road, library):
    (fwd, bwd), (N, _, B, _), weights = ops_of(road), shape, (3.0, 0.3)
    pred, boxes, classes = make(*shape, dtype)
    upstream = torch.randn(N, dtype=torch.float64)
    results = []
    for t in (torch.float64, wide(dtype)):
        leaf = pred.to(t).requires_grad_()
        losses = plain_loss(leaf, boxes, classes, B, *weights)
        results.append((losses.detach(), torch.autograd.grad(losses, leaf, upstream.to(t))[0]))
    (exact, exact_grad), (plain, plain_grad) = results
    loss = fwd(pred, boxes, classes, B, *weights, "none")
    grad = bwd(upstream.to(loss.dtype), pred, boxes, classes, B, *weights, "none")
    assert loss.dtype == wide(dtype) and grad.dtype == dtype
    assert_close(loss, plain, exact, wide(dtype))
    assert_close(grad, plain_grad.to(dtype), exact_grad, dtype, "gradient")
    for reduction, factor in (("mean", 1 / N), ("sum", 1)):
        assert_close(fwd(pred, boxes, classes, B, *weights, reduction), plain.sum() * factor, exact.sum() * factor, wide(dtype), reduction)
        grad = bwd(torch.tensor(-1.5, dtype=loss.dtype), pred, boxes, classes, B, *weights, reduction)
        each = bwd(torch.full((N,), -1.5 * factor, dtype=loss.dtype), pred, boxes, classes, B, *weights, "none")
        torch.testing.assert_close(grad, each, rtol=4 * torch.finfo(dtype).eps, atol=0)


@dtypes
def test_kernel_is_the_reference(dtype, library):
    """Over many cells and classes, some of which hold NaN and infinities; and the same bits for any number of threads."""
    pred, boxes, classes = make(90, 7, 2, 20, dtype)  # 4410 cells: several threads
    for value in (math.nan, math.inf, -math.inf):
        pred[:20][torch.rand(pred[:20].shape) < 0.003] = value
    args, expected, threads = (2, 5.0, 0.5, "none"), [], torch.get_num_threads()
    for fwd, bwd in map(ops_of, ("reference", "kernel")):
        loss = fwd(pred, boxes, classes, *args)
        expected.append((loss, bwd(torch.linspace(0.5, 1.5, 90, dtype=loss.dtype), pred, boxes, classes, *args)))
    for a, e in zip(expected[1], expected[0], strict=True):
        assert torch.equal(a.isnan(), e.isnan()) and 0 < e.isnan().sum() < e.numel() / 10 + 20
        eps, largest = torch.finfo(a.dtype).eps, e[e.isfinite()].abs().max().item()
        torch.testing.assert_close(a, e, rtol=64 * eps, atol=8 * eps * largest, equal_nan=True)  # sums, and square roots that cancel
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            loss = fwd(pred, boxes, classes, *args)
            grad = bwd(torch.linspace(0.5, 1.5, 90, dtype=loss.dtype), pred, boxes, classes, *args)
            assert torch.equal(loss.nan_to_num(), expected[1][0].nan_to_num())
            assert torch.equal(grad.nan_to_num(), expected[1][1].nan_to_num())
    finally:
        torch.set_num_threads(threads)


@roads
def test_the_responsible_box(road, library):
    check_responsible(*ops_of(road))


@roads
def test_upstream(road, library):
    check_upstream(*ops_of(road))


def test_sums_are_exact_beyond_float32(library):
    """2**25 + 1 in a float32 sum of squares would lose the 1 of each of many cells."""
    pred, boxes = torch.zeros(1, 20, 20, 6), torch.zeros(1, 20, 20, 4)
    pred[..., 4], pred[0, 0, 0, 4] = 1.0, 2.0**13
    loss = yolo_loss(pred, boxes, torch.full((1, 20, 20), -1), boxes_per_cell=1, noobj=1.0)
    assert loss == 2**26 + 400  # 399, rounded to float32


@roads
def test_cells_without_an_object_cost_their_confidences(road, library):
    fwd, bwd = ops_of(road)
    pred, classes = torch.full((2, 3, 3, 12), math.nan), torch.full((2, 3, 3), -1)
    pred[..., [4, 9]] = 2.0
    truth = torch.full((2, 3, 3, 4), math.inf)
    assert fwd(pred, truth, classes, 2, 5.0, 0.5, "none").tolist() == [0.5 * 4 * 18] * 2
    grad, expected = bwd(torch.ones(2), pred, truth, classes, 2, 5.0, 0.5, "none"), torch.zeros_like(pred)
    expected[..., [4, 9]] = 2.0
    assert torch.equal(grad, expected)


@dtypes
def test_layouts(dtype, library):
    """As a convolution gives it, in either memory format; slices; broadcast; int32."""
    pred, boxes, classes = make(3, 5, 2, 4, dtype)
    loss, grad = ours(pred, boxes, classes)
    channels_first = pred.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    sliced = torch.stack((pred, pred), -1)[..., 0]
    for p in (channels_first, sliced):
        for b, c in ((boxes, classes.int()), (boxes.mT.contiguous().mT, classes.mT.contiguous().mT)):
            same, its = ours(p, b, c)
            assert torch.equal(same, loss) and torch.equal(its, grad)
    assert ours(channels_first, boxes, classes)[1].stride() == channels_first.stride()
    one = ours(pred[:1].expand(pred.shape), boxes[:1].expand(boxes.shape), classes[:1].expand(classes.shape), reduction="none")[0]
    assert one.unique().numel() == 1


def test_empty(library):
    for shape in ((0, 3, 2, 2), (2, 0, 2, 2)):
        pred, boxes, classes = make(*shape)
        assert ours(pred, boxes, classes, reduction="none")[0].tolist() == [0.0] * shape[0]
        assert ours(pred, boxes, classes, reduction="sum")[0] == 0
        loss, grad = ours(pred, boxes, classes)
        assert loss.isnan() if shape[0] == 0 else loss == 0
        assert grad.shape == pred.shape


def test_registration(device):
    pred, boxes, classes = (t.to(device) for t in make(2, 3, 2, 3))
    for p in (pred, pred.bfloat16(), pred.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        for reduction in REDUCTIONS:
            opcheck(torch.ops.minkernels.yolo_loss_fwd.default, (p, boxes, classes, 2, 5.0, 0.5, reduction))
            dloss = torch.ones(2 if reduction == "none" else (), device=device)
            opcheck(torch.ops.minkernels.yolo_loss_bwd.default, (dloss, p, boxes, classes, 2, 5.0, 0.5, reduction))


def test_compile_and_export(library):
    def step(pred, boxes, classes):
        return yolo_loss(pred * 1.0, boxes, classes), yolo_loss(pred, boxes, classes, reduction="none")

    class Model(torch.nn.Module):
        forward = staticmethod(step)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    N = torch.export.Dim("N", min=2, max=100)
    program = torch.export.export(Model(), make(3, 4, 2, 3), dynamic_shapes=[{0: N}] * 3).module()
    for n in (4, 5):
        pred, boxes, classes = make(n, 4, 2, 3)
        pred.requires_grad_()
        expected, found = step(pred, boxes, classes), compiled(pred, boxes, classes)
        for a, b, c in zip(found, expected, program(pred.detach(), boxes, classes), strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)
        grads = [torch.autograd.grad(sum(t.sum() for t in out), pred)[0] for out in (found, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms(library):
    pred, boxes, classes = make(3, 4, 2, 3)
    loss, grad = ours(pred, boxes, classes, reduction="none")
    one = lambda p, b, c: yolo_loss(p[None], b[None], c[None])  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(pred, boxes, classes), loss)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(pred, boxes, classes), grad)


def test_second_derivatives_raise_and_autocast_casts_nothing(library):
    pred, boxes, classes = make(2, 3, 2, 3)
    before = pred.clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss = yolo_loss(pred.requires_grad_(), boxes, classes)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()
    assert torch.equal(pred, before)


@roads
@pytest.mark.parametrize("value, at", [(4, (0, 2, 1)), (-2, (1, 0, 2))])  # 4: there are four, from 0 on
def test_classes_out_of_range(value, at, road, library):
    pred, boxes, classes = make(2, 3, 2, 4)
    classes[at] = value
    classes[1, 2, 2] = 99  # the first one is told
    message = f"classes{list(at)} is {value}, out of range for 4 classes (0 to 3, or -1 for a cell without an object)"
    with pytest.raises(IndexError, match=re.escape(message)):
        ops_of(road)[0](pred, boxes, classes, 2, 5.0, 0.5, "mean")


GOOD = make(2, 3, 2, 4)
BAD = {
    "not a tensor": (dict(pred=[1.0]), TypeError, "pred must be a tensor, got list"),
    "dtype": (dict(pred=GOOD[0].int()), TypeError, "pred must be float16, bfloat16, float32 or float64, got torch.int32"),
    "rank": (dict(pred=GOOD[0][0]), ValueError, "pred must be (N, K, K, 5 * boxes_per_cell + C), the last at least 11, got (3, 3, 14)"),
    "grid": (dict(pred=GOOD[0][:, :2]), ValueError, "got (2, 2, 3, 14)"),
    "no class": (dict(pred=GOOD[0][..., :10]), ValueError, "the last at least 11, got (2, 3, 3, 10)"),
    "boxes": (dict(boxes=GOOD[1][..., :3]), ValueError, "boxes must be (2, 3, 3, 4), as pred (2, 3, 3, 14) has cells, got (2, 3, 3, 3)"),
    "boxes dtype": (dict(boxes=GOOD[1].int()), TypeError, "boxes must be float16, bfloat16, float32 or float64, got torch.int32"),
    "boxes grad": (dict(boxes=GOOD[1].clone().requires_grad_()), ValueError, "boxes requires a gradient, and there is none for it"),
    "boxes device": (dict(boxes=GOOD[1].to("meta")), TypeError, "boxes is on meta, but pred is on cpu"),
    "classes": (dict(classes=GOOD[2][:1]), ValueError, "classes must be (2, 3, 3), as pred (2, 3, 3, 14) has cells, got (1, 3, 3)"),
    "classes dtype": (dict(classes=GOOD[2].float()), TypeError, "classes must be int32 or int64, got torch.float32"),
    "classes type": (dict(classes=None), TypeError, "classes must be a tensor, got NoneType"),
    "boxes_per_cell": (dict(boxes_per_cell=0), ValueError, "boxes_per_cell must be at least 1, got 0"),
    "boxes_per_cell type": (dict(boxes_per_cell=2.0), TypeError, "boxes_per_cell must be an int, got 2.0"),
    "coord": (dict(coord=-1.0), ValueError, "coord must be at least 0 and a float32, got -1.0"),
    "coord too large": (dict(coord=10**400), ValueError, "coord must fit a float, got an int of 1329 bits"),
    "noobj": (dict(noobj=math.nan), ValueError, "noobj must be finite, got nan"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message, library):
    good = dict(zip(("pred", "boxes", "classes"), GOOD, strict=True))
    yolo_loss(**good)
    with pytest.raises(error, match=re.escape(message)):
        yolo_loss(**good | change)

"""The IoU family: the reference against torchvision's formulas, the C++ kernels at every level, the public functions' promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minkernels
from boxes_cases import DTYPES, FORMATS, KINDS, LAYOUTS, REDUCTIONS, grads_of, lay_out, loss, make_boxes, pairwise
from judge import assert_close
from minkernels import iou_loss, iou_match
from minkernels.boxes import reference

PAIRWISE = {
    "iou": minkernels.box_iou,
    "giou": minkernels.generalized_box_iou,
    "diou": minkernels.distance_box_iou,
    "ciou": minkernels.complete_box_iou,
}
SHAPES = {  # leading dimensions, N, M: the C++ kernel takes rows by twos, columns by registers of 2 to 16 and blocks of 1024
    "one": ((), 1, 1),
    "ragged": ((), 5, 37),
    "block-and-one": ((), 3, 1025),
    "batch": ((2, 3), 33, 20),
    "parts": ((), 1100, 70),  # of rows: the backward sums 17 parts of 64 in 16 or fewer
    "column-parts": ((), 2, 17 * 1024),
}
SMALL = {name: SHAPES[name] for name in ("one", "ragged", "batch")}
MATCHES = {  # leading dimensions, N, G: boxes go in parts of 2048, blocks of 512 and registers; ground truths by 64
    "one": ((), 1, 1),
    "ragged": ((2,), 533, 65),
    "two-parts": ((), 2049, 7),
    "more-gts": ((3,), 5, 300),
}
kinds = pytest.mark.parametrize("kind", KINDS)
formats = pytest.mark.parametrize("fmt", FORMATS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def same(a, b):
    """Equal, NaN included."""
    return torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)))


def check_pairs(levels, a, b, kind, fmt, draws=1):
    """Values and both gradients of the C++ kernels, float32 or float64."""
    from minkernels.boxes import _cpu

    dtype, eps = a.dtype, 1e-7
    exact, plain = pairwise(a.double(), b.double(), kind, fmt, eps), pairwise(a, b, kind, fmt, eps)
    dout = torch.randn(exact.shape, dtype=dtype)
    exact_grads = grads_of(lambda a, b: pairwise(a, b, kind, fmt, eps), (a.double(), b.double()), dout.double())
    plain_grads = grads_of(lambda a, b: pairwise(a, b, kind, fmt, eps), (a, b), dout)
    for level in levels:
        out = _cpu.pairs_fwd(a, b, kind, fmt, eps)
        assert out.is_contiguous()
        assert_close(out, plain, exact, dtype, f"{level} {kind}", draws=draws, size=1.0)
        if kind == "iou":
            assert torch.equal(out, plain), level
        grads = _cpu.pairs_bwd(dout, a, b, kind, fmt, eps, True, True)
        for i in range(2):
            assert_close(grads[i], plain_grads[i], exact_grads[i], dtype, f"{level} gradient {i + 1}", draws=draws)


def check_loss(levels, a, b, kind, fmt, reduction, draws=1):
    from minkernels.boxes import _cpu

    dtype, eps = a.dtype, 1e-7

    def formula(a, b):
        return loss(a, b, kind, fmt, reduction, eps)

    exact, plain = formula(a.double(), b.double()), formula(a.to(wide(dtype)), b.to(wide(dtype)))
    dloss = torch.randn(a.shape[:-1], dtype=wide(dtype))

    def each(a, b):
        return loss(a, b, kind, fmt, "none", eps)

    exact_grads = grads_of(each, (a.double(), b.double()), dloss.double())
    plain_grads = grads_of(each, (a.to(wide(dtype)), b.to(wide(dtype))), dloss)
    for level in levels:
        actual = _cpu.loss_fwd(a, b, kind, fmt, eps, reduction)
        assert_close(actual, plain, exact, wide(dtype), f"{level} {kind}", draws=draws, size=1.0)
        grads = _cpu.loss_bwd(dloss, a, b, kind, fmt, eps, True, True)
        for i in range(2):
            assert grads[i].dtype == dtype
            assert_close(grads[i], plain_grads[i].to(dtype), exact_grads[i], dtype, f"{level} gradient {i + 1}", draws=draws)


# The reference is torchvision's formula


@kinds
@formats
@pytest.mark.parametrize("grid", [None, 4.0], ids=["random", "grid"])
def test_reference(kind, fmt, grid):
    """On the grid edges meet, and boxes are equal: the gradient of a maximum is halved, and clamp(0) hands it on."""
    a, b = make_boxes(2, 60, dtype=torch.float64, fmt=fmt, grid=grid), make_boxes(2, 50, dtype=torch.float64, fmt=fmt, grid=grid)
    eps = 1e-3
    torch.testing.assert_close(reference.pairs_fwd(a, b, kind, fmt, eps), pairwise(a, b, kind, fmt, eps), rtol=1e-12, atol=1e-14)
    dout = torch.randn(2, 60, 50, dtype=torch.float64)
    expected = grads_of(lambda a, b: pairwise(a, b, kind, fmt, eps), (a, b), dout)
    actual = reference.pairs_bwd(dout, a, b, kind, fmt, eps, True, True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    b = b[:, :1].expand_as(a)
    dloss = torch.randn(2, 60, dtype=torch.float64)
    expected = grads_of(lambda a, b: loss(a, b, kind, fmt, "none", eps), (a, b), dloss)
    torch.testing.assert_close(reference.loss_bwd(dloss, a, b, kind, fmt, eps, True, True), expected, rtol=1e-10, atol=1e-13)
    for reduction in REDUCTIONS:
        torch.testing.assert_close(reference.loss_fwd(a, b, kind, fmt, eps, reduction), loss(a, b, kind, fmt, reduction, eps))


def test_reference_match():
    a, b = make_boxes(3, 40, grid=8.0), make_boxes(3, 30, grid=8.0)
    iou = pairwise(a, b, "iou")
    best, at, gt_best, gt_at = reference.match(a, b, "xyxy")
    assert torch.equal(best, iou.amax(-1)) and torch.equal(gt_best, iou.amax(-2))
    for values, top, index in ((iou, best, at), (iou.mT, gt_best, gt_at)):
        first = (values == top[..., None]).int().argmax(-1)
        assert torch.equal(index, first)


# The kernels are the reference


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@kinds
def test_cpu_pairs(shape, kind, levels):
    lead, N, M = shape
    check_pairs(levels, make_boxes(*lead, N), make_boxes(*lead, M), kind, "xyxy")


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
@kinds
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpu_pairs_formats(shape, kind, fmt, dtype, levels):
    lead, N, M = shape
    check_pairs(levels, make_boxes(*lead, N, dtype=dtype, fmt=fmt), make_boxes(*lead, M, dtype=dtype, fmt=fmt), kind, fmt)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    sets=st.integers(1, 3), N=st.integers(1, 130), M=st.integers(1, 130), kind=st.sampled_from(KINDS), fmt=st.sampled_from(FORMATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), double=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_pairs_fuzz(library, sets, N, M, kind, fmt, layouts, double, seed):
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    a, b = (lay_out(make_boxes(sets, n, dtype=dtype, fmt=fmt), layout) for n, layout in zip((N, M), layouts, strict=True))
    check_pairs(["best"], a, b, kind, fmt, draws=2)


@pytest.mark.parametrize("P", [1, 5, 512, 513, 4097])
@kinds
@dtypes
def test_cpu_loss(P, kind, dtype, levels):
    """The C++ kernel works on blocks of 512 pairs, tasks of 4096."""
    a = make_boxes(P)
    check_loss(levels, a.to(dtype), (a + 0.2 * torch.randn(P, 4)).to(dtype), kind, "xyxy", "sum")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), kind=st.sampled_from(KINDS), fmt=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_loss_fuzz(library, shape, kind, fmt, dtype, reduction, layouts, seed):
    torch.manual_seed(seed)
    a, b = (lay_out(make_boxes(*shape, dtype=dtype, fmt=fmt), layout) for layout in layouts)
    check_loss(["best"], a, b, kind, fmt, reduction, draws=2)


@pytest.mark.parametrize("shape", MATCHES.values(), ids=MATCHES)
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpu_match(shape, fmt, dtype, levels):
    from minkernels.boxes import _cpu

    lead, N, G = shape
    a, b = make_boxes(*lead, N, dtype=dtype, fmt=fmt, grid=4.0), make_boxes(*lead, G, dtype=dtype, fmt=fmt, grid=4.0)
    expected = reference.match(a, b, fmt)
    for level in levels:
        assert all(torch.equal(x, y) for x, y in zip(_cpu.match(a, b, fmt), expected, strict=True)), level


STRANGE = [0.0, 1.0, 2.0, -1.0, 3.0, math.inf, -math.inf, math.nan, 1e20, 1e-30]


@pytest.mark.parametrize("pick", [5, 7, len(STRANGE)], ids=["inverted", "infinite", "all"])
def test_strange_boxes(pick, levels):
    """Every level gives the reference's IoU, NaN where it has NaN, and its matches."""
    from minkernels.boxes import _cpu

    a, b = (torch.tensor(STRANGE[:pick])[torch.randint(pick, (n, 4))] for n in (700, 300))
    for level in levels:
        for x, y in ((a, b), (a.double(), b.double())):
            assert same(_cpu.pairs_fwd(x, y, "iou", "xyxy", 0.0), reference.pairs_fwd(x, y, "iou", "xyxy", 0.0)), level
            expected = reference.match(x, y, "xyxy")
            assert all(same(p, q) for p, q in zip(_cpu.match(x, y, "xyxy"), expected, strict=True)), level


def test_bits_of_the_iou(levels):
    """Those of torchvision's formula at every level; one contracted product would change some of these pairs, and is seen here."""
    a, b = make_boxes(1000), make_boxes(1000)
    expected = pairwise(a, b, "iou")
    for level in levels:
        assert torch.equal(minkernels.box_iou(a, b), expected), level
    w, h = (a[:, None, 2:] - a[:, None, :2]).double().unbind(-1)
    wh = (torch.min(a[:, None, 2:], b[:, 2:]) - torch.max(a[:, None, :2], b[:, :2])).clamp(min=0)
    inter, area_b = wh[..., 0] * wh[..., 1], ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]))
    contracted = inter / ((w * h + area_b).float() - inter)  # fma(w, h, area_b)
    assert 0.01 < (contracted != expected).float().mean() < 0.2


@kinds
@dtypes
def test_cpu_same_bits_for_any_number_of_threads(kind, dtype, library):
    a, b = make_boxes(3, 300, dtype=dtype), make_boxes(3, 2100, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            out = PAIRWISE[kind](x, y)
            pairs = iou_loss(x.repeat(1, 7, 1), y, kind=kind, reduction="sum")
            results.append((out, pairs, *torch.autograd.grad(out.square().sum() + pairs, (x, y)), *iou_match(y, x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))

"""The IoU family: the reference against torchvision's formulas, the C++ kernels at every level, the public functions' promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minkernels
from bench import timing
from boxes_cases import DTYPES, FORMATS, KINDS, LAYOUTS, PAIRWISE, REDUCTIONS, formats, grads_of, kinds, lay_out, loss, make_boxes, pairwise
from judge import assert_close
from minkernels import iou_loss, iou_match
from minkernels.boxes import reference

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


def test_sums_of_losses_are_wide_inside(levels):
    """One loss of 5e8 among small ones, which a float32 sum loses."""
    b = torch.tensor([5.0, 5, 6, 6]).repeat(511, 1)
    a, b = torch.cat((torch.tensor([[0, 0, 1e-7, 1]]), b)), torch.cat((torch.tensor([[50.0, 0, -50, 1]]), b + 0.5))
    for _ in levels:
        each = iou_loss(a, b, kind="giou", reduction="none")
        assert iou_loss(a, b, kind="giou", reduction="sum") == each.double().sum().float()


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


# Semantics


def box(*numbers, dtype=torch.float32):
    return torch.tensor([numbers], dtype=dtype)


@kinds
def test_points_give_0_and_no_nan(kind, library):
    """torchvision gives 0 / 0 = NaN for two boxes of area 0, and so do its gradients."""
    points, good = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [5, 5, 9, 5], [5, 7, 5, 9]]), make_boxes(3)
    a, b = torch.cat([points, good]).requires_grad_(), points.clone().requires_grad_()
    out = PAIRWISE[kind](a, b)
    assert out.isfinite().all() and (kind != "iou" or (out == 0).all())
    pairs = iou_loss(a[:4], b, kind=kind, eps=0.0)
    assert pairs.isfinite().all() and (kind != "iou" or (pairs == 1).all())
    for grad in torch.autograd.grad(out.sum() + pairs.sum(), (a, b)):
        assert grad.isfinite().all()
    assert out[0, 1] == 0  # a point on itself: every quotient is 0 / 0


@kinds
@pytest.mark.parametrize("where", range(4))
def test_a_nan_stays_in_its_pairs(kind, where, library):
    a, b = make_boxes(40), make_boxes(50)
    expected = PAIRWISE[kind](a, b)
    dirty, other = a.clone(), b.clone()
    dirty[7, where], other[33, where] = math.nan, math.nan
    out = PAIRWISE[kind](dirty, other)
    hit = torch.zeros(40, 50, dtype=torch.bool)
    hit[7], hit[:, 33] = True, True
    assert out[hit].isnan().all() and torch.equal(out[~hit], expected[~hit])
    pairs = iou_loss(dirty, b[:40], kind=kind)
    assert pairs[7].isnan() and torch.equal(pairs.isnan().nonzero(), torch.tensor([[7]]))
    dirty.requires_grad_(), other.requires_grad_()
    grads = torch.autograd.grad(PAIRWISE[kind](dirty, other).masked_fill(hit, 0.0).sum(), (dirty, other))
    assert all(grad.isfinite().all() for grad in grads), "an upstream gradient of 0 stops a NaN"
    assert (grads[0][7] == 0).all() and (grads[1][33] == 0).all()
    (grad,) = torch.autograd.grad(iou_loss(dirty, b[:40], kind=kind).sum(), dirty)
    assert grad[7].isnan().all() and grad[:7].isfinite().all() and grad[8:].isfinite().all()


def test_inverted_boxes(library):
    """They intersect nothing; their signed area counts, as in torchvision."""
    good, flipped, twice = box(0.0, 0, 4, 4), box(3.0, 1, 1, 3), box(3.0, 3, 1, 1)
    for a, b in ((good, flipped), (flipped, flipped), (good, twice), (twice, twice)):
        assert minkernels.box_iou(a, b) == 0
        torch.testing.assert_close(minkernels.generalized_box_iou(a, b), pairwise(a, b, "giou"))
    torch.testing.assert_close(minkernels.generalized_box_iou(good, flipped), torch.tensor([[(12.0 - 16) / 16]]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_boxes(reduction, library):
    none, some = torch.zeros(2, 0, 4, requires_grad=True), make_boxes(2, 3).requires_grad_()
    for function in PAIRWISE.values():
        for a, b in ((none, some), (some, none), (none, none), (none[:0], some[:0])):
            out = function(a, b)
            assert out.shape == (*a.shape[:-1], b.shape[-2])
            assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), (a, b)))
    value = iou_loss(none, none, kind="ciou", reduction=reduction)
    assert value.shape == ((2, 0) if reduction == "none" else ()) and (value == 0).all()
    assert torch.autograd.grad(value.sum(), none)[0].shape == none.shape


def test_a_match_of_nothing(library):
    boxes, none = make_boxes(2, 3), torch.zeros(2, 0, 4)
    best_iou, best_gt, gt_best_iou, gt_best_box = iou_match(boxes, none)
    assert torch.equal(best_iou, torch.zeros(2, 3)) and torch.equal(best_gt, torch.full((2, 3), -1))
    assert gt_best_iou.shape == gt_best_box.shape == (2, 0)
    found = iou_match(none, boxes)
    assert torch.equal(found.gt_best_iou, torch.zeros(2, 3)) and torch.equal(found.gt_best_box, torch.full((2, 3), -1))
    nan = torch.full((2, 3, 4), math.nan)
    for found in (iou_match(nan, boxes), iou_match(boxes, nan), iou_match(boxes[:0], nan[:0])):
        assert all((values == 0).all() for values in found[::2]) and all((indices == -1).all() for indices in found[1::2])
    apart = iou_match(box(0.0, 0, 1, 1), torch.cat([box(5.0, 5, 6, 6), box(7.0, 7, 8, 8)]))
    assert apart.best_gt == 0 and (apart.gt_best_box == 0).all(), "an IoU of 0 is a match, as in argmax"


def test_match_has_no_gradient(library):
    found = iou_match(make_boxes(5).requires_grad_(), make_boxes(3).requires_grad_())
    assert not found.best_iou.requires_grad and not found.gt_best_iou.requires_grad


@kinds
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_widened(kind, dtype, library):
    a, b = make_boxes(20, grid=2.0).to(dtype), make_boxes(30, grid=2.0).to(dtype)
    a[:, 2:], b[:, 2:] = a[:, 2:].clamp(max=120), b[:, 2:].clamp(max=120)
    out = PAIRWISE[kind](a, b)
    assert out.dtype == torch.float32 and torch.equal(out, PAIRWISE[kind](a.float(), b.float()))
    assert all(torch.equal(x, y) for x, y in zip(iou_match(a, b), iou_match(a.float(), b.float()), strict=True))
    if dtype.is_floating_point:
        leaf = a.clone().requires_grad_()
        (grad,) = torch.autograd.grad(PAIRWISE[kind](leaf, b).sum(), leaf)
        wide_leaf = a.float().requires_grad_()
        assert torch.equal(grad, torch.autograd.grad(PAIRWISE[kind](wide_leaf, b.float()).sum(), wide_leaf)[0].to(dtype))


@kinds
def test_leading_dimensions_broadcast(kind, library):
    a, b = make_boxes(2, 1, 5).requires_grad_(), make_boxes(3, 7).requires_grad_()
    out = PAIRWISE[kind](a, b)
    torch.testing.assert_close(out, pairwise(a, b, kind))
    dout = torch.randn(2, 3, 5, 7)
    expected = grads_of(lambda a, b: pairwise(a, b, kind), (a, b), dout)
    torch.testing.assert_close(torch.autograd.grad(out, (a, b), dout), expected, rtol=1e-4, atol=1e-5)
    assert iou_match(a, b).best_gt.shape == (2, 3, 5) and iou_match(a, b).gt_best_box.shape == (2, 3, 7)


@kinds
@pytest.mark.parametrize("upstream", ["ones", "column", "row", "transposed", "few"])
def test_upstream_gradients_of_any_layout(kind, upstream, library):
    a, b = make_boxes(33).requires_grad_(), make_boxes(50).requires_grad_()
    dout = {
        "ones": torch.ones(()).expand(33, 50),
        "column": torch.randn(33, 1).expand(33, 50),
        "row": torch.randn(50).expand(33, 50),
        "transposed": torch.randn(50, 33).mT,
        "few": torch.randn(33, 50) * (torch.rand(33, 50) > 0.95),
    }[upstream]
    actual = torch.autograd.grad(PAIRWISE[kind](a, b), (a, b), dout)
    exact = grads_of(lambda a, b: pairwise(a, b, kind), (a.double(), b.double()), dout.double())
    plain = grads_of(lambda a, b: pairwise(a, b, kind), (a, b), dout)
    for i in range(2):
        assert_close(actual[i], plain[i], exact[i], torch.float32, draws=2)


@kinds
def test_one_side_alone(kind, library):
    a, b = make_boxes(30).requires_grad_(), make_boxes(30).requires_grad_()
    for function in (PAIRWISE[kind], lambda x, y: iou_loss(x, y, kind=kind)):
        both = torch.autograd.grad(function(a, b).sum(), (a, b))
        assert torch.equal(torch.autograd.grad(function(a, b.detach()).sum(), a)[0], both[0])
        assert torch.equal(torch.autograd.grad(function(a.detach(), b).sum(), b)[0], both[1])


def test_eps(library):
    """In the pairwise functions eps is of the diagonal and of alpha; in the losses of every denominator."""
    a, b = make_boxes(6), make_boxes(6)
    for kind in ("diou", "ciou"):
        torch.testing.assert_close(PAIRWISE[kind](a, b, eps=50.0), pairwise(a, b, kind, eps=50.0))
    for kind in KINDS:
        torch.testing.assert_close(iou_loss(a, b, kind=kind, eps=50.0), loss(a, b, kind, eps=50.0))


@pytest.mark.parametrize("function", [minkernels.box_iou, iou_match])
def test_memory(function, library):
    """box_iou takes its result, 16 MB, where the plain formula takes nine times that; iou_match no matrix at all."""
    a, b = make_boxes(4000), make_boxes(1000)
    peak = timing.measure({"x": lambda: function(a, b)}, lambda _: 0.0, "cpu", min_rounds=1, max_time=0)["x"].peak_bytes
    if peak is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert peak < (20 << 20 if function is minkernels.box_iou else 4 << 20)

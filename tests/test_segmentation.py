"""BCE, focal and Dice losses: the reference against PyTorch, the C++ kernels against fp64 at every level, the public ops' promises."""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from judge import assert_close
from minkernels import bce_dice_loss, bce_with_logits, modules, sigmoid_focal_loss
from minkernels.segmentation import reference
from segmentation_cases import (
    DTYPES,
    LAYOUTS,
    REDUCTIONS,
    TARGETS,
    bce_dice,
    grad_of,
    image_shapes,
    lay_out,
    make_target,
    pointwise,
    shapes,
)

SHAPES = {  # the C++ kernel works on blocks of 1024 elements, registers of 4 to 16, tasks of 16384; rows as long as the layout allows
    "scalar": (),
    "one": (1,),
    "ragged": (5, 31),
    "one-block": (1024,),
    "block-and-one": (1025,),
    "two-tasks": (16385,),
    "image": (2, 3, 40, 50),
}
IMAGES = {  # (N, C, *spatial); Dice: a piece is 16384 pixels of one image in every channel
    "no-pixels": (5, 3),  # pieces go in groups
    "one-class": (2, 1, 33, 31),
    "classes": (2, 5, 40, 50),
    "two-pieces": (1, 2, 16385),
    "volume": (2, 2, 3, 5, 7),
}
GAMMAS = [0.0, 1.0, 2.0, 1.5]  # each a kernel of its own


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def make(shape, dtype=torch.float32, target="float"):
    return (3 * torch.randn(shape)).to(dtype), make_target(target, shape)


def spoil(t, mask):
    """t with something that no kernel may look at where the mask is False."""
    return t if mask is None else t.masked_fill(~mask, math.nan if t.is_floating_point() else 77 if t.dtype != torch.bool else True)


def check_pointwise(levels, x, t, weight, pos_weight, mask, alpha, gamma, reduction, draws=1):
    """The C++ kernels' loss and both gradients, the early one and the recomputed one, against fp64."""
    from minkernels.segmentation import _cpu

    dtype, options = x.dtype, dict(mask=mask, alpha=alpha, gamma=gamma, reduction=reduction)
    dloss = torch.rand(x.shape if reduction == "none" else ()).to(wide(dtype)) - 0.3
    clean_x, clean_t = (v if mask is None else v.masked_fill(~mask, 0) for v in (x, t))

    def formula(as_dtype):
        weights = [None if w is None else w.to(as_dtype) for w in (weight, pos_weight)]
        return lambda x: pointwise(x, clean_t.to(as_dtype), *weights, **options)

    exact, plain = formula(torch.float64)(clean_x.double()), formula(wide(dtype))(clean_x.to(wide(dtype)))
    upstreams = {"recomputed grad": dloss} if reduction == "none" else {"early grad": torch.ones_like(dloss), "recomputed grad": dloss}
    args = *(None if w is None else w.expand(x.shape) for w in (weight, pos_weight, mask)), alpha, gamma
    tensors = spoil(x, mask), spoil(t, mask), *args[:3]
    for level in levels:
        loss, scale, early = _cpu.sigmoid_loss_fwd(*tensors, alpha, gamma, reduction, reduction != "none")
        assert_close(loss, plain, exact, wide(dtype), f"{level} loss", draws=draws)
        for what, upstream in upstreams.items():
            grad = early if what == "early grad" else _cpu.sigmoid_loss_bwd(upstream, *tensors, scale, alpha, gamma)
            exact_grad = grad_of(formula(torch.float64), clean_x.double(), upstream.double())
            plain_grad = grad_of(formula(dtype), clean_x, upstream.to(dtype))
            assert_close(grad, plain_grad, exact_grad, dtype, f"{level} {what}", draws=draws)
            assert grad.stride() == torch.empty_like(tensors[0]).stride()


def check_dice(levels, x, t, mask, options, draws=1):
    from minkernels.segmentation import _cpu

    dtype, classes = x.dtype, x.shape[1]
    spread = None if mask is None else mask.expand(x.shape)
    dense = t if t.dim() == x.dim() else F.one_hot(t.long(), classes).movedim(-1, 1)
    clean_x, clean_t = (v if mask is None else v.masked_fill(~spread, 0) for v in (x, dense))
    pos_weight, *numbers, squared, per_image, reduction = options

    def formula(as_dtype):
        weights = None if pos_weight is None else pos_weight.to(as_dtype)
        return lambda x: bce_dice(x, clean_t.to(as_dtype), weights, spread, *numbers, squared, per_image, reduction)

    exact, plain = formula(torch.float64)(clean_x.double()), formula(wide(dtype))(clean_x.to(wide(dtype)))
    dloss = torch.rand(exact.shape).to(wide(dtype)) - 0.3
    exact_grad = grad_of(formula(torch.float64), clean_x.double(), dloss.double())
    plain_grad = grad_of(formula(dtype), clean_x, dloss.to(dtype))
    hidden = spread if t.dim() == x.dim() or spread is None else spread.any(1)
    tensors = spoil(x, spread), spoil(t, hidden), pos_weight, spread
    for level in levels:
        loss, factors = _cpu.bce_dice_fwd(*tensors, *numbers, squared, per_image, reduction)
        assert_close(loss, plain, exact, wide(dtype), f"{level} loss", draws=draws)
        grad = _cpu.bce_dice_bwd(*tensors, factors * dloss[..., None], squared)
        assert_close(grad, plain_grad, exact_grad, dtype, f"{level} grad", draws=draws)
        assert grad.stride() == torch.empty_like(tensors[0]).stride()


# The reference is PyTorch's formula


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma, alpha", [(0.0, -1.0), (0.0, 0.3), (1.0, 0.25), (2.0, -1.0), (1.5, 0.25)])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_reference(shape, reduction, gamma, alpha, masked):
    x, t = make(shape, torch.float64)
    weights = [torch.rand(shape[-1:]).double().expand(shape) for _ in range(2)] if gamma == 0 else [None, None]
    mask = torch.rand(shape) > 0.3 if masked and shape != () else None
    args = t.double(), *weights, mask, alpha, gamma
    loss, scale, early = reference.sigmoid_loss_fwd(x, *args, reduction, True)
    torch.testing.assert_close(loss, pointwise(x, *args, reduction))
    dloss = torch.randn(loss.shape, dtype=torch.float64)
    recomputed = reference.sigmoid_loss_bwd(dloss, x, *args[:4], scale, alpha, gamma)
    for grad, upstream in ((early, torch.ones_like(loss)), (recomputed, dloss)):
        torch.testing.assert_close(grad, grad_of(lambda x: pointwise(x, *args, reduction), x, upstream))


@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_image", [True, False], ids=["image", "batch"])
@pytest.mark.parametrize("squared", [False, True], ids=["sums", "squares"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_reference_dice(shape, reduction, per_image, squared, masked):
    x, t = make(shape, torch.float64)
    mask = torch.rand(shape) > 0.3 if masked else None
    args = t.double(), torch.rand(shape[1]).double(), mask
    options = 0.7, 1.3, 0.5, squared, per_image, reduction
    loss, factors = reference.bce_dice_fwd(x, *args, *options)
    torch.testing.assert_close(loss, bce_dice(x, *args, *options))
    dloss = torch.randn(loss.shape, dtype=torch.float64)
    grad = reference.bce_dice_bwd(x, *args, factors * dloss[..., None], squared)
    torch.testing.assert_close(grad, grad_of(lambda x: bce_dice(x, *args, *options), x, dloss))


# The kernels are the reference


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(shape, gamma, dtype, levels):
    x, t = make(shape, dtype)
    check_pointwise(levels, x, t, None, None, None, 0.25 if gamma else -1.0, gamma, "mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_cpu_options(reduction, target, masked, gamma, levels):
    shape = (3, 4, 7, 50)
    x, t = make(shape, torch.float32, target)
    weights = [torch.rand(50), torch.rand(4, 1, 1)] if gamma == 0 else [None, None]
    mask = torch.rand(3, 1, 7, 50) > 0.3 if masked else None
    check_pointwise(levels, x, t, *weights, mask, 0.25 if gamma else -1.0, gamma, reduction)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    shape=shapes, dtype=st.sampled_from(DTYPES), target=st.sampled_from(TARGETS), reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    gamma=st.sampled_from(GAMMAS), alpha=st.sampled_from([-1.0, 0.25]),
    weight=st.sampled_from([None, "first", "last", "all"]), pos_weight=st.sampled_from([None, "first", "last", "all"]),
    masked=st.sampled_from([None, "first", "last", "all"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_fuzz(library, shape, dtype, target, reduction, layouts, gamma, alpha, weight, pos_weight, masked, seed):
    torch.manual_seed(seed)
    x, t = make(shape, dtype, target)

    def part(name):  # of the shape of x, or broadcast to it along all dimensions but one
        return torch.rand({"first": (*shape[:1], *[1] * (len(shape) - 1)), "last": shape[-1:], "all": shape}[name])

    mask = part(masked) > 0.3 if masked and x.numel() > 1 else None
    if mask is not None and not mask.any():
        mask = None
    if layouts[0] == "expanded":
        mask = None  # which would spoil what the repeated entries share
    weights = [part(name) if name and gamma == 0 else None for name in (weight, pos_weight)]
    check_pointwise(["best"], lay_out(x, layouts[0]), lay_out(t, layouts[1]), *weights, mask, alpha, gamma, reduction, draws=2)


@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [True, False], ids=["image", "batch"])
def test_cpu_dice(shape, dtype, per_image, levels):
    x, t = make(shape, dtype)
    check_dice(levels, x, t, None, (None, 1.0, 1.0, 1.0, False, per_image, "mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", ["float", "uint8", "map-uint8", "map-int32", "map-int64"])
@pytest.mark.parametrize("masked", [None, "all", "shared"])
@pytest.mark.parametrize("squared", [False, True], ids=["sums", "squares"])
def test_cpu_dice_options(reduction, target, masked, squared, levels):
    shape = (3, 4, 33, 50)
    x, t = make(shape, torch.float32, "float" if "map" in target else target)
    if "map" in target:
        t = torch.randint(0, 4, (3, 33, 50)).to(getattr(torch, target.removeprefix("map-")))
    mask = None if masked is None else torch.rand(3, 4 if masked == "all" else 1, 33, 50) > 0.3
    if mask is not None:
        mask[1, 0] = False  # an entry, or an image, without any element that counts
    check_dice(levels, x, t, mask, (torch.rand(4), 0.7, 1.3, 0.5, squared, True, reduction))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=image_shapes, dtype=st.sampled_from(DTYPES), target=st.sampled_from([*TARGETS, "map"]), reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), pos_weight=st.booleans(),
    masked=st.sampled_from([None, "all", "shared", "classes"]), squared=st.booleans(), per_image=st.booleans(),
    smooth=st.sampled_from([1.0, 1e-3]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_dice_fuzz(library, shape, dtype, target, reduction, layouts, pos_weight, masked, squared, per_image, smooth, seed):
    torch.manual_seed(seed)
    x, t = make(shape, dtype, "float" if target == "map" else target)
    if target == "map" and shape[1] > 1:
        t = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    mask = None
    if masked and layouts[0] != "expanded":
        mask = torch.rand({"all": shape, "shared": (shape[0], 1, *shape[2:]), "classes": shape[1:]}[masked]) > 0.3
        mask = mask if mask.any() else None
    options = torch.rand(shape[1]) if pos_weight else None, 1.0, 1.0, smooth, squared, per_image, reduction
    check_dice(["best"], lay_out(x, layouts[0]), lay_out(t, layouts[1]), mask, options, draws=2)


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512", "avx512_bf16"])
def test_exponentials_and_logarithms(level, library, monkeypatch):
    """Relative errors, over all magnitudes: a loss near 0 is as exact as one near 1."""
    monkeypatch.setenv("MINKERNELS_CPU_LEVEL", level)
    for dtype, limit in ((torch.float32, 2.5e-7), (torch.float64, 3e-14)):
        x = torch.linspace(-86, 86, 200_001, dtype=dtype).requires_grad_()
        exact = torch.log1p(torch.exp(-x.detach().double().abs())) + (-x.detach().double()).clamp(min=0)
        for t, sign in ((torch.ones_like(x), 1), (torch.zeros_like(x), -1)):
            loss = bce_with_logits(sign * x, t, reduction="none")
            assert ((loss - exact) / exact).abs().max() < limit
            (dx,) = torch.autograd.grad(loss.sum(), x)
            p = 1 / (1 + torch.exp(x.detach().double()))
            assert ((dx + p) / p).abs().max() < limit
    for gamma in (0.5, 1.0, 2.0, 3.7):
        x = torch.linspace(-12, 12, 100_001).requires_grad_()
        exact_x = x.detach().double().requires_grad_()
        q = 1 / (1 + torch.exp(exact_x))
        exact = q**gamma * (torch.log1p(torch.exp(-exact_x.abs())) + (-exact_x).clamp(min=0))
        loss = sigmoid_focal_loss(x, torch.ones_like(x), alpha=-1, gamma=gamma)
        assert ((loss - exact) / exact).abs().max() < 1e-6 * (1 + gamma)
        (dx,), (exact_dx,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(exact.sum(), exact_x)
        assert ((dx - exact_dx) / exact_dx).abs().max() < 1e-6 * (1 + gamma)


def test_the_mean_of_small_losses(library):
    """The sums take one logarithm for many elements, and lose none that is small."""
    for shift in (0.0, 10.0, 20.0, 60.0):
        x, t = torch.randn(2, 1, 3000) + shift, torch.ones(2, 1, 3000)
        exact = F.softplus(-x.double()).mean() if shift < 20 else torch.exp(-x.double()).mean()
        torch.testing.assert_close(bce_with_logits(x, t).double(), exact, rtol=5e-7, atol=0)
        torch.testing.assert_close(bce_dice_loss(x, t, dice_weight=0.0).double(), exact, rtol=5e-7, atol=0)


LOSSES = {
    "bce": lambda x, t, **options: bce_with_logits(x, t, **options),
    "focal": lambda x, t, **options: sigmoid_focal_loss(x, t, **{"reduction": "mean", **options}),
    "dice": lambda x, t, **options: bce_dice_loss(x, t, **options),
}
losses = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


@losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_same_bits_for_any_number_of_threads(loss_of, dtype, library):
    x, t = make((3, 4, 90, 100), dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            leaf = x.clone().requires_grad_()
            loss = loss_of(leaf, t)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# Semantics


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


# The public ops under PyTorch's machinery.


@losses
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(loss_of, reduction, library):
    x, t = make((2, 3, 4, 5), torch.float64)
    mask = torch.rand(x.shape) > 0.3
    assert torch.autograd.gradcheck(lambda x: loss_of(x, t, mask=mask, reduction=reduction), (x.requires_grad_(),))


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
    x, t = make((3, 2, 5), torch.float16)  # no early gradient
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

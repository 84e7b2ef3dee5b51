"""BCE, focal and Dice losses: the reference against PyTorch, and the C++ kernels against fp64 at every level."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from judge import assert_close
from minkernels import bce_dice_loss, bce_with_logits, sigmoid_focal_loss
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
    losses,
    make,
    pointwise,
    shapes,
)

ops = torch.ops.minkernels
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


def spoil(t, mask):
    """t with something that no kernel may look at where the mask is False."""
    return t if mask is None else t.masked_fill(~mask, math.nan if t.is_floating_point() else 77 if t.dtype != torch.bool else True)


def check_pointwise(levels, x, t, weight, pos_weight, mask, alpha, gamma, reduction, draws=1):
    """The C++ kernels' loss and both gradients, the early one and the recomputed one, against fp64."""
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
        loss, scale, early = ops.sigmoid_loss_fwd(*tensors, alpha, gamma, reduction, reduction != "none")
        assert_close(loss, plain, exact, wide(dtype), f"{level} loss", draws=draws)
        for what, upstream in upstreams.items():
            grad = early if what == "early grad" else ops.sigmoid_loss_bwd(upstream, *tensors, scale, alpha, gamma)
            exact_grad = grad_of(formula(torch.float64), clean_x.double(), upstream.double())
            plain_grad = grad_of(formula(dtype), clean_x, upstream.to(dtype))
            assert_close(grad, plain_grad, exact_grad, dtype, f"{level} {what}", draws=draws)
            assert grad.stride() == torch.empty_like(tensors[0]).stride()


def check_dice(levels, x, t, mask, options, draws=1):
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
        loss, factors = ops.bce_dice_fwd(*tensors, *numbers, squared, per_image, reduction)
        assert_close(loss, plain, exact, wide(dtype), f"{level} loss", draws=draws)
        grad = ops.bce_dice_bwd(*tensors, factors * dloss[..., None], squared)
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


def test_a_class_map_whose_dtype_does_not_hold_the_number_of_classes(library):
    x, t = torch.randn(2, 300, 33), torch.randint(0, 256, (2, 33), dtype=torch.uint8)
    for backend in (ops, reference):
        results = [backend.bce_dice_fwd(x, labels, None, None, 1.0, 1.0, 1.0, False, True, "mean") for labels in (t, t.long())]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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

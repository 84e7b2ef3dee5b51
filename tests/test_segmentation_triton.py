"""The Triton segmentation losses against fp64: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from judge import assert_close
from minkernels import bce_dice_loss, bce_with_logits
from segmentation_cases import LAYOUTS, REDUCTIONS, TARGETS, bce_dice, grad_of, image_shapes, lay_out, make_target, pointwise, shapes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.segmentation import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GAMMAS = [0.0, 1.0, 2.0, 1.5]  # each a kernel of its own
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

SHAPES = {"scalar": (), "one": (1,), "ragged": (5, 31), "one-block": (1024,), "block-and-one": (1025,), "image": (2, 3, 20, 30)}
IMAGES = {"no-pixels": (5, 3), "one-class": (2, 1, 33, 31), "classes": (2, 5, 20, 30), "two-blocks": (1, 2, 1025)}


def spoil(t, mask):
    """t with something that no kernel may look at where the mask is False."""
    return t if mask is None else t.masked_fill(~mask, math.nan if t.is_floating_point() else 77 if t.dtype != torch.bool else True)


def to(*tensors):
    return [None if t is None else t.to(DEVICE) if not INTERPRETED else t for t in tensors]


def check_pointwise(x, t, weight, pos_weight, mask, alpha, gamma, reduction):
    """Loss and both gradients, the early one and the recomputed one."""
    dtype, options = x.dtype, dict(mask=mask, alpha=alpha, gamma=gamma, reduction=reduction)
    dloss = torch.rand(x.shape if reduction == "none" else ()) - 0.3
    clean_x, clean_t = (v if mask is None else v.masked_fill(~mask, 0) for v in (x, t))

    def formula(as_dtype):
        weights = [None if w is None else w.to(as_dtype) for w in (weight, pos_weight)]
        return lambda x: pointwise(x, clean_t.to(as_dtype), *weights, **options)

    tensors = to(spoil(x, mask), spoil(t, mask), *(None if w is None else w.expand(x.shape) for w in (weight, pos_weight, mask)))
    loss, scale, early = _triton.sigmoid_loss_fwd(*tensors, alpha, gamma, reduction, reduction != "none")
    exact, plain = formula(torch.float64)(clean_x.double()), formula(torch.float32)(clean_x.float())
    assert_close(loss.cpu(), plain, exact, torch.float32, "loss", draws=2)
    grads = {"recomputed grad": (dloss, _triton.sigmoid_loss_bwd(*to(dloss), *tensors, scale, alpha, gamma))}
    if reduction != "none":
        grads["early grad"] = torch.ones(()), early
    for name, (upstream, grad) in grads.items():
        assert grad.dtype == dtype and grad.stride() == torch.empty_like(tensors[0]).stride(), f"{name}: not what the fake promises"
        exact_grad = grad_of(formula(torch.float64), clean_x.double(), upstream.double())
        assert_close(grad.cpu(), grad_of(formula(dtype), clean_x, upstream.to(dtype)), exact_grad, dtype, name, draws=2)


def check_dice(x, t, mask, options):
    dtype = x.dtype
    spread = None if mask is None else mask.expand(x.shape)
    dense = t if t.dim() == x.dim() else F.one_hot(t.long(), x.shape[1]).movedim(-1, 1)
    clean_x, clean_t = (v if mask is None else v.masked_fill(~spread, 0) for v in (x, dense))
    pos_weight, *numbers, squared, per_image, reduction = options

    def formula(as_dtype):
        weights = None if pos_weight is None else pos_weight.to(as_dtype)
        return lambda x: bce_dice(x, clean_t.to(as_dtype), weights, spread, *numbers, squared, per_image, reduction)

    hidden = spread if t.dim() == x.dim() or spread is None else spread.any(1)
    tensors = to(spoil(x, spread), spoil(t, hidden), pos_weight, spread)
    loss, factors = _triton.bce_dice_fwd(*tensors, *numbers, squared, per_image, reduction)
    exact, plain = formula(torch.float64)(clean_x.double()), formula(torch.float32)(clean_x.float())
    assert_close(loss.cpu(), plain, exact, torch.float32, "loss", draws=2)
    dloss = torch.rand(exact.shape) - 0.3
    grad = _triton.bce_dice_bwd(*tensors, factors * to(dloss)[0][..., None], squared)
    assert grad.dtype == dtype and grad.stride() == torch.empty_like(tensors[0]).stride()
    exact_grad = grad_of(formula(torch.float64), clean_x.double(), dloss.double())
    assert_close(grad.cpu(), grad_of(formula(dtype), clean_x, dloss.to(dtype)), exact_grad, dtype, "grad", draws=2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pointwise(shape, gamma, dtype, reduction):
    x = (3 * torch.randn(shape)).to(dtype)
    check_pointwise(x, torch.rand(shape), None, None, None, 0.25 if gamma else -1.0, gamma, reduction)


@settings(max_examples=60 if INTERPRETED else 15, derandomize=True, deadline=None)
@given(
    shape=shapes, dtype=st.sampled_from(DTYPES), target=st.sampled_from(TARGETS), reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), gamma=st.sampled_from(GAMMAS), weighted=st.booleans(),
    masked=st.sampled_from([None, "first", "last", "all"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_pointwise_fuzz(shape, dtype, target, reduction, layouts, gamma, weighted, masked, seed):
    torch.manual_seed(seed)
    x, t = (3 * torch.randn(shape)).to(dtype), make_target(target, shape)
    mask = None
    if masked and x.numel() > 1 and layouts[0] != "expanded":
        mask = torch.rand({"first": (*shape[:1], *[1] * (len(shape) - 1)), "last": shape[-1:], "all": shape}[masked]) > 0.3
        mask = mask if mask.any() else None
    weights = [torch.rand(shape[-1:]), torch.rand(shape)] if weighted and gamma == 0 else [None, None]
    check_pointwise(lay_out(x, layouts[0]), lay_out(t, layouts[1]), *weights, mask, 0.25, gamma, reduction)


@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [True, False], ids=["image", "batch"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dice(shape, dtype, per_image, reduction):
    x = (3 * torch.randn(shape)).to(dtype)
    check_dice(x, torch.rand(shape), None, (None, 1.0, 1.0, 1.0, False, per_image, reduction))


@settings(max_examples=60 if INTERPRETED else 15, derandomize=True, deadline=None)
@given(
    shape=image_shapes, dtype=st.sampled_from(DTYPES), target=st.sampled_from([*TARGETS, "map"]), reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), pos_weight=st.booleans(),
    masked=st.sampled_from([None, "all", "shared", "classes"]), squared=st.booleans(), per_image=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_dice_fuzz(shape, dtype, target, reduction, layouts, pos_weight, masked, squared, per_image, seed):
    torch.manual_seed(seed)
    x, t = (3 * torch.randn(shape)).to(dtype), make_target("float" if target == "map" else target, shape)
    if target == "map" and shape[1] > 1:
        t = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    mask = None
    if masked and layouts[0] != "expanded":
        mask = torch.rand({"all": shape, "shared": (shape[0], 1, *shape[2:]), "classes": shape[1:]}[masked]) > 0.3
        mask = mask if mask.any() else None
    options = torch.rand(shape[1]) if pos_weight else None, 0.7, 1.3, 0.5, squared, per_image, reduction
    check_dice(lay_out(x, layouts[0]), lay_out(t, layouts[1]), mask, options)


def test_more_entries_than_a_block(monkeypatch):
    monkeypatch.setattr(_triton, "BLOCK", 16)
    shape = 7, 5, 2
    check_dice(3 * torch.randn(shape), torch.rand(shape), torch.rand(shape) > 0.5, (None, 1.0, 1.0, 1.0, False, True, "mean"))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_elements(shape, reduction):
    x = torch.zeros(shape, device=DEVICE)
    loss, scale, _ = _triton.sigmoid_loss_fwd(x, x, None, None, None, -1.0, 0.0, reduction, False)
    assert _triton.sigmoid_loss_bwd(loss, x, x, None, None, None, scale, -1.0, 0.0).shape == shape
    dice, factors = _triton.bce_dice_fwd(x, x, None, None, 1.0, 1.0, 1.0, False, True, reduction)
    assert _triton.bce_dice_bwd(x, x, None, None, factors, False).shape == shape
    assert reduction != "mean" or (loss.isnan() and dice.isnan())
    assert reduction != "sum" or (loss == 0 and dice == 0)
    assert reduction != "none" or (loss.shape == shape and dice.shape == shape[:2] and (dice == 0).all())


def test_nothing_counts():
    t = torch.zeros(2, 3, 5, device=DEVICE)
    x, mask = t + math.nan, t > 0
    for reduction in ("mean", "sum"):
        loss, _, grad = _triton.sigmoid_loss_fwd(x, t, None, None, mask, -1.0, 0.0, reduction, True)
        dice, factors = _triton.bce_dice_fwd(x, t, None, mask, 1.0, 1.0, 1.0, False, True, reduction)
        assert (grad == 0).all() and (factors == 0).all()
        assert (loss.isnan() and dice.isnan()) if reduction == "mean" else (loss == 0 and dice == 0)


def test_the_default_dtype_changes_nothing():
    x, t, mask = to(torch.randn(302), torch.rand(302), torch.arange(302) > 0)  # 301 elements count, which is no bfloat16
    expected = _triton.sigmoid_loss_fwd(x, t, None, None, mask, -1.0, 0.0, "mean", True)
    try:
        torch.set_default_dtype(torch.bfloat16)
        actual = _triton.sigmoid_loss_fwd(x, t, None, None, mask, -1.0, 0.0, "mean", True)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_relative_errors():
    """A loss near 0 is as exact as one near 1."""
    x = torch.linspace(-86, 86, 20_001)
    exact = torch.log1p(torch.exp(-x.double().abs())) + (-x.double()).clamp(min=0)
    loss, _, grad = _triton.sigmoid_loss_fwd(*to(x, torch.ones_like(x)), None, None, None, -1.0, 0.0, "none", True)
    p = 1 / (1 + torch.exp(x.double()))
    for actual, true in ((loss.cpu(), exact), (grad.cpu(), -p)):
        assert ((actual - true) / true).abs().max() < 5e-7  # the GPU's exp2 is good to 2 ulp


def test_extreme_logits():
    inf, nan = math.inf, math.nan
    x, t = torch.tensor([1e30, 1e30, -1e30, -1e30, inf, inf, -inf, -inf, nan]), torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 1, 0])
    loss, _, grad = _triton.sigmoid_loss_fwd(*to(x, t), None, None, None, -1.0, 0.0, "none", True)
    torch.testing.assert_close(loss.cpu(), torch.tensor([0.0, 1e30, 1e30, 0.0, inf, nan, nan, inf, nan]), equal_nan=True)
    torch.testing.assert_close(grad.cpu(), torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0, 0.0, 0.0, -1.0, nan]), equal_nan=True)


def test_offsets_past_2_to_31():
    """The last elements lie more than 2**31 from the first; memory that is not touched costs nothing."""
    x, t = torch.randn(2, 1, 70).half(), torch.rand(2, 1, 70)
    expected = _triton.sigmoid_loss_fwd(*to(x, t), None, None, None, -1.0, 0.0, "sum", False)[0]
    entries = _triton.bce_dice_fwd(*to(x, t), None, None, 1.0, 1.0, 1.0, False, True, "none")[0]
    for strides in ((2**31 + 8, 1, 1), (1, 1, 2**25)):
        far = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=DEVICE).copy_(x)
        torch.testing.assert_close(_triton.sigmoid_loss_fwd(far, *to(t), None, None, None, -1.0, 0.0, "sum", False)[0], expected)
        assert torch.equal(_triton.bce_dice_fwd(far, *to(t), None, None, 1.0, 1.0, 1.0, False, True, "none")[0], entries)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("loss_of", [bce_with_logits, bce_dice_loss])
def test_same_bits_every_time_and_under_a_cuda_graph(loss_of):
    x, t = torch.randn(4, 3, 200, 300, device=DEVICE).requires_grad_(), torch.rand(4, 3, 200, 300, device=DEVICE)

    def step():
        loss = loss_of(x, t)
        return loss, *torch.autograd.grad(loss * 3, x)

    results = [step() for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)

"""The Triton cross-entropy kernels against the reference: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from judge import assert_close
from minkernels import cross_entropy
from minkernels.cross_entropy import reference
from test_cross_entropy import REDUCTIONS, grad_of, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.cross_entropy import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # interpreted bfloat16 arithmetic is wrong
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

SHAPES = {  # N rows, V classes; a row of up to 32768 is read once, a longer one twice, in blocks of 16384
    "one-class": (4, 1),
    "two": (3, 2),
    "ragged": (5, 31),
    "one-block": (4, 4096),  # of the recomputed gradient
    "block-and-one": (3, 4097),
    "longest-read-once": (3, 32768),
    "shortest-read-twice": (3, 32769),
    "gpt2": (2, 50257),
    "many-short": (300, 27),
    "no-rows": (0, 7),
}


def check(x, target, reduction, lay_out=lambda t: t):
    """Loss and both gradients, the early one and the recomputed one, against fp64; the kernels are given NaN in each ignored row."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    dloss = torch.rand(len(x) if reduction == "none" else ()) - 0.3

    def loss(x):
        return F.cross_entropy(x, target.long(), reduction=reduction)

    spoilt = x.masked_fill((target == -100)[:, None], math.nan).to(DEVICE)
    spoilt, labels = lay_out(spoilt), target.to(DEVICE)
    actual, stats, early = _triton.fwd(spoilt, labels, -100, reduction, reduction != "none")
    assert_close(actual.cpu(), loss(x.to(wide)), loss(x.double()), wide, "loss")
    counted = target != -100
    exact_stats, plain_stats = (reference.fwd(t, target, -100, reduction, False)[1][counted] for t in (x.double(), x))
    assert_close(stats.cpu()[counted], plain_stats, exact_stats, wide, "stats")
    grads = {"recomputed grad": (dloss, _triton.bwd(dloss.to(DEVICE), spoilt, labels, stats, -100, reduction))}
    if reduction != "none":
        grads["early grad"] = torch.ones(()), early
    for name, (upstream, grad) in grads.items():
        assert grad.dtype == dtype and grad.stride() == torch.empty_like(spoilt).stride(), f"{name}: not what the fake promises"
        plain, exact = grad_of(loss, x, upstream.to(dtype)), grad_of(loss, x.double(), upstream.double())
        assert_close(grad.cpu(), plain, exact, dtype, name)


@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s[0]], ids=[name for name, s in SHAPES.items() if s[0]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton(shape, reduction, dtype):
    check(*make(*shape, dtype), reduction)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    N=st.integers(1, 20), V=st.integers(1, 5000), dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(REDUCTIONS),
    layout=st.sampled_from(["rows", "columns", "slice", "expanded"]), index=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_fuzz(N, V, dtype, reduction, layout, index, seed):
    torch.manual_seed(seed)
    x, target = make(N, V, dtype, ignored=layout != "expanded")
    x = x[:1].expand(N, V) if layout == "expanded" else x

    def lay_out(t):
        if layout == "columns":
            return t.t().contiguous().t()
        if layout == "slice":  # a padded vocabulary: the row stride is not V
            return t.new_full((N, V + 13), math.nan)[:, 5 : V + 5].copy_(t)
        return t[:1].expand(N, V) if layout == "expanded" else t

    check(x, target.to(index), reduction, lay_out)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction):
    x, target = (t.to(DEVICE) for t in make(0, 7))
    loss, stats, grad = _triton.fwd(x, target, -100, reduction, reduction != "none")
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    assert (stats.shape == (0, 2) and _triton.bwd(loss, x, target, stats, -100, reduction).shape == grad.shape) or reduction == "none"


def test_all_ignored():
    x, target = torch.full((3, 5), math.nan, device=DEVICE), torch.full((3,), -100, device=DEVICE)
    for reduction in ("mean", "sum"):
        loss, _, grad = _triton.fwd(x, target, -100, reduction, True)
        assert (loss == 0 or (reduction == "mean" and loss.isnan())) and (grad == 0).all()


def test_huge_logits_and_infinities():
    inf = math.inf
    x = torch.tensor([[2.0**24, 2.0**24], [1e30, -1e30], [1e30, 1e30], [-inf, 0.0], [-inf, 0.0], [inf, 0.0], [-inf, -inf], [0.0, math.nan]])
    target = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0])
    loss, stats, _ = _triton.fwd(x.to(DEVICE), target.to(DEVICE), -100, "none", False)
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(x, target, reduction="none"), equal_nan=True)
    grad = _triton.bwd(torch.ones(8, device=DEVICE), x.to(DEVICE), target.to(DEVICE), stats, -100, "none")
    torch.testing.assert_close(grad[:5].cpu(), grad_of(lambda x: F.cross_entropy(x, target[:5], reduction="sum"), x[:5], torch.ones(())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_true_class_of_a_certain_row(dtype):
    """p >= 0.999: its gradient is formed in fp32 and rounded once; subtracting 1 from a stored probability would give 0."""
    x = torch.zeros(1, 8, dtype=dtype, device=DEVICE)
    x[0, 3] = 9.5
    grad = _triton.fwd(x, torch.tensor([3], device=DEVICE), -100, "sum", True)[2]
    p = x.double().softmax(-1)[0, 3]
    assert p > 0.999 and abs(grad[0, 3].double() - (p - 1)) <= torch.finfo(dtype).eps * (1 - p) + 1e-7  # 1e-7: p itself is fp32


@pytest.mark.parametrize("upstream", ["expanded", "uneven"])
def test_upstream_gradients_of_none(upstream):
    x, target = (t.to(DEVICE) for t in make(6, 11))
    dloss = torch.tensor(0.7, device=DEVICE).expand(6) if upstream == "expanded" else torch.randn(12, device=DEVICE)[::2]
    stats = _triton.fwd(x, target, -100, "none", False)[1]
    expected = grad_of(lambda x: F.cross_entropy(x, target, reduction="none"), x, dloss)
    torch.testing.assert_close(_triton.bwd(dloss, x, target, stats, -100, "none"), expected)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the device assert ends the process")
def test_label_out_of_range_reads_nothing():
    """The interpreter drops the device assert (test_aot.py finds it in the PTX); the loss is then NaN. 2**40 would be a crash."""
    loss, _, _ = _triton.fwd(torch.zeros(3, 5), torch.tensor([0, 2**40, -1]), -100, "none", False)
    assert loss[0].isfinite() and loss[1:].isnan().all()


@pytest.mark.parametrize("layout", ["rows", "columns", "slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(layout, dtype):
    x = torch.randn(70, 100, device=DEVICE).to(dtype)  # more than one block of 4096
    x = {"rows": x, "columns": x.T, "slice": x[:, 3:90]}[layout]
    expected = (x.float() * 0.3).to(dtype)
    _triton.scale_(x, torch.tensor(0.3, device=DEVICE))
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_scale_of_one_touches_nothing():
    """A signalling NaN would come back quiet from an fp32 multiplication."""
    bits = torch.tensor([[0x7FA00000, 0x3F800000]], dtype=torch.int32, device=DEVICE)
    _triton.scale_(bits.view(torch.float32), torch.ones((), device=DEVICE))
    assert bits[0, 0] == 0x7FA00000


def test_offsets_past_2_to_31():
    """The last rows and columns lie more than 2**31 elements from the first; memory that is not touched costs nothing."""
    x, target = (t.to(DEVICE) for t in make(2, 70, torch.float16))
    expected = _triton.fwd(x, target, -100, "none", False)[0]
    for strides in ((2**31 + 8, 1), (1, 2**25)):
        far = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=DEVICE)
        assert torch.equal(_triton.fwd(far.copy_(x), target, -100, "none", False)[0], expected)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [(500, 30000), (200, 60000)])
def test_same_bits_every_time(shape):
    x, target = (t.to(DEVICE) for t in make(*shape, torch.bfloat16))
    results = [_triton.fwd(x, target, -100, "mean", True) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)  # the gradient written early, and recomputed
def test_cuda_graph(dtype):
    """Loss and gradient are captured, and follow their inputs when replayed."""
    x, target = (t.to(DEVICE) for t in make(50, 1000, dtype))
    x.requires_grad_()

    def step():
        loss = cross_entropy(x, target)
        return loss, *torch.autograd.grad(loss * 3, x)

    step()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    target.copy_(target.roll(1))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)

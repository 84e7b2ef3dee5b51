"""The Triton kernels of the softmax losses against fp64: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cross_entropy_cases as cases
from cross_entropy_cases import LAYOUTS, OPTIONS, REDUCTIONS, grads_of, lay_out, make
from judge import assert_close
from minkernels import cross_entropy
from minkernels.cross_entropy import reference
from minkernels.cross_entropy._options import Options, coefficients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.cross_entropy import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

ALL_TILES = 10**6  # programs that run at once: always too few of them, and a row that is no tile is split
# Shape, layout, processors, ROWS of the forward's tile and whether it holds whole rows, with the tiles of `small`: 2048 elements, or 1024
# of heavy options or of positions side by side; 512 where no gradient is wanted; 256 where there are many.
PATHS = {
    "one-class": ((4, 1), "rows", 1, 4, True),
    "short-rows": ((70, 27), "rows", 1, 8, True),
    "whole": ((3, 900), "rows", 1, 1, True),
    "one-block": ((2, 256), "rows", 1, 1, True),  # of the recomputed gradient
    "two-reads": ((2, 2099), "rows", 1, 1, False),
    "split": ((2, 2099), "rows", ALL_TILES, 1, False),
    "positions": ((2, 7, 70), "rows", 1, 32, True),
    "few-positions": ((3, 5, 3), "rows", 1, 4, True),
    "positions-in-pieces": ((1, 33, 70), "rows", 1, 64, False),
    "positions-split": ((1, 33, 20), "rows", ALL_TILES, 32, False),
    "columns": ((70, 13), "columns", 1, 32, True),  # a matrix whose rows lie side by side
    "channels-last": ((2, 9, 5), "channels-last", 1, 8, True),
}


@pytest.fixture(scope="module")
def small():
    """Small tiles, so that small inputs take every path; yields a function that says how many processors there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "WHOLE", 2048)
        patch.setattr(_triton, "TILE", 256)
        patch.setattr(_triton, "SCALE_PROGRAMS", 3)
        yield lambda n: patch.setattr(_triton, "processors", lambda device: n)


def check(x, target, options, reduction, layout="rows", **more):
    cases.check(_triton, x, target, options, reduction, layout, device=DEVICE, **more)


@pytest.fixture
def merges(monkeypatch):
    """How many launches merged parts."""
    kernel, launches = _triton._merge_kernel, []

    class Spy:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(_triton, "_merge_kernel", Spy())
    return launches


CASES = [  # interpreted, float16 meets every path and every option, but half of their pairs, bfloat16 the other half: time
    pytest.param(path, options, dtype, id=f"{path}-{options}-{dtype}")
    for i, path in enumerate(PATHS) for j, options in enumerate(OPTIONS) for dtype in DTYPES
    if dtype == torch.float32 or (i + j) % 2 == (dtype == torch.float16) or not INTERPRETED
]  # fmt: skip


@pytest.mark.parametrize("path, options, dtype", CASES)
def test_triton(path, options, dtype, small, merges):
    shape, layout, processors, rows, whole = PATHS[path]
    small(processors)
    x, target = make(*shape, dtype=dtype, probs=OPTIONS[options].get("probs", False))
    placed = lay_out(x, layout)
    (_, V, D), strides = _triton._sizes(placed), _triton._strides(placed)
    assert _triton._tile(V, D, strides, _triton.WHOLE // 2, 512)[::2] == (rows, whole), "not the path that is named"
    for reduction in REDUCTIONS:
        check(x, target, OPTIONS[options], reduction, layout, what=reduction)
    assert bool(merges) == (processors == ALL_TILES)


@pytest.mark.parametrize("V, processors", [(32768, 1), (32769, 1), (50257, 1), (32769, 132)])  # one tile; two reads; an odd one; split
def test_real_tiles(V, processors, monkeypatch):
    monkeypatch.setattr(_triton, "processors", lambda device: processors)
    check(*make(2, V, dtype=torch.float16), {}, "mean")


@settings(
    max_examples=60 if INTERPRETED else 15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 2100)) | st.tuples(st.integers(1, 3), st.integers(1, 50), st.integers(1, 50)),
    dtype=st.sampled_from(DTYPES), options=st.sampled_from(list(OPTIONS)), reduction=st.sampled_from(REDUCTIONS),
    layout=st.sampled_from([*LAYOUTS, "channels-last"]), labels=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    processors=st.sampled_from([1, 16]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_fuzz(small, shape, dtype, options, reduction, layout, labels, processors, seed):
    torch.manual_seed(seed)
    small(processors)
    shape = (shape[0], min(shape[1], 255), *shape[2:]) if labels == torch.uint8 else shape
    x, target = make(*shape, dtype=dtype, ignored=layout != "expanded", probs=OPTIONS[options].get("probs", False), labels=labels)
    check(x, target, OPTIONS[options], reduction, layout, draws=2)


STATS = {"plain": {}, "softcap": dict(softcap=5.0), "scale": dict(logit_scale=0.7), "negative-scale": dict(logit_scale=-1.5)}


@pytest.mark.parametrize("shape", [(4, 1), (40, 27), (3, 300), (2, 1099)], ids=str)
@pytest.mark.parametrize("options, dtype", [*((name, torch.float32) for name in STATS), *(("plain", dtype) for dtype in DTYPES[1:])])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_stats(shape, options, layout, dtype, small):
    x, target = make(*shape, dtype=dtype)
    for processors in (1, ALL_TILES):
        small(processors)
        cases.check_stats(_triton, x, target, STATS[options], layout, DEVICE)


@pytest.mark.parametrize("processors", [1, ALL_TILES])
@pytest.mark.parametrize("shape", [(20, 27), (3, 1500), (1, 50, 40)], ids=str)
def test_stats_of_a_shard(shape, processors, small):
    """Every column; labels that name no class of this shard leave rel 0, and a gradient without a label's term."""
    small(processors)
    x, target = make(*shape)
    target.view(-1)[2:5] = torch.tensor([-7, shape[1], 2**40])[: target.numel() - 2]
    weight, options = torch.rand(shape[1]) + 0.5, Options(label_smoothing=0.1)
    device = [t.to(DEVICE) for t in (x, target, weight)]
    for entropy in (False, True):
        actual, argmax = _triton.stats(*device, *options, True, entropy)
        plain, best = reference.stats(x, target, weight, *options, True, entropy)
        exact, _ = reference.stats(x.double(), target, weight.double(), *options, True, entropy)
        for i, name in enumerate(["m", "d", "T", "rel", "U", "E"][: exact.shape[1]]):
            assert_close(actual[:, i].cpu(), plain[:, i], exact[:, i], torch.float32, name)
        assert torch.equal(argmax.cpu(), best)
    k = torch.randn(target.numel(), 5).abs()
    k[:, 0] = plain[:, 0]
    actual = _triton.grad(*device, k.to(DEVICE), *options)
    exact = reference.grad(x.double(), target, weight.double(), k.double(), *options)
    assert_close(actual.cpu(), reference.grad(x, target, weight, k, *options), exact, torch.float32, "gradient")


def test_argmax_is_the_first_of_equals(small):
    x = torch.zeros(5, 3000)
    x[0, [700, 701, 2500]] = 1.0
    x[1, [2999]] = 1.0
    x[2] = -math.inf
    x[3, :600] = -math.inf
    target = torch.tensor([0, 0, 0, 0, -100], device=DEVICE)
    for processors in (1, ALL_TILES):
        small(processors)
        argmax = _triton.stats(x.to(DEVICE), target, None, *Options(), False, True)[1]
        assert argmax.tolist() == [700, 2999, 0, 600, -1]


def test_entropy_of_far_logits(small):
    """A running maximum that moves by more than fp32 holds must not turn 0 into NaN."""
    x = torch.full((1, 3000), -3e38)
    x[0, 2000:2002] = 3e38
    for processors in (1, ALL_TILES):
        small(processors)
        m, d, _, rel, _, E = _triton.stats(x.to(DEVICE), torch.tensor([2001], device=DEVICE), None, *Options(), False, True)[0][0]
        assert (m.item(), d.item(), rel.item(), E.item()) == (torch.tensor(3e38).item(), 2.0, 0.0, 0.0)


@pytest.mark.parametrize("options", ["plain", "all", "probs"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(options, reduction):
    probs = OPTIONS[options].get("probs", False)
    for shape in ((0, 7), (0, 7, 3), (2, 7, 0)):
        x, target = (t.to(DEVICE) for t in make(*shape, probs=probs))
        weight, lowered = torch.ones(7, device=DEVICE), Options()
        loss, stats, grad = _triton.fwd(x, target, weight, *lowered, reduction, False, True)
        torch.testing.assert_close(loss, F.cross_entropy(x, target, weight, reduction=reduction), equal_nan=True)
        k = coefficients(loss, x.shape[1], target, weight, stats, lowered, reduction, False)
        assert stats.shape == (0, 3 if probs else 2) and grad.shape == _triton.grad(x, target, weight, k, *lowered).shape == shape
        if reduction == "mean":
            assert _triton.fwd(x, target, weight, *lowered, reduction, True, True)[0] == 0


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(default):
    x, target = (t.to(DEVICE) for t in make(302, 5))  # 301 rows count, which is no bfloat16
    expected = _triton.fwd(x, target, None, *Options(), "mean", True, True)
    try:
        torch.set_default_dtype(default)
        actual = _triton.fwd(x, target, None, *Options(), "mean", True, True)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2500), (2, 5, 3)], ids=str)
def test_all_ignored(shape, weighted, small):
    """NaN as in PyTorch, or 0 if that is asked for; the gradient is 0 either way, and what the rows hold reaches nothing."""
    small(16)
    x, target = torch.full(shape, math.nan, device=DEVICE), torch.full((shape[0], *shape[2:]), -100, device=DEVICE)
    weight = torch.ones(shape[1], device=DEVICE) if weighted else None
    for reduction, empty_zero in (("mean", False), ("mean", True), ("sum", False)):
        loss, stats, grad = _triton.fwd(x, target, weight, *Options(label_smoothing=0.1), reduction, empty_zero, True)
        assert loss.isnan() if (reduction, empty_zero) == ("mean", False) else loss == 0
        assert (grad == 0).all() and (stats == 0).all()
    stats, argmax = _triton.stats(x, target, weight, *Options(), False, True) if x.dim() == 2 else (stats, torch.tensor(-1))
    assert (stats == 0).all() and (argmax == -1).all()


@pytest.mark.parametrize("padding", [0, 600])  # in one tile, and split
def test_huge_logits_and_infinities(padding, small):
    small(16)
    inf = math.inf
    x = torch.tensor([[2.0**24, 2.0**24], [1e30, -1e30], [1e30, 1e30], [-inf, 0.0], [-inf, 0.0], [inf, 0.0], [-inf, -inf], [0.0, math.nan]])
    x = torch.cat([x, torch.full((8, padding), -inf)], 1)
    target = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0])
    loss, stats, _ = _triton.fwd(x.to(DEVICE), target.to(DEVICE), None, *Options(), "none", False, False)
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(x, target, reduction="none"), equal_nan=True)
    k = coefficients(torch.ones(8, device=DEVICE), x.shape[1], target.to(DEVICE), None, stats, Options(), "none", False)
    grad = _triton.grad(x.to(DEVICE), target.to(DEVICE), None, k, *Options()).cpu()
    expected = grads_of(lambda x: F.cross_entropy(x, target[:5], reduction="sum"), [x[:5]], torch.ones(()))[0]
    torch.testing.assert_close(grad[:5], expected)
    early = _triton.fwd(x.to(DEVICE), target.to(DEVICE), None, *Options(), "sum", False, True)[2].cpu()
    torch.testing.assert_close(early[:5], expected)
    probs = torch.rand(x.shape)
    loss = _triton.fwd(x.to(DEVICE), probs.to(DEVICE), None, *Options(), "none", False, False)[0]
    expected = F.cross_entropy(x, probs, reduction="none")
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_true_class_of_a_certain_row(dtype):
    """p >= 0.999: its gradient is formed in fp32 and rounded once; subtracting 1 from a stored probability would give 0."""
    x = torch.zeros(1, 8, dtype=dtype, device=DEVICE)
    x[0, 3] = 9.5
    grad = _triton.fwd(x, torch.tensor([3], device=DEVICE), None, *Options(), "sum", False, True)[2]
    p = x.double().softmax(-1)[0, 3]
    assert p > 0.999 and abs(grad[0, 3].double() - (p - 1)) <= torch.finfo(dtype).eps * (1 - p) + 1e-7  # 1e-7: p itself is fp32


def test_coefficients_of_any_strides():
    x, target = (t.to(DEVICE) for t in make(6, 11))
    k = torch.rand(6, 5, device=DEVICE)
    expected = _triton.grad(x, target, None, k, *Options())
    assert torch.equal(_triton.grad(x, target, None, k.t().contiguous().t(), *Options()), expected)


@pytest.mark.parametrize("kind, index", cases.CANNOT_HOLD, ids=str)
def test_an_ignore_index_that_the_labels_cannot_hold(kind, index, small):
    small(1)
    x, target = torch.randn(3, 300, device=DEVICE), torch.tensor([156, 3, 255], device=DEVICE)
    for reduction in REDUCTIONS:
        options = 0.0, 0.0, 0.0, 1.0, reduction, False, True
        results = _triton.fwd(x, target.to(kind), None, index, *options), _triton.fwd(x, target, None, -100, *options)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the device assert ends the process")
@pytest.mark.parametrize("processors", [1, 16])
def test_label_out_of_range_reads_nothing(processors, small):
    """The interpreter drops the device assert (test_aot.py finds it in the PTX); the loss is then NaN. 2**40 would be a crash."""
    small(processors)
    x, target = torch.zeros(3, 3000), torch.tensor([0, 2**40, -1])
    loss, _, grad = _triton.fwd(x, target, torch.ones(3000), *Options(label_smoothing=0.1), "none", False, True)
    assert loss[0].isfinite() and loss[1:].isnan().all() and grad.isfinite().all()


@pytest.mark.parametrize("layout", ["rows", "columns", "slice", "volume", "permuted", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(layout, dtype, small):
    x = torch.randn(70, 100, device=DEVICE).to(dtype)  # more than one block of 4096
    if layout in ("volume", "permuted"):
        x = x.reshape(7, 10, 100).movedim(-1, 1)
    cut = {"columns": lambda: x.T, "slice": lambda: x[:, 3:90], "permuted": lambda: x[1:, :, 2:], "scalar": lambda: x[0, 0]}
    x = cut.get(layout, lambda: x)()
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
    x, target = (t.to(DEVICE) for t in make(2, 70, dtype=torch.float16))
    expected = _triton.fwd(x, target, None, *Options(), "none", False, False)[0]
    for strides in ((2**31 + 8, 1), (1, 2**25)):
        far = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=DEVICE).copy_(x)
        assert torch.equal(_triton.fwd(far, target, None, *Options(), "none", False, False)[0], expected)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [(500, 30000), (200, 60000), (3, 60000), (4, 21, 10000)])
def test_same_bits_every_time(shape):
    x, target = (t.to(DEVICE) for t in make(*shape, dtype=torch.bfloat16))
    results = [_triton.fwd(x, target, None, *Options(), "mean", False, True) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [(50, 1000), (2, 60000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)  # the gradient written early, and recomputed
def test_cuda_graph(dtype, shape):
    """Loss and gradient are captured, and follow their inputs when replayed."""
    x, target = (t.to(DEVICE) for t in make(*shape, dtype=dtype))
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

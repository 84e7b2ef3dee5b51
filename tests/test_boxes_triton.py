"""The Triton kernels of the IoU family against fp64 and the reference: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boxes_cases import FORMATS, KINDS, LAYOUTS, REDUCTIONS, grads_of, lay_out, loss, make_boxes, pairwise
from judge import assert_close
from minkernels.boxes import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.boxes import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
kinds = pytest.mark.parametrize("kind", KINDS)
SHAPES = {  # leading dimensions, N, M; tiles are 8 x 32 and larger, sums are split into parts of 256 or more
    "one": ((), 1, 1),
    "ragged": ((2,), 17, 33),
    "parts": ((), 3, 600),
}


def to(*tensors):
    return [t.to(DEVICE) for t in tensors] if not INTERPRETED else tensors  # .to() would make a copy contiguous


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def check_pairs(a, b, kind, fmt):
    eps = 1e-7
    exact, plain = pairwise(a.double(), b.double(), kind, fmt, eps), pairwise(a, b, kind, fmt, eps)
    out = _triton.pairs_fwd(*to(a, b), kind, fmt, eps).cpu()
    assert_close(out, plain, exact, torch.float32, kind, draws=2, size=1.0)
    if kind == "iou":
        assert torch.equal(out, plain)
    dout = torch.randn(exact.shape)
    exact_grads = grads_of(lambda a, b: pairwise(a, b, kind, fmt, eps), (a.double(), b.double()), dout.double())
    plain_grads = grads_of(lambda a, b: pairwise(a, b, kind, fmt, eps), (a, b), dout)
    grads = _triton.pairs_bwd(*to(dout, a, b), kind, fmt, eps, True, True)
    for i in range(2):
        assert_close(grads[i].cpu(), plain_grads[i], exact_grads[i], torch.float32, f"gradient {i + 1}", draws=2)


def check_loss(a, b, kind, fmt, reduction):
    dtype, eps = a.dtype, 1e-7
    exact, plain = loss(a.double(), b.double(), kind, fmt, reduction, eps), loss(a.float(), b.float(), kind, fmt, reduction, eps)
    actual = _triton.loss_fwd(*to(a, b), kind, fmt, eps, reduction).cpu()
    assert_close(actual, plain, exact, torch.float32, kind, draws=2, size=1.0)
    dloss = torch.randn(a.shape[:-1])
    exact_grads = grads_of(lambda a, b: loss(a, b, kind, fmt, "none", eps), (a.double(), b.double()), dloss.double())
    plain_grads = grads_of(lambda a, b: loss(a, b, kind, fmt, "none", eps), (a.float(), b.float()), dloss)
    grads = _triton.loss_bwd(*to(dloss, a, b), kind, fmt, eps, True, True)
    for i in range(2):
        assert grads[i].dtype == dtype
        assert_close(grads[i].cpu(), plain_grads[i].to(dtype), exact_grads[i], dtype, f"gradient {i + 1}", draws=2)


def check_match(a, b, fmt):
    actual, expected = _triton.match(*to(a, b), fmt), reference.match(a, b, fmt)
    assert all(same(x.cpu(), y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@kinds
def test_pairs(shape, kind):
    lead, N, M = shape
    check_pairs(make_boxes(*lead, N), make_boxes(*lead, M), kind, "xyxy")


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    sets=st.integers(1, 3), N=st.integers(1, 40), M=st.integers(1, 40), kind=st.sampled_from(KINDS), fmt=st.sampled_from(FORMATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_pairs_fuzz(sets, N, M, kind, fmt, layouts, seed):
    torch.manual_seed(seed)
    check_pairs(*(lay_out(make_boxes(sets, n, fmt=fmt), layout) for n, layout in zip((N, M), layouts, strict=True)), kind, fmt)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    shape=st.one_of(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.tuples(st.integers(250, 520))),
    kind=st.sampled_from(KINDS), fmt=st.sampled_from(FORMATS), dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(REDUCTIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_loss_fuzz(shape, kind, fmt, dtype, reduction, layouts, seed):
    torch.manual_seed(seed)
    check_loss(*(lay_out(make_boxes(*shape, dtype=dtype, fmt=fmt), layout) for layout in layouts), kind, fmt, reduction)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    sets=st.integers(1, 3), N=st.integers(1, 80), G=st.integers(1, 80), fmt=st.sampled_from(FORMATS), grid=st.sampled_from([None, 8.0]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_match_fuzz(sets, N, G, fmt, grid, layouts, seed):
    torch.manual_seed(seed)
    check_match(*(lay_out(make_boxes(sets, n, fmt=fmt, grid=grid), layout) for n, layout in zip((N, G), layouts, strict=True)), fmt)


def test_match_in_parts():
    check_match(make_boxes(700, grid=8.0), make_boxes(3, grid=8.0), "xyxy")


@kinds
def test_edges_that_meet(kind):
    """Half of the gradient to each of two equal edges, all of clamp(0)'s where boxes touch."""
    a, b, options = make_boxes(30, grid=4.0), make_boxes(30, grid=4.0), (kind, "xyxy", 1e-7, True, True)
    for name, dout in (("pairs_bwd", torch.randn(30, 30)), ("loss_bwd", torch.randn(30))):
        actual, expected = getattr(_triton, name)(*to(dout, a, b), *options), getattr(reference, name)(dout, a, b, *options)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)


STRANGE = [0.0, 1.0, 2.0, -1.0, 3.0, math.inf, -math.inf, math.nan, 1e20, 1e-30]


def test_strange_boxes():
    a, b = (torch.tensor(STRANGE)[torch.randint(len(STRANGE), (n, 4))] for n in (100, 60))
    assert same(_triton.pairs_fwd(*to(a, b), "iou", "xyxy", 0.0).cpu(), reference.pairs_fwd(a, b, "iou", "xyxy", 0.0))
    check_match(a, b, "xyxy")


@kinds
def test_points_and_nan(kind):
    a = torch.tensor([[1.0, 1, 1, 1], [5, 5, 9, 5], [0, 0, 4, 4], [0, math.nan, 4, 4]])
    b = a[:3].clone()
    dout = (torch.arange(12.0).view(4, 3) + 1).masked_fill((torch.arange(4) == 3)[:, None], 0.0)
    out = _triton.pairs_fwd(*to(a, b), kind, "xyxy", 1e-7).cpu()
    assert out[:3].isfinite().all() and out[3].isnan().all()
    for grad in _triton.pairs_bwd(*to(dout, a, b), kind, "xyxy", 1e-7, True, True):
        assert grad.isfinite().all()
    value = _triton.loss_fwd(*to(a[:3], b), kind, "xyxy", 0.0, "none").cpu()
    torch.testing.assert_close(value, reference.loss_fwd(a[:3], b, kind, "xyxy", 0.0, "none"))


@pytest.mark.parametrize("N, M", [(0, 3), (3, 0), (0, 0)])
def test_no_boxes(N, M):
    a, b = to(make_boxes(2, N), make_boxes(2, M))
    assert _triton.pairs_fwd(a, b, "ciou", "xyxy", 1e-7).shape == (2, N, M)
    for grad in _triton.pairs_bwd(a.new_zeros(2, N, M), a, b, "ciou", "xyxy", 1e-7, True, True):
        assert (grad == 0).all()
    check_match(a.cpu(), b.cpu(), "xyxy")
    for reduction in REDUCTIONS:
        assert (_triton.loss_fwd(a[:, :0], a[:, :0], "iou", "xyxy", 1e-7, reduction) == 0).all()
    assert _triton.loss_bwd(a.new_zeros(2, 0), a[:, :0], a[:, :0], "iou", "xyxy", 1e-7, True, False)[0].shape == (2, 0, 4)


def test_offsets_past_2_to_31():
    """The last coordinates lie more than 2**31 elements from the first; memory that is not touched costs nothing."""
    a, b = to(*(make_boxes(5).half() for _ in range(2)))
    far = torch.empty_strided(a.shape, (1, 2**31 // 3 + 1), dtype=a.dtype, device=DEVICE).copy_(a)
    assert torch.equal(*(_triton.loss_fwd(t, b, "giou", "xyxy", 1e-7, "none") for t in (far, a)))


@pytest.mark.gpu
@gpu
@kinds
def test_same_bits_every_time_and_under_a_cuda_graph(kind):
    a, b = to(make_boxes(3, 300), make_boxes(3, 2100))
    dout = torch.randn(3, 300, 2100, device=DEVICE)

    def step():
        out = _triton.pairs_fwd(a, b, kind, "xyxy", 1e-7)
        value = _triton.loss_fwd(a, b[:, :300], kind, "xyxy", 1e-7, "sum")
        return out, value, *_triton.pairs_bwd(dout, a, b, kind, "xyxy", 1e-7, True, True), *_triton.match(a, b, "xyxy")

    results = [step() for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    a.copy_(make_boxes(3, 300))
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)

"""The Triton attention kernels against the reference: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from judge import assert_close
from minkernels import attention
from minkernels.attention import _outputs, reference
from test_attention import gradients, make, plain_attention, plain_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.attention import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # interpreted bfloat16 arithmetic is wrong
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

SHAPES = {  # B, H, Hkv, M queries, N keys, D, Dv; tiles are 16 to 128 long, and as wide as the next power of two from 16
    "one-token": (1, 1, 1, 1, 1, 16, 16),
    "ragged-tail": (1, 2, 2, 150, 150, 64, 64),  # whole tiles and an edge
    "decoding": (2, 2, 1, 1, 200, 64, 64),  # one query, whose tile sees all keys; two heads share each key head
    "more-keys": (1, 1, 1, 70, 200, 40, 96),  # Dv is wider than D, and both are padded
    "more-queries": (1, 1, 1, 200, 70, 96, 24),  # causal: the first 130 queries see nothing, some tiles of them whole
    "grouped": (1, 6, 2, 33, 50, 80, 80),  # three heads share each key head
    "odd-dims": (1, 1, 1, 65, 65, 33, 17),
    "widest": (1, 1, 1, 70, 70, 256, 256),
    "thinnest": (2, 2, 2, 49, 1, 1, 1),
    "no-queries": (1, 1, 1, 0, 5, 8, 8),
    "no-keys": (1, 1, 1, 5, 0, 8, 8),
    "no-batch": (0, 2, 1, 5, 5, 8, 8),
}


@pytest.fixture(scope="module", autouse=True)
def exact_dots():
    """Interpreted, tl.dot is NumPy's, whose order of summation changes with the shape of the tile, and so the scores with the kernel:
    on a GPU they are the same in all three. Summed in fp64 they are the same here."""
    matmul = np.matmul
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr(np, "matmul", lambda a, b, dtype=None: matmul(a.astype(float), b.astype(float)).astype(dtype))
        yield


def check(q, k, v, key_mask, causal, scale, lay_out=lambda t: t):
    """o, lse, dq, dk and dv against fp64; the kernels are given NaN and inf in each hidden key and value."""
    dtype, args = q.dtype, (key_mask, causal, scale)
    wide, wide_plain = [t.double() for t in (q, k, v)], torch.promote_types(q.dtype, torch.float32)
    exact = reference.fwd(*wide, *args)
    do = torch.randn(exact[0].shape).to(dtype)
    exact = *exact, *gradients(lambda *t: reference.fwd(*t, *args)[0], wide, do.double())
    plain = []
    for order in ([], [-1]):  # the sums over the head dim forwards and backwards
        q_, k_, v_, do_ = (t.flip(order) for t in (q, k, v, do))
        lse = plain_attention(q_.to(wide_plain), k_.to(wide_plain), v_.to(wide_plain), *args)[1]
        grads = gradients(lambda *t: plain_attention(*t, *args)[0], (q_, k_, v_), do_)
        plain.append([plain_attention(q_, k_, v_, *args)[0].flip(order), lse, *(g.flip(order) for g in grads)])
    plain.append([*plain[0][:2], *plain_backward(do, q, k, v, *args)])
    biggest = [t.abs().max() if t.numel() else 0.0 for t in (do, v, q, k)]
    cancelled = abs(scale) * biggest[0] * biggest[1] * max(biggest[2:])

    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf)
        key_mask = key_mask.to(DEVICE)
    do, q, k, v = (lay_out(t.to(DEVICE)) for t in (do, q, k, v))
    o, lse = _triton.fwd(q, k, v, key_mask, causal, scale)
    actual = o, lse, *_triton.bwd(do, q, k, v, o, lse, key_mask, causal, scale)
    promised = _outputs.like(q, v.shape[-1]), _outputs.lse_like(q), *(torch.empty_like(t) for t in (q, k, v))
    for name, x, like, e, *p in zip(("o", "lse", "dq", "dk", "dv"), actual, promised, exact, *plain, strict=True):
        assert x.dtype == like.dtype and x.stride() == like.stride(), f"{name}: not what the fake promises"
        assert_close(x.cpu(), p, e, wide_plain if name == "lse" else dtype, name, cancelled if name[0] == "d" else 0.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["unmasked", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton(shape, causal, padded, dtype):
    check(*make(*shape, dtype, padded), causal, shape[-2] ** -0.5)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 5.0])  # a negative scale turns the maximum round; 5 makes one key take all
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(scale, dtype):
    check(*make(1, 2, 1, 70, 90, 32, 32, dtype, padded=True), True, scale)


MASKS = {  # what a program makes of the mask of 300 keys: tiles to skip, tiles to take whole, tiles with an edge
    "right-padded": lambda n: n < 211,
    "left-padded": lambda n: n >= 77,  # whole tiles start at key 77
    "a-hole": lambda n: (n < 150) | (n >= 160),  # whole tiles, then masked ones to the end
    "every-other": lambda n: n % 2 == 0,  # no whole tile
    "one-key": lambda n: n == 299,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_mask(mask, causal):
    q, k, v, _ = make(1, 1, 1, 300, 300, 16, 16, torch.float16)
    check(q, k, v, mask(torch.arange(300))[None], causal, 0.25)


def test_mask_of_any_stride():
    q, k, v, key_mask = make(2, 1, 1, 40, 50, 16, 16, torch.float16, padded=True)
    loose = torch.zeros(50, 4, dtype=torch.bool).T[::2].copy_(key_mask)
    expected = _triton.fwd(*(t.to(DEVICE) for t in (q, k, v, key_mask)), False, 0.25)[0]
    strided = torch.empty_strided(loose.shape, loose.stride(), dtype=torch.bool, device=DEVICE).copy_(loose)
    assert torch.equal(_triton.fwd(*(t.to(DEVICE) for t in (q, k, v)), strided, False, 0.25)[0], expected)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 2), M=st.integers(8, 100), N=st.integers(8, 100),
    D=st.integers(1, 80), Dv=st.integers(1, 80), causal=st.booleans(), padded=st.booleans(), dtype=st.sampled_from(DTYPES),
    layout=st.permutations(range(4)), step=st.integers(1, 2), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_fuzz(batch, kv_heads, group, M, N, D, Dv, causal, padded, dtype, layout, step, seed):
    """Shapes, masks, and strides: the dimensions lie in memory in any order, with gaps."""
    torch.manual_seed(seed)

    def lay_out(t):
        gaps = t.new_full([t.shape[i] * step for i in layout], math.nan)
        return gaps[tuple(slice(None, None, step) for _ in layout)].permute([layout.index(i) for i in range(4)]).copy_(t)

    check(*make(batch, kv_heads * group, kv_heads, M, N, D, Dv, dtype, padded), causal, D**-0.5, lay_out)


def test_expanded():
    """Stride 0: one upstream gradient for all of o, one key head for all, one batch of values."""
    q, k, v, _ = (t.to(DEVICE) for t in make(2, 4, 1, 20, 30, 16, 16, torch.float16, padded=True))
    k, v, do = k.expand(2, 4, 30, 16), v[:1].expand(2, 4, 30, 16), torch.ones((), dtype=q.dtype, device=DEVICE).expand(q.shape)
    results = []
    for do_, k_, v_ in ((do, k, v), (do.contiguous(), k.contiguous(), v.contiguous())):
        o, lse = _triton.fwd(q, k_, v_, None, True, 0.25)
        results.append((o, *_triton.bwd(do_, q, k_, v_, o, lse, None, True, 0.25)))
    for name, x, y in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert torch.equal(x, y), name


def test_offsets_past_2_to_31():
    """The last rows lie more than 2**31 elements from the first; memory that is not touched costs nothing."""
    q, k, v, _ = (t if t is None else t.to(DEVICE) for t in make(1, 1, 1, 70, 70, 16, 16, torch.float16))
    far = torch.empty_strided(k.shape, (0, 0, 2**25, 1), dtype=k.dtype, device=DEVICE)
    far.copy_(k)
    assert torch.equal(_triton.fwd(q, far, v, None, True, 0.25)[0], _triton.fwd(q, k, v, None, True, 0.25)[0])
    assert torch.equal(_triton.fwd(q, k, far, None, True, 0.25)[0], _triton.fwd(q, k, k, None, True, 0.25)[0])


def test_tiles_fit_together():
    """_dq_kernel writes statistics for whole tiles of queries, and _dkdv_kernel reads them in its own."""
    for table in _triton.TILES.values():
        for (kernel, *key), (BLOCK_M, *_) in table.items():
            assert kernel != "dkdv" or table["dq", *key][0] % BLOCK_M == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(dtype):
    q, k, v, key_mask = (t.to(DEVICE) for t in make(2, 8, 2, 500, 700, 128, 128, dtype, padded=True))
    results = []
    for _ in range(3):
        o, lse = _triton.fwd(q, k, v, key_mask, True, 0.1)
        results.append((o, lse, *_triton.bwd(o, q, k, v, o, lse, key_mask, True, 0.1)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.gpu
@gpu
def test_cuda_graph():
    """Forward and backward are captured, and follow their inputs when replayed."""
    q, k, v, key_mask = (t.to(DEVICE) for t in make(2, 4, 2, 130, 200, 64, 64, torch.bfloat16, padded=True))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def step():
        o = attention(*leaves, causal=True, key_mask=key_mask)
        return o, *torch.autograd.grad(o, leaves, torch.ones_like(o))

    step()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in leaves:
            t.copy_(torch.randn_like(t))
    key_mask.logical_not_()
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)

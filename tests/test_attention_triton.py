"""The Triton attention kernels against the reference: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attention_cases as cases
from attention_cases import OPTIONS, holes, make, move, packed
from minkernels import attention
from minkernels.attention._options import Options

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.attention import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

SHAPES = {  # B, H, Hkv, M queries, N keys, D, Dv; tiles are 16 to 128 long
    "one-token": (1, 1, 1, 1, 1, 16, 16),
    "ragged-tail": (1, 1, 1, 150, 150, 64, 64),  # whole tiles and an edge
    "decoding": (1, 4, 2, 3, 200, 64, 64),  # one tile for the queries of the two heads that share a key head
    "more-keys": (1, 1, 1, 70, 200, 40, 96),  # two widths each: 32 + 16 (half of it padding) and 64 + 32
    "more-queries": (1, 1, 1, 200, 70, 96, 24),  # causal: the first 130 queries see nothing, some tiles of them whole
    "grouped": (1, 3, 1, 33, 50, 80, 80),  # three heads share a key head
    "odd-dims": (2, 1, 1, 65, 65, 33, 17),
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


def check(q, k, v, x, **more):
    cases.check(_triton.fwd, _triton.bwd, q, k, v, x, device=DEVICE, **more)


CASES = {  # interpreted, each shape and each option meets every dtype, but half of their pairs one, and the others none: see test_fuzz
    f"{dtype}-{name}-{shape}": (dtype, name, sizes)
    for i, (shape, sizes) in enumerate(SHAPES.items())
    for j, name in enumerate(OPTIONS)
    for n, dtype in enumerate(DTYPES)
    if not INTERPRETED or (i + j + 2 * n) % 6 == 0
}


@pytest.mark.parametrize("dtype, name, sizes", CASES.values(), ids=CASES)
def test_triton(dtype, name, sizes):
    q, k, v = make(*sizes, dtype)
    draws = 4 if k.shape[2] == 1 else 1  # of the gradients of a softmax over one key, little is left but what cancels
    check(q, k, v, cases.options(name, q, k), draws=draws)


@pytest.mark.parametrize("least", [-1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_hidden_by_nothing_but_a_large_number(dtype, least):
    cases.check_hidden_row(_triton.fwd, _triton.bwd, 70, least, dtype, DEVICE)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 5.0])  # a negative scale turns the maximum round; 5 makes one key take all
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(scale, dtype):
    q, k, v = make(1, 2, 1, 70, 90, 32, 32, dtype)
    check(q, k, v, cases.options("padded-causal", q, k, scale))


@pytest.mark.parametrize("name", ["full", "combined"])
def test_widest(name):
    q, k, v = make(1, 1, 1, 40, 70, 256, 160, torch.float16)
    check(q, k, v, cases.options(name, q, k))


MASKS = {  # what a program makes of the mask of 300 keys: tiles to skip, tiles to take whole, tiles with an edge
    "right-padded": lambda n: n < 211,
    "left-padded": lambda n: n >= 77,  # whole tiles start at key 77, with dropout, which counts keys in fours, after an edge
    "a-hole": lambda n: (n < 150) | (n >= 160),  # whole tiles, then masked ones to the end
    "every-other": lambda n: n % 2 == 0,  # no whole tile
    "one-key": lambda n: n == 299,
}
BANDS = {  # of 300 queries and keys
    "full": {},
    "causal": dict(right=0),
    "window": dict(left=140, right=20),  # an edge to the left, whole tiles, an edge to the right
    "look-ahead": dict(right=200, top_left=True),
    "dropout": dict(seed=torch.tensor(5), dropout_p=0.1),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_mask(mask, band):
    q, k, v = make(1, 1, 1, 300, 300, 16, 16, torch.float16)
    check(q, k, v, Options(key_mask=mask(torch.arange(300))[None], **band, scale=0.25))


@pytest.mark.parametrize("left", [None, 0, 60, 2**40], ids=str)
@pytest.mark.parametrize("right", [None, 0, 60, 2**40], ids=str)
def test_band(left, right):
    """More queries than keys, aligned to the bottom right: some see nothing, and whole tiles lie between two edges or none do."""
    q, k, v = make(1, 1, 1, 330, 270, 16, 16, torch.float16)
    check(q, k, v, Options(left=left, right=right, scale=0.25))


VARLEN = {  # queries and keys of each sequence
    "one": ([70], [90]),
    "many": ([33, 1, 70, 17], [33, 40, 70, 16]),
    "empty": ([0, 20, 0, 30, 5, 0], [7, 20, 0, 0, 5, 0]),  # of queries, of keys, of both
    "nothing": ([0, 0], [0, 0]),
    "decoding": ([1, 3, 0, 2], [100, 300, 20, 3]),
}
PACKED = {
    "full": {},
    "causal": dict(right=0),
    "window": dict(left=9, right=4, top_left=True),
    "dropout": dict(seed=torch.tensor(2**60 + 1), dropout_p=0.3, left=20),
    "rest": dict(softcap=2.0, sinks=torch.tensor([0.3, -1.0, 0.0, 2.0]), right=0),
}


@pytest.mark.parametrize("lengths", VARLEN.values(), ids=VARLEN)
@pytest.mark.parametrize("name, dtype", [(name, DTYPES[i % len(DTYPES)]) for i, name in enumerate(PACKED)], ids=str)
def test_varlen(lengths, name, dtype, monkeypatch):
    monkeypatch.setattr(_triton, "SPLIT_KEYS", 64)
    q, k, v = make(1, 4, 2, sum(lengths[0]), sum(lengths[1]), 24, 40, dtype)
    longest = dict(max_seqlen_q=max(lengths[0]), max_seqlen_k=max(lengths[1]) + 7)
    check(q, k, v, Options(cu_seqlens_q=packed(lengths[0]), cu_seqlens_k=packed(lengths[1]), **longest, **PACKED[name], scale=0.2))


@pytest.mark.parametrize("name", ["full", "causal", "kv-lens-causal", "window-causal", "padded", "sinks", "combined"])
@pytest.mark.parametrize("queries, dtype", list(zip([1, 5, 1], DTYPES, strict=False)), ids=str)
def test_decoding_in_parts(name, queries, dtype, monkeypatch):
    monkeypatch.setattr(_triton, "SPLIT_KEYS", 64)
    q, k, v = make(2, 4, 2, queries, 260, 48, 32, dtype)
    check(q, k, v, cases.options(name, q, k))


def test_decoding_in_more_parts_than_are_merged_at_a_time(monkeypatch):
    """Some of which see no key."""
    monkeypatch.setattr(_triton, "SPLIT_KEYS", 8)
    monkeypatch.setattr(_triton, "processors", lambda device: 100)
    q, k, v = make(2, 2, 2, 1, 1500, 16, 24)
    check(q, k, v, Options(kv_lens=torch.tensor([1500, 70], dtype=torch.int32), scale=0.2))


@pytest.mark.skipif(not INTERPRETED, reason="a failed device assert is the end of the process")
def test_wrong_lengths_read_nothing_out_of_bounds(monkeypatch):
    """What the kernels assert on a device, which test_aot.py looks for, and the interpreter does not."""
    q, k, v = (torch.cat([t, torch.full_like(t, math.nan)], 2)[:, :, : t.shape[2]] for t in make(1, 1, 1, 5, 9, 16, 16))
    int32 = lambda *n: torch.tensor(n, dtype=torch.int32)  # noqa: E731
    packed_as = [(int32(0, 7), int32(0, 9)), (int32(0, 5), int32(-3, 12)), (int32(2, 9), int32(8, 20)), (int32(4, 1), int32(9, 0))]
    wrong = [dict(kv_lens=int32(n)) for n in (10, 16, -1)]
    wrong += [dict(cu_seqlens_q=a, cu_seqlens_k=b, max_seqlen_q=20, max_seqlen_k=20) for a, b in packed_as]
    monkeypatch.setattr(_triton, "like", lambda q, Dv: torch.zeros_like(q))  # what is not written is 0
    monkeypatch.setattr(_triton, "lse_like", lambda q: q.new_zeros(q.shape[:3]))
    monkeypatch.setattr(_triton, "grads_like", lambda q, k, v, *_: (*(torch.zeros_like(t) for t in (q, k, v)), None, None))
    for x in (Options(**lengths) for lengths in wrong):
        o, lse = _triton.fwd(q, k, v, *x)
        grads = _triton.bwd(torch.ones_like(o), None, q, k, v, o, lse, *x, False)[:3]
        assert not any(t.isnan().any() for t in (o, lse, *grads))


@pytest.mark.parametrize("lengths, longest", [([], 5), ([5], 0), ([2, 3], 2)], ids=str)
def test_lengths_that_cannot_fit_are_named(lengths, longest):
    q, cu = move(tuple(make(1, 1, 1, 5, 5, 16, 16)), DEVICE)[0], packed(lengths).to(DEVICE)
    with pytest.raises(ValueError, match=f"cu_seqlens_q must end at 5, .* {len(lengths)} sequences of up to max_seqlen_q={longest}$"):
        _triton.fwd(q, q, q, *Options(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=5))


def test_mask_of_any_stride():
    q, k, v = make(2, 1, 1, 40, 50, 16, 16, torch.float16)
    key_mask, mask, bias = holes(2, 50), torch.rand(2, 1, 40, 50) > 0.5, torch.randn(1, 1, 40, 50)
    expected = _triton.fwd(*move((q, k, v), DEVICE), *move(Options(key_mask=key_mask, mask=mask, bias=bias), DEVICE))[0]

    def loosen(t):
        return torch.zeros(*t.shape[::-1], 2, dtype=t.dtype, device=DEVICE)[..., 0].permute(*reversed(range(t.dim()))).copy_(t)

    x = Options(key_mask=loosen(key_mask), mask=loosen(mask), bias=loosen(bias))
    assert torch.equal(_triton.fwd(*move((q, k, v), DEVICE), *x)[0], expected)


@settings(max_examples=100 if INTERPRETED else 8, derandomize=True, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Shapes, options, and strides: the dimensions lie in memory in any order, with gaps."""
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, is_packed, few = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3)) == 0, draw(st.integers(0, 3)) == 0
    B, Hkv, group, D, Dv = (draw(st.integers(*limits)) for limits in ((1, 2), (1, 2), (1, 3), (1, 80), (1, 80)))
    M, N, H = draw(st.integers(1, 16) if few else st.integers(8, 80)), draw(st.integers(8, 100)), Hkv * group
    maybe = lambda value: value() if draw(st.integers(0, 2)) == 0 else None  # noqa: E731
    any_shape = lambda: [n if draw(st.booleans()) else 1 for n in (B, H, M, N)]  # noqa: E731
    x = dict(
        left=maybe(lambda: draw(st.integers(0, 40))), right=maybe(lambda: draw(st.integers(0, 40))), top_left=draw(st.booleans()),
        sinks=maybe(lambda: torch.randn(H)), softcap=maybe(lambda: 1.5) or 0.0, scale=draw(st.sampled_from([D**-0.5, -0.3])),
    )  # fmt: skip
    if draw(st.integers(0, 5)) == 0:  # in the interpreter its random numbers take most of the time
        x |= dict(dropout_p=draw(st.sampled_from([0.1, 0.7])), seed=torch.randint(2**62, ()))
    if is_packed:
        cuts = [sorted(draw(st.integers(0, n)) for _ in range(2)) for n in (M, N)]
        lengths = [(a, b - a, n - b) for (a, b), n in zip(cuts, (M, N), strict=True)]
        B, longest = 1, dict(max_seqlen_q=max(lengths[0]), max_seqlen_k=max(lengths[1]))
        x |= dict(cu_seqlens_q=packed(lengths[0]), cu_seqlens_k=packed(lengths[1]), **longest)
    else:
        x |= dict(
            key_mask=maybe(lambda: holes(B, N)), kv_lens=maybe(lambda: torch.randint(0, N + 1, (B,), dtype=torch.int32)),
            mask=maybe(lambda: torch.rand(any_shape()) > 0.3),
            bias=maybe(lambda: torch.randn(any_shape()).to(draw(st.sampled_from([dtype, torch.float32])))),
        )  # fmt: skip
    layout, step = draw(st.permutations(range(4))), draw(st.integers(1, 2))

    def lay_out(t):
        gaps = t.new_full([t.shape[i] * step for i in layout], math.nan)
        return gaps[tuple(slice(None, None, step) for _ in layout)].permute([layout.index(i) for i in range(4)]).copy_(t)

    check(*make(B, H, Hkv, M, N, D, Dv, dtype), Options(**x), lay_out=lay_out, draws=2)


def test_expanded():
    """Stride 0: one upstream gradient for all of o, one key head for all, one batch of values."""
    q, k, v = move(tuple(make(2, 4, 1, 20, 30, 16, 16, torch.float16)), DEVICE)
    k, v, do = k.expand(2, 4, 30, 16), v[:1].expand(2, 4, 30, 16), torch.ones((), dtype=q.dtype, device=DEVICE).expand(q.shape)
    dlse, results = torch.ones((), device=DEVICE).expand(q.shape[:3]), []
    for do_, dlse_, k_, v_ in ((do, dlse, k, v), (do.contiguous(), dlse.contiguous(), k.contiguous(), v.contiguous())):
        o, lse = _triton.fwd(q, k_, v_, *Options(right=0))
        results.append((o, *_triton.bwd(do_, dlse_, q, k_, v_, o, lse, *Options(right=0), False)))
    for name, x, y in zip(("o", "dq", "dk", "dv", "dbias", "dsinks"), *results, strict=True):
        assert torch.equal(x, y), name


def test_offsets_past_2_to_31():
    """The last rows lie more than 2**31 elements from the first; memory that is not touched costs nothing."""
    q, k, v = move(tuple(make(1, 1, 1, 70, 70, 16, 16, torch.float16)), DEVICE)
    far = torch.empty_strided(k.shape, (0, 0, 2**25, 1), dtype=k.dtype, device=DEVICE)
    far.copy_(k)
    x = Options(right=0)
    assert torch.equal(_triton.fwd(q, far, v, *x)[0], _triton.fwd(q, k, v, *x)[0])
    assert torch.equal(_triton.fwd(q, k, far, *x)[0], _triton.fwd(q, k, k, *x)[0])


@pytest.mark.parametrize("arch", ["any", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_tiles_fit_together(arch, monkeypatch):
    """_dq_kernel writes statistics for whole tiles of queries, and _dkdv_kernel reads them in its own."""
    monkeypatch.setattr(_triton, "_arch", lambda device: arch)
    for dtype in (torch.float16, torch.float32):
        for D in range(1, 257):
            for x in (Options(), Options(bias=torch.ones(1, 1, 1, 1), dropout_p=0.5)):
                dq, dkdv = (_triton._config(kernel, torch.empty(0, 1, 1, D, dtype=dtype), D, x)["BLOCK_M"] for kernel in ("dq", "dkdv"))
                assert dq % dkdv == 0, f"head dim {D}"


def test_same_bits_every_time():
    H, M, N, D = (2, 20, 40, 24) if INTERPRETED else (8, 500, 700, 128)
    for dtype in DTYPES[1:] if INTERPRETED else DTYPES:
        for queries in (M, 1):
            q, k, v = make(2, H, 2, queries, N, D, D, dtype)
            q, k, v, x = *move((q, k, v), DEVICE), move(cases.options("combined", q, k), DEVICE)
            results = []
            for _ in range(2):
                o, lse = _triton.fwd(q, k, v, *x)
                results.append((o, lse, *_triton.bwd(o, lse, q, k, v, o, lse, *x, True)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("queries", [1, 130])
def test_cuda_graph(queries):
    """Forward and backward are captured, and follow their inputs when replayed."""
    q, k, v = move(tuple(make(2, 4, 2, queries, 2000, 64, 64, torch.bfloat16)), DEVICE)
    key_mask, kv_lens = holes(2, 2000).to(DEVICE), torch.tensor([1999, 1200], device=DEVICE)
    leaves = [t.requires_grad_() for t in (q, k, v, torch.randn(1, 4, 1, 2000, device=DEVICE))]

    def step():
        o = attention(*leaves[:3], bias=leaves[3], causal=True, key_mask=key_mask, kv_lens=kv_lens, window=(1500, 0))
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
    kv_lens.sub_(300)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)

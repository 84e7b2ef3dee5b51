"""attention: the reference against autograd, and the C++ kernels against the reference at every level, their bits and their memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import OPTIONS, SHAPES, check, make, options, packed
from minkernels import attention_varlen
from minkernels.attention import reference
from minkernels.attention._options import Options

ops = torch.ops.minkernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("shape", ["grouped", "more-keys", "no-queries", "no-keys"])
@pytest.mark.parametrize("name", OPTIONS)
def test_reference(shape, name):
    """Its backward against autograd through its forward."""
    q, k, v = make(*SHAPES[shape], torch.float64)
    check(reference.fwd, reference.bwd, q, k, v, options(name, q, k))


def check_cpu(levels, q, k, v, x, **how):
    check(ops.attention_fwd, ops.attention_bwd, q, k, v, x, runs=levels, **how)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["full", "causal", "padded", "padded-causal", "combined"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(shape, name, dtype, levels):
    q, k, v = make(*shape, dtype)
    check_cpu(levels, q, k, v, options(name, q, k))


@pytest.mark.parametrize("shape", ["ragged-tail", "few-queries", "grouped", "more-queries", "one-head"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_options(shape, name, dtype, levels):
    q, k, v = make(*SHAPES[shape], dtype)
    check_cpu(levels, q, k, v, options(name, q, k))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 5.0])  # a negative scale turns the maximum round; 5 makes one key take all
@pytest.mark.parametrize("name", ["padded-causal", "combined"])
@pytest.mark.parametrize("shape", ["ragged-tail", "more-queries", "one-head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_scale(scale, name, shape, dtype, levels):
    q, k, v = make(*SHAPES[shape], dtype)
    check_cpu(levels, q, k, v, options(name, q, k, scale))


@pytest.mark.parametrize("name", ["full", "mask", "softcap", "dropout", "bias"])
@pytest.mark.parametrize("M", [100, 130])  # both backwards
def test_large_scores(name, M, levels):
    """One key takes all of every row: p is 1 as long as forward and backward round a score of 1e4 alike."""
    q, k, v = (t * by for t, by in zip(make(1, 2, 2, M, 50, 64, 64, torch.float32), (0.3, 0.3, 1.0), strict=True))
    q[..., 0], k[..., 0], k[:, :, 7, 0] = 1e4, 0.0, 1.0
    chosen = {
        "full": {},
        "mask": dict(mask=torch.ones(1, 1, 1, 50, dtype=torch.bool)),
        "softcap": dict(softcap=1e4),
        "dropout": dict(dropout_p=0.1, seed=torch.tensor(3)),
        "bias": dict(bias=torch.zeros(1, 1, M, 50)),
    }[name]
    x, do = Options(**chosen, scale=1.0), torch.randn(1, 2, M, 64)
    wide = [t.double() for t in (q, k, v)]
    exact = reference.bwd(do.double(), None, *wide, *reference.fwd(*wide, *x), *x, False)[2]
    for level in levels:
        dv = ops.attention_bwd(do, None, q, k, v, *ops.attention_fwd(q, k, v, *x), *x, False)[2]
        assert (dv - exact).abs().max() <= 1e-6 * exact.abs().max(), level


@pytest.mark.parametrize("heads", [2, 1])
def test_bias_summed_over_many_queries(heads, levels):
    """Terms of one sign, which in float32 lose 1e-4 of their sum where one is added after the other."""
    q, (k, v) = torch.full((2, 2, 5000, 4), 0.3), torch.randn(2, 2, 1, 2, 4)
    x, do = Options(bias=torch.zeros(1, heads, 1, 2), scale=0.5), torch.full((2, 2, 5000, 4), 0.37)
    wide = [t.double() for t in (q, k, v)]
    exact = reference.bwd(do.double(), None, *wide, *reference.fwd(*wide, *x), *x, True)[3]
    for level in levels:
        dbias = ops.attention_bwd(do, None, q, k, v, *ops.attention_fwd(q, k, v, *x), *x, True)[3]
        assert (dbias - exact).abs().max() <= 1e-6 * exact.abs().max(), level


LENGTHS = {  # of queries, of keys
    "one": ([70], [70]),
    "self": ([5, 0, 130, 1, 64], [5, 0, 130, 1, 64]),
    "cross": ([3, 40, 0, 20], [90, 0, 7, 129]),  # queries without keys, keys without queries
    "none": ([], []),
}


PACKED = [{}, dict(right=0), dict(left=9, right=2), dict(right=0, top_left=True), dict(softcap=2.0, dropout_p=0.3)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("changed", PACKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_packed(lengths, changed, dtype, levels):
    M, N = lengths
    q, k, v = make(1, 4, 2, sum(M), sum(N), 24, 40, dtype)
    x = Options(cu_seqlens_q=packed(M), cu_seqlens_k=packed(N), scale=0.3, seed=torch.randint(2**62, ()), **changed)
    x = x._replace(max_seqlen_q=max(M, default=0), max_seqlen_k=max(N, default=0))
    x = x._replace(sinks=torch.randn(4).to(torch.promote_types(dtype, torch.float32)))
    check_cpu(levels, q, k, v, x)


LAYOUTS = st.permutations(range(4))


@settings(max_examples=1500, derandomize=True, deadline=None)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), M=st.integers(8, 150), N=st.integers(8, 200),
    D=st.integers(8, 80), Dv=st.integers(8, 80), names=st.lists(st.sampled_from(sorted(OPTIONS)), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES), layout=LAYOUTS, step=st.integers(1, 2), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_fuzz(library, batch, kv_heads, group, M, N, D, Dv, names, dtype, layout, step, seed):
    """Shapes, up to three sets of options at once, and strides: the dimensions lie in memory in any order, with gaps. From 8 on: below
    that the plain formula is exact by luck too often to set a budget, and the named shapes are there."""
    torch.manual_seed(seed)
    q, k, v = make(batch, kv_heads * group, kv_heads, M, N, D, Dv, dtype)
    defaults, x = Options(), options(names[0], q, k)
    for name in names[1:]:
        changed = {field: value for field, value in options(name, q, k)._asdict().items() if value is not defaults._asdict()[field]}
        x = x._replace(**changed)

    def lay_out(t):
        gaps = torch.empty([t.shape[i] * step for i in layout], dtype=t.dtype).fill_(float("nan"))
        return gaps[tuple(slice(None, None, step) for _ in layout)].permute([layout.index(i) for i in range(4)]).copy_(t)

    check_cpu(["best"], q, k, v, x, lay_out=lay_out, draws=2)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4), kv_heads=st.integers(1, 2),
    group=st.integers(1, 2), D=st.integers(8, 40), left=st.none() | st.integers(0, 50), right=st.none() | st.integers(0, 50),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_packed_fuzz(library, lengths, kv_heads, group, D, left, right, dtype, seed):
    torch.manual_seed(seed)
    (M, N), x = zip(*lengths, strict=True), Options(left=left, right=right, scale=D**-0.5)
    q, k, v = make(1, kv_heads * group, kv_heads, sum(M), sum(N), D, D, dtype)
    x = x._replace(cu_seqlens_q=packed(M), cu_seqlens_k=packed(N), max_seqlen_q=max(M), max_seqlen_k=max(N))
    check_cpu(["best"], q, k, v, x, draws=2)


def test_cpu_expanded(library):  # stride 0: one key head for all, one batch of values for all
    q, k, v = make(3, 4, 1, 20, 30, 16, 16, torch.bfloat16)
    k, v = k.expand(3, 4, 30, 16), v[:1].expand(3, 1, 30, 16).expand(3, 4, 30, 16)
    check_cpu(["best"], q, k, v, options("padded-causal", q, k))


@pytest.mark.parametrize("name", ["padded-causal", "combined", "bias-of-queries", "bias-of-all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_same_bits_for_any_number_of_threads(name, dtype, library):
    q, k, v = make(6, 10, 5, 300, 400, 64, 64, dtype)  # whole key heads for one thread, blocks for eight
    x, threads, results = options(name, q, k), torch.get_num_threads(), []
    do = torch.randn(q.shape).to(dtype)
    few = make(1, 2, 1, 2, 3000, 64, 64, dtype)  # split over its keys
    short = [make(40, 4, 2, 30, 30, 64, 64, dtype), make(3, 4, 2, 60, 60, 64, 64, dtype)]
    short = [(torch.randn(x[0].shape).to(dtype), x, options(name, *x[:2])) for x in short]
    try:
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            o, lse = ops.attention_fwd(q, k, v, *x)
            results.append((o, lse, *ops.attention_bwd(do, None, q, k, v, o, lse, *x, x.bias is not None)))
            results[-1] += ops.attention_fwd(*few, *Options())
            for do_, qkv, x_ in short:
                o, lse = ops.attention_fwd(*qkv, *x_)
                results[-1] += o, lse, *ops.attention_bwd(do_, None, *qkv, o, lse, *x_, x_.bias is not None)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


LEFT = {"blocks": (1, 2, 1, 200, 210, 40, 24), "split": (1, 2, 2, 3, 1100, 40, 24), "short": (1, 2, 1, 60, 60, 40, 24)}


@pytest.mark.parametrize("shape", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_left_over_memory(shape, name, dtype, levels):
    """What an earlier call left in the workspace reaches no result."""
    q, k, v = make(*shape, dtype)
    x, do = options(name, q, k), torch.randn(*q.shape[:3], v.shape[3]).to(dtype)

    def results(q, k, v, x):
        o, lse = ops.attention_fwd(q, k, v, *x)
        return o, lse, *ops.attention_bwd(do, None, q, k, v, o, lse, *x, x.bias is not None)

    for level in levels:
        clean = results(q, k, v, x)
        for left in (math.nan, 1e4):  # a maximum passes over NaN
            results(*(t.abs() * left for t in (q, k, v)), Options())
            for what, a, b in zip(("o", "lse", "dq", "dk", "dv", "dbias", "dsinks"), clean, results(q, k, v, x), strict=True):
                assert torch.equal(a, b) and not a.isnan().any(), f"{level} {what} after {left}"


def test_workspace(library):
    """At most what inputs and outputs take in fp32; nothing that grows with M N."""
    S, x, peaks = 8192, Options(right=0), {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, do = (torch.randn(1, 1, S, 64).to(dtype) for _ in range(4))
        o, lse = ops.attention_fwd(q, k, v, *x)
        fp32 = S * 64 * 4  # bytes of a tensor; outputs are fresh memory too
        peaks[dtype, "fwd"] = (extra_peak(lambda: ops.attention_fwd(q, k, v, *x)) - o.nbytes) / (4 * fp32)  # noqa: B023
        backward = extra_peak(lambda: ops.attention_bwd(do, None, q, k, v, o, lse, *x, False))  # noqa: B023
        peaks[dtype, "bwd"] = (backward - 3 * q.nbytes) / (8 * fp32)
    assert max(peaks.values()) <= 1.0, f"workspace, in units of inputs and outputs in fp32: {peaks}"


def test_workspace_of_packed_sequences(library):
    """Many short ones beside a longer one, which decides how heads are shared out."""
    cu = torch.cat([torch.arange(0, 5001, 1), torch.tensor([5200])])
    packed = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=200, max_seqlen_k=200)
    q = torch.randn(5200, 1, 64, requires_grad=True)
    peak = extra_peak(lambda: attention_varlen(q, q, q, **packed).sum().backward())
    assert peak <= 20 * q.nbytes, f"{peak / 2**20:.0f} MiB"  # o, do, dq, dk, dv, lse, and as much workspace


def extra_peak(run):
    """Bytes by which the resident memory of this process rises while run() does."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

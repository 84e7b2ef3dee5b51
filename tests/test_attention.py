"""attention: the reference against autograd, the C++ kernels against the reference at every level, and the public op's promises."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from judge import assert_close
from minkernels import _library, attention
from minkernels.attention import reference

SHAPES = {  # B, H, Hkv, M queries, N keys, D, Dv; the C++ kernels work on tiles of 6 rows, blocks of 48 or 96 queries, 64 or 128 keys
    "one-token": (1, 1, 1, 1, 1, 16, 16),
    "ragged-tail": (2, 3, 3, 70, 70, 64, 64),  # two blocks of queries, the second not a whole number of tiles
    "decoding": (1, 2, 2, 1, 515, 128, 128),  # one row has a tile of its own; five blocks of keys, the last of 3
    "grouped": (2, 4, 2, 5, 33, 24, 24),  # two heads share keys; D is no multiple of a register
    "more-keys": (1, 2, 1, 130, 200, 96, 80),  # Dv differs from D
    "more-queries": (1, 2, 2, 200, 130, 128, 128),  # causal: the first 70 queries see nothing
    "odd-dims": (2, 2, 2, 97, 97, 33, 17),  # bfloat16 words of two: the last one is half empty
    "widest": (1, 1, 1, 150, 150, 256, 256),
    "one-key": (2, 2, 2, 49, 1, 7, 7),
    "narrowest": (1, 2, 1, 20, 30, 1, 1),
    "no-queries": (1, 1, 1, 0, 5, 8, 8),
    "no-keys": (1, 1, 1, 5, 0, 8, 8),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(B, H, Hkv, M, N, D, Dv, dtype=torch.float32, padded=False):
    """q, k, v as views of (B, length, heads, dim); a mask with holes, whose last row hides everything if there are two."""
    q, k, v = (torch.randn(B, T, h, d).to(dtype).transpose(1, 2) for T, h, d in ((M, H, D), (N, Hkv, D), (N, Hkv, Dv)))
    key_mask = torch.rand(B, N) > 0.4
    key_mask[1:] &= torch.arange(B)[1:, None] < B - 1
    return q, k, v, key_mask if padded else None


def plain_attention(q, k, v, key_mask, causal, scale):
    """The textbook formula, rounded to q.dtype after every step: what the error budget is measured against. Returns o, lse."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    keep = keep.tril(k.shape[2] - q.shape[2]) if causal else keep
    keep = keep if key_mask is None else keep & key_mask[:, None, None, :]
    s = (q @ k.mT * scale).masked_fill(~keep, float("-inf"))
    return s.softmax(-1).nan_to_num() @ v, s.logsumexp(-1)


def plain_backward(do, q, k, v, key_mask, causal, scale):
    """The textbook gradients of FlashAttention-2, which need no M x N intermediate kept: delta, from the rounded o, takes its place."""
    o = plain_attention(q, k, v, key_mask, causal, scale)[0]
    p = plain_attention(q, k, torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], -1), key_mask, causal, scale)[0]
    group = q.shape[1] // k.shape[1]
    k_, v_ = (t.repeat_interleave(group, 1) for t in (k, v))
    ds = p * (do @ v_.mT - (do * o).sum(-1, keepdim=True)) * scale
    dk, dv = ((t.mT @ x).unflatten(1, (-1, group)).sum(2) for t, x in ((ds, q), (p, do)))
    return ds @ k_, dk, dv


def gradients(function, inputs, do):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*inputs), inputs, do, materialize_grads=True)


def check_cpu(levels, q, k, v, *args, draws=1):
    """The C++ kernels' o, lse, dq, dk and dv against fp64, at each level."""
    from minkernels.attention import _cpu

    dtype = q.dtype
    wide = [t.double() for t in (q, k, v)]
    exact_o, exact_lse = reference.fwd(*wide, *args)
    do = torch.randn(exact_o.shape).to(dtype)
    exact = gradients(lambda *t: reference.fwd(*t, *args)[0], wide, do.double())
    wide_plain, plain = torch.promote_types(dtype, torch.float32), []
    for order in ([], [-1]):  # the sums over the head dim forwards and backwards
        q_, k_, v_, do_ = (t.flip(order) for t in (q, k, v, do))
        lse = plain_attention(q_.to(wide_plain), k_.to(wide_plain), v_.to(wide_plain), *args)[1]
        grads = gradients(lambda *t: plain_attention(*t, *args)[0], (q_, k_, v_), do_)
        plain.append([plain_attention(q_, k_, v_, *args)[0].flip(order), lse, *(g.flip(order) for g in grads)])
    plain_o, plain_lse, *plain_grads = zip(*plain, strict=True)
    plain_grads = [(*both, x) for both, x in zip(plain_grads, plain_backward(do, q, k, v, *args), strict=True)]
    biggest = [t.abs().max() if t.numel() else 0.0 for t in (exact[2], v, q, k)]
    cancelled = abs(args[2]) * biggest[0] * biggest[1] * max(biggest[2:])
    for level in levels:
        o, lse = _cpu.fwd(q, k, v, *args)
        assert_close(o, plain_o, exact_o, dtype, f"{level} o", draws=draws)
        assert_close(lse, plain_lse, exact_lse, wide_plain, f"{level} lse", draws=draws)
        grads = _cpu.bwd(do, q, k, v, o, lse, *args)
        for name, x, p, e in zip(("dq", "dk", "dv"), grads, plain_grads, exact, strict=True):
            assert_close(x, p, e, dtype, f"{level} {name}", cancelled, draws)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["unmasked", "padded"])
def test_reference_bwd(shape, causal, padded):
    q, k, v, key_mask = make(*shape, torch.float64, padded)
    o, lse = reference.fwd(q, k, v, key_mask, causal, 0.3)
    do = torch.randn_like(o)
    exact = gradients(lambda *t: reference.fwd(*t, key_mask, causal, 0.3)[0], (q, k, v), do)
    for x, e in zip(reference.bwd(do, q, k, v, o, lse, key_mask, causal, 0.3), exact, strict=True):
        torch.testing.assert_close(x, e)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["unmasked", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(shape, causal, padded, dtype, levels):
    check_cpu(levels, *make(*shape, dtype, padded), causal, shape[-2] ** -0.5)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 5.0])  # a negative scale turns the maximum round; 5 makes one key take all
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_scale(scale, dtype, levels):
    check_cpu(levels, *make(*SHAPES["ragged-tail"], dtype, padded=True), True, scale)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), M=st.integers(8, 150), N=st.integers(8, 200),
    D=st.integers(8, 80), Dv=st.integers(8, 80), causal=st.booleans(), padded=st.booleans(), dtype=st.sampled_from(DTYPES),
    layout=st.permutations(range(4)), step=st.integers(1, 2), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_fuzz(library, batch, kv_heads, group, M, N, D, Dv, causal, padded, dtype, layout, step, seed):
    """Shapes, masks, and strides: the dimensions lie in memory in any order, with gaps. From 8 on: below that the plain formula is
    exact by luck too often to set a budget, and the named shapes are there."""
    torch.manual_seed(seed)
    q, k, v, key_mask = make(batch, kv_heads * group, kv_heads, M, N, D, Dv, dtype, padded)

    def lay_out(t):
        gaps = torch.empty([t.shape[i] * step for i in layout], dtype=t.dtype).fill_(float("nan"))
        return gaps[tuple(slice(None, None, step) for _ in layout)].permute([layout.index(i) for i in range(4)]).copy_(t)

    check_cpu(["best"], *(lay_out(t) for t in (q, k, v)), key_mask, causal, D**-0.5, draws=2)


def test_cpu_expanded(library):  # stride 0: one key head for all, one batch of values for all
    q, k, v, key_mask = make(3, 4, 1, 20, 30, 16, 16, torch.bfloat16, padded=True)
    check_cpu(["best"], q, k.expand(3, 4, 30, 16), v[:1].expand(3, 1, 30, 16).expand(3, 4, 30, 16), key_mask, True, 0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_same_bits_for_any_number_of_threads(dtype, library):
    from minkernels.attention import _cpu

    q, k, v, key_mask = make(1, 2, 1, 300, 400, 64, 64, dtype, padded=True)
    do, threads, results = torch.randn(q.shape).to(dtype), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            o, lse = _cpu.fwd(q, k, v, key_mask, True, 0.1)
            results.append((o, lse, *_cpu.bwd(do, q, k, v, o, lse, key_mask, True, 0.1)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_reach_nothing(bad, dtype, library):
    q, k, v, key_mask = make(2, 4, 2, 60, 70, 24, 24, dtype, padded=True)
    key_mask[0, :3] = False
    runs = []
    for planted in (0.0, bad):
        k_, v_ = (t.masked_fill(~key_mask[:, None, :, None], planted).requires_grad_() for t in (k, v))
        q_ = q.clone().requires_grad_()
        o = attention(q_, k_, v_, key_mask=key_mask, causal=True)
        runs.append((o, *torch.autograd.grad(o.sum(), (q_, k_, v_))))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*runs, strict=True))
    assert (runs[1][2].masked_select(~key_mask[:, None, :, None]) == 0).all()  # dk


def test_nan_in_sight_stays(library):
    q, k, v, _ = make(1, 1, 1, 40, 40, 16, 16)
    q[0, 0, 7, 3] = float("nan")
    o = attention(q, k, v)
    assert o[0, 0, 7].isnan().all() and o[0, 0, :7].isfinite().all() and o[0, 0, 8:].isfinite().all()


def test_query_without_keys(library):
    q, k, v, _ = make(2, 1, 1, 4, 3, 8, 8)
    key_mask = torch.tensor([[True, True, True], [False, False, False]])
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    o = attention(q, k, v, key_mask=key_mask, causal=True)  # M > N: the first query of the first batch sees nothing either
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert (o[1] == 0).all() and (o[0, 0, 0] == 0).all() and (o[0, 0, 1:] != 0).all()
    assert all((t[1] == 0).all() for t in (dq, dk, dv)) and (dq[0, 0, 0] == 0).all()
    assert reference.fwd(q, k, v, key_mask, True, 1.0)[1][1].isneginf().all()


def test_agrees_with_sdpa():
    q, k, v, key_mask = make(2, 4, 4, 30, 30, 16, 16, padded=True)
    key_mask[:, 0] = True
    torch.testing.assert_close(attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    mask = key_mask[:, None, None]
    torch.testing.assert_close(attention(q, k, v, key_mask=key_mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_output_keeps_the_layout():
    q, k, v, _ = make(2, 3, 3, 5, 6, 8, 4)
    assert attention(q, k, v).transpose(1, 2).is_contiguous() and attention(q.contiguous(), k, v).is_contiguous()
    qkv = torch.randn(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)  # one projection: q is not dense, its order is
    assert attention(*qkv).transpose(1, 2).is_contiguous()


# The public op under PyTorch's machinery.


def test_gradcheck(library):
    q, k, v, key_mask = make(2, 4, 2, 5, 7, 6, 3, torch.float64, padded=True)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: attention(*t, key_mask=key_mask, causal=True), inputs)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("padded", [False, True], ids=["unmasked", "padded"])
@pytest.mark.parametrize("shape", ["ragged-tail", "more-keys", "no-keys"])
def test_registration(shape, padded, permuted, device):
    q, k, v, key_mask = make(*SHAPES[shape], padded=padded)
    q, k, v = (t.to(device) if permuted else t.to(device).contiguous() for t in (q, k, v))
    key_mask = None if key_mask is None else key_mask.to(device)
    args = key_mask, True, 0.25
    opcheck(torch.ops.minkernels.attention_fwd.default, (q, k, v, *args))
    o, lse = torch.ops.minkernels.attention_fwd(q, k, v, *args)
    opcheck(torch.ops.minkernels.attention_bwd.default, (torch.randn_like(o), q, k, v, o, lse, *args))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, library):
    def step(q, k, v, key_mask):
        q = q * 2.0  # something to fuse
        return attention(q, k, v, key_mask=key_mask, causal=True).sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for N in (9, 12):
        q, k, v, key_mask = make(2, 4, 2, 7, N, 16, 16, padded=True)
        do = torch.randn(2, 4, 7, 16)
        for x, y in zip(*(gradients(lambda *t, f=f: f(*t, key_mask), (q, k, v), do) for f in (compiled, step)), strict=True):  # noqa: B023
            torch.testing.assert_close(x, y)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    q, k, v, _ = make(2, 2, 2, 5, 5, 8, 8)
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
    q, k, v, _ = make(2, 2, 2, 9, 9, 8, 8)
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v, causal=True))


def test_functional_transforms(library):
    q, k, v, _ = make(3, 2, 2, 5, 7, 8, 8, torch.float64)

    def loss(q, k, v):
        return attention(q[None], k[None], v[None], causal=True).square().sum()

    one_by_one = torch.stack([attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], causal=True)[0] for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(lambda *t: attention(*(x[None] for x in t), causal=True)[0])(q, k, v), one_by_one)
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    together = gradients(lambda *t: attention(*t, causal=True).square().sum(), (q, k, v), torch.ones((), dtype=torch.float64))
    for x, y in zip(each, together, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast():
    q, k, v, _ = make(1, 2, 2, 5, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64


def test_selective_checkpoint(library):
    """The op can be named in a policy: saved, it is not run a second time."""
    calls, original = [], torch.ops.minkernels.attention_fwd.default

    def policy(ctx, op, *args, **kwargs):
        calls.append(op)
        return CheckpointPolicy.MUST_SAVE if op == original else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v, _ = make(1, 2, 2, 6, 6, 8, 8)
    q.requires_grad_()
    saved = checkpoint(
        lambda q: attention(q * 2, k, v), q, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    (dq,) = torch.autograd.grad(saved.sum(), q)
    torch.testing.assert_close(dq, torch.autograd.grad(attention(q * 2, k, v).sum(), q)[0])
    assert original in calls


def test_flops_are_counted():
    q, k, v, _ = make(2, 4, 2, 5, 7, 8, 3)
    with FlopCounterMode(display=False) as counter:
        attention(q.requires_grad_(), k, v).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 5 * 7) * ((8 + 3) + (3 * 8 + 2 * 3))


def test_second_derivative_raises(library):
    q, k, v, _ = make(1, 1, 1, 3, 3, 4, 4)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (dq.sum() + q.sum()).backward()


def test_forward_mode_raises():
    q, k, v, _ = make(1, 1, 1, 3, 3, 4, 4)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))


def test_bypass_is_only_for_calls_without_gradient():
    q = torch.zeros(1, requires_grad=True)
    assert _library.needs_grad(q) and not _library.needs_grad(q.detach())
    with torch.no_grad():
        assert not _library.needs_grad(q)


T = torch.zeros
BAD = {
    "not a tensor": (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
    "rank": (dict(k=T(2, 3, 8)), ValueError, "k must have 4 dimensions .* got shape (2, 3, 8)"),
    "dtype": (dict(v=T(2, 3, 6, 8, dtype=torch.int64)), TypeError, "v must be float16, .* got torch.int64"),
    "mixed dtypes": (dict(k=T(2, 3, 6, 8, dtype=torch.bfloat16)), TypeError, "k is torch.bfloat16 on cpu, but q is torch.float32"),
    "mixed devices": (dict(k=T(2, 3, 6, 8, device="meta")), TypeError, "k is torch.float32 on meta, but q is torch.float32 on cpu"),
    "batch": (dict(k=T(1, 3, 6, 8)), ValueError, "k must be (B=2, heads, length, D=8) .* got (1, 3, 6, 8)"),
    "head dim": (dict(k=T(2, 3, 6, 4)), ValueError, "k must be .* got (2, 3, 6, 4)"),
    "lengths": (dict(v=T(2, 3, 5, 8)), ValueError, "v must share .* k (2, 3, 6, 8), got (2, 3, 5, 8)"),
    "heads": (dict(k=T(2, 2, 6, 8), v=T(2, 2, 6, 8)), ValueError, "q has 3 heads, which is no multiple of the 2 heads of k"),
    "too wide": (dict(q=T(2, 3, 5, 257), k=T(2, 3, 6, 257)), ValueError, "head dim of q must be 1 to 256, got 257"),
    "too narrow": (dict(v=T(2, 3, 6, 0)), ValueError, "head dim of v must be 1 to 256, got 0"),
    "causal": (dict(causal="yes"), TypeError, "causal must be a bool, got 'yes'"),
    "mask type": (dict(key_mask=T(2, 6)), TypeError, "key_mask must be a bool tensor, got torch.float32"),
    "mask shape": (dict(key_mask=T(2, 5, dtype=torch.bool)), ValueError, "key_mask must be (B=2, N=6), got (2, 5)"),
    "mask device": (dict(key_mask=T(2, 6, dtype=torch.bool, device="meta")), TypeError, "key_mask is on meta, but q is on cpu"),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number, got 'big'"),
    "scale value": (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    good = dict(q=T(2, 3, 5, 8), k=T(2, 3, 6, 8), v=T(2, 3, 6, 8))
    attention(**good)
    pattern = re.escape(message).replace(r"\.\*", ".*").replace(r"\ ", " ")
    with pytest.raises(error, match=pattern):
        attention(**good | change)

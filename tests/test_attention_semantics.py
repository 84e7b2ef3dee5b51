"""What attention promises: extreme numbers, rows without keys, hidden NaN, dropout, packing, lse, and PyTorch's results."""

import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import attention_cases as cases
from attention_cases import gradients, holes, make, packed
from minkernels import attention, attention_varlen, merge_attention
from minkernels.attention import reference
from minkernels.attention._options import Options

ops = torch.ops.minkernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("times", [3e2, 1e4, 1e6])
def test_huge_scores(times, levels):
    """Of 1e5 to 1e13: a score less the largest of its row may not be above 0, whatever the rounding of either is. With scores so far
    apart the softmax is a choice."""
    for _ in levels:
        q, k, v = make(1, 2, 2, 100, 200, 32, 32)
        q, k, do, results = q * times, k * times, torch.randn(1, 2, 100, 32), []
        for run, dtype in ((attention, torch.float32), (F.scaled_dot_product_attention, torch.float64)):
            leaf = v.to(dtype).requires_grad_()
            o = run(q.to(dtype), k.to(dtype), leaf, scale=0.7)
            results += [o.detach().float(), torch.autograd.grad(o, leaf, do.to(dtype))[0].float()]
        torch.testing.assert_close(results[0], results[2])
        torch.testing.assert_close(results[1], results[3], rtol=1e-5, atol=1e-5 + 5e-14 * times**2)  # what an lse in fp64 leaves
        o = attention(q[:, :, :1], k, v, scale=0.7)  # as decoding reads them
        torch.testing.assert_close(o, results[0][:, :, :1])


@pytest.mark.parametrize("flush", [False, True])
def test_every_half(flush, levels):
    """Also where subnormal floats count as 0: as floats, halves are none."""
    halves = torch.arange(65536).to(torch.int16).view(torch.float16)
    v = halves[halves.isfinite()].view(1, 1, -1, 64)
    q = torch.zeros(1, 1, 1, 64, dtype=torch.float16)
    for _ in levels:
        torch.set_flush_denormal(flush)
        try:
            outs = [attention(q, q, v[:, :, i : i + 1]) for i in range(v.shape[2])]
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(torch.cat(outs, 2), v)


def test_dropout_keeps_its_share(library):
    """And every backend keeps the same: the reference's mask is exact, so its share is the kernels' too."""
    q, k, v = make(2, 2, 2, 256, 300, 16, 300)
    v = torch.eye(300).expand(2, 2, 300, 300)[..., :256]  # o is p itself
    for dropout_p in (0.1, 0.5, 0.9):
        x = Options(dropout_p=dropout_p, seed=torch.randint(2**62, ()), scale=0.1)
        kept = reference._kept(q, k, x)
        assert abs(kept.double().mean() - (1 - dropout_p)) < 0.004
        assert torch.equal(ops.attention_fwd(q, k, v, *x)[0] != 0, kept[..., :256])


def test_dropout_draws_from_torchs_generator(library):
    q, k, v = make(1, 2, 2, 40, 40, 16, 16)
    torch.manual_seed(1)
    first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first) and not torch.equal(first, second)
    q.requires_grad_()
    grads = []
    for again in (False, True):  # recomputed under the same seed, so the same mask
        torch.manual_seed(2)
        o = checkpoint(attention, q, k, v, dropout_p=0.5, use_reentrant=False) if again else attention(q, k, v, dropout_p=0.5)
        grads.append(torch.autograd.grad(o.sum(), q)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("by, keys, D", [*(("key_mask", n, 24) for n in (20, 70, 200)), *(("kv_lens", n, 64) for n in (96, 200))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_reach_nothing(bad, by, keys, D, dtype, library):
    """kv_lens: keys of a whole number of registers are read where they lie, and the bad ones lie next."""
    q, k, v = make(2, 4, 2, keys - 10, keys, D, D, dtype)
    lens = torch.tensor([keys - 16, 0])
    key_mask = holes(2, keys) if by == "key_mask" else torch.arange(keys) < lens[:, None]
    key_mask[0, :3] = by == "kv_lens"
    hides = {"key_mask": key_mask} if by == "key_mask" else {"kv_lens": lens}
    runs = []
    for planted in (0.0, bad):
        k_, v_ = (t.masked_fill(~key_mask[:, None, :, None], planted).requires_grad_() for t in (k, v))
        q_ = q.clone().requires_grad_()
        o = attention(q_, k_, v_, **hides, causal=True)
        runs.append((o, *torch.autograd.grad(o.sum(), (q_, k_, v_))))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*runs, strict=True))
    assert (runs[1][2].masked_select(~key_mask[:, None, :, None]) == 0).all()  # dk


def test_nan_in_sight_stays(library):
    q, k, v = make(1, 1, 1, 40, 40, 16, 16)
    q[0, 0, 7, 3] = float("nan")
    o = attention(q, k, v)
    assert o[0, 0, 7].isnan().all() and o[0, 0, :7].isfinite().all() and o[0, 0, 8:].isfinite().all()


def test_query_without_keys(library):
    q, k, v = make(2, 1, 1, 4, 3, 8, 8)
    key_mask = torch.tensor([[True, True, True], [False, False, False]])
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    o = attention(q, k, v, key_mask=key_mask, causal=True)  # M > N: the first query of the first batch sees nothing either
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert (o[1] == 0).all() and (o[0, 0, 0] == 0).all() and (o[0, 0, 1:] != 0).all()
    assert all((t[1] == 0).all() for t in (dq, dk, dv)) and (dq[0, 0, 0] == 0).all()
    assert attention(q, k, v, key_mask=key_mask, return_lse=True)[1][1].isneginf().all()


@pytest.mark.parametrize("M", [3, 200])  # both backwards
@pytest.mark.parametrize("least", [-1e9, -1e30, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_hidden_by_nothing_but_a_large_number(dtype, least, M, levels):
    """Its scores are equal, as far as anybody can tell: the mean of v. Where it is in no loss it reaches no gradient."""
    if (dtype == torch.float64) != (abs(least) > 1e300):
        pytest.skip("it does not fit, or the sum with it is not rounded")
    cases.check_hidden_row(reference.fwd, reference.bwd, M, least, dtype)
    for level in levels:
        cases.check_hidden_row(ops.attention_fwd, ops.attention_bwd, M, least, dtype, what=level)


def test_agrees_with_sdpa():
    (q, k, v), key_mask = make(2, 4, 4, 30, 40, 16, 16), holes(2, 40)
    key_mask[:, 0] = True
    sdpa, mask, bias = F.scaled_dot_product_attention, torch.rand(30, 40) > 0.3, torch.randn(4, 1, 40)
    torch.testing.assert_close(attention(q, k, v, causal="top-left"), sdpa(q, k, v, is_causal=True))
    torch.testing.assert_close(attention(q, k, v, causal=True), sdpa(q, k, v, attn_mask=torch.ones(30, 40, dtype=torch.bool).tril(10)))
    torch.testing.assert_close(attention(q, k, v, key_mask=key_mask), sdpa(q, k, v, attn_mask=key_mask[:, None, None]))
    torch.testing.assert_close(attention(q, k, v, mask=key_mask[:, None, None]), sdpa(q, k, v, attn_mask=key_mask[:, None, None]))
    torch.testing.assert_close(attention(q, k, v, mask=mask), sdpa(q, k, v, attn_mask=mask))
    torch.testing.assert_close(attention(q, k, v, bias=bias), sdpa(q, k, v, attn_mask=bias.expand(2, 4, 30, 40)))
    torch.testing.assert_close(attention(q, k[:, :2], v[:, :2]), sdpa(q, k[:, :2], v[:, :2], enable_gqa=True))


def test_coming_from_flash_attn():
    """The lines of docs/attention.md that take more than another name."""
    B, T, H, D, N = 3, 2, 4, 8, 12
    q, k, v = torch.randn(3, B, T, H, D)
    k_cache, v_cache = torch.full((2, B, N, H, D), math.nan)
    n, heads = torch.tensor([0, 5, 10]), lambda *tensors: [t.transpose(1, 2) for t in tensors]
    for b in range(B):
        k_cache[b, : n[b]], v_cache[b, : n[b]] = torch.randn(2, n[b], H, D)
    rows, cols = torch.arange(B)[:, None], n[:, None] + torch.arange(T)
    k_cache[rows, cols], v_cache[rows, cols] = k, v
    for causal in (False, True):
        o = attention(*heads(q, k_cache, v_cache), kv_lens=n + T, causal=causal)
        for b, m in enumerate(n.tolist()):
            alone = heads(*(t[b : b + 1, : m + T] for t in (q, k_cache, v_cache)))
            torch.testing.assert_close(o[b], attention(*alone, causal=causal)[0])

    slopes, lens = torch.rand(B, H), n + T
    q, k, v = heads(q, k_cache.nan_to_num(), v_cache.nan_to_num())
    far = attention(q, k, v, kv_lens=lens, causal=True, bias=slopes[..., None, None] * torch.arange(N))
    distance = -(torch.arange(T)[:, None] + lens[:, None, None, None] - T - torch.arange(N)).abs()
    torch.testing.assert_close(attention(q, k, v, kv_lens=lens, causal=True, bias=slopes[..., None, None] * distance), far)

    qkv = torch.randn(B, T, 3, H, D)
    torch.testing.assert_close(attention(*qkv.transpose(1, 3).unbind(2)), attention(*heads(*qkv.unbind(2))))


def test_window_is_drawn_right(library):
    """Against the definition, one query and key at a time."""
    q, k, v = make(2, 1, 1, 7, 10, 8, 10)
    v, lens = torch.eye(10).expand(2, 1, 10, 10), torch.tensor([10, 6])
    most = sys.maxsize
    some = ((2, 1), False), ((None, 0), False), ((3, 5), True), ((1, 1), "top-left"), ((-1, 2), False)
    for window, causal in (*some, ((most, most), False), ((2**70, 1), True)):
        p = attention(q, k, v, window=window, causal=causal, kv_lens=lens)
        for b, i, j in itertools.product(range(2), range(7), range(10)):
            at, n = i + (0 if causal == "top-left" else int(lens[b]) - 7), int(lens[b])
            left, right = (10**6 if w is None or w < 0 else w for w in window)
            seen = j < n and at - left <= j <= at + (min(right, 0) if causal else right)
            assert (p[b, 0, i, j] > 0) == seen, (window, causal, b, i, j)


def test_the_masks_in_the_docs(library):
    """Each picture of docs/attention.md against the call above it."""
    page = (Path(__file__).parents[1] / "docs/attention.md").read_text()
    pictures = re.findall(r"```text\n(.+)\n([■·\n]+)```", page)
    assert len(pictures) == page.count("```text") >= 9
    for call, picture in pictures:
        drawn = torch.tensor([[cell == "■" for cell in row] for row in picture.split()])
        (M, N), packs = drawn.shape, "varlen" in call
        names = dict(q=torch.randn(1, 1, M, 4), k=torch.randn(1, 1, N, 4), v=torch.eye(N)[None, None])
        names = {name: t[0].transpose(0, 1) if packs else t for name, t in names.items()}
        p = eval(call, globals() | names | {"cu": torch.tensor})
        assert torch.equal(p.reshape(M, N) > 0, drawn), call


def test_packed_is_one_by_one(library):
    lengths_q, lengths_k = [5, 0, 3, 20], [9, 4, 0, 20]
    q, k, v = (t[0].transpose(0, 1).requires_grad_() for t in make(1, 4, 2, 28, 33, 16, 24))
    cu_q, cu_k = packed(lengths_q), packed(lengths_k)
    o, lse = attention_varlen(q, k, v, cu_q, cu_k.long(), max_seqlen_q=20, max_seqlen_k=25, causal=True, return_lse=True)
    parts = []
    for q_, k_, v_ in zip(*(t.split(n) for t, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True):
        o_, lse_ = attention(*(t.transpose(0, 1)[None] for t in (q_, k_, v_)), causal=True, return_lse=True)
        parts.append((o_[0].transpose(0, 1), lse_[0].T))
    expected = tuple(torch.cat(x) for x in zip(*parts, strict=True))
    for x, e in zip((o, lse), expected, strict=True):
        torch.testing.assert_close(x, e)
    do = torch.randn_like(o)
    for x, e in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(expected[0], (q, k, v), do), strict=True):
        torch.testing.assert_close(x, e)


def test_merge(library):
    """Attention over two halves of the keys, one of which a query may not see at all, is attention over both; so are its gradients."""
    (q, k, v), mask = make(2, 4, 4, 9, 20, 8, 8, torch.float64), torch.rand(2, 20) > 0.5
    mask[0, :12], mask[1, 12:] = False, False
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def halves(q, k, v):
        parts = [attention(q, k[:, :, at], v[:, :, at], key_mask=mask[:, at], return_lse=True) for at in (slice(12), slice(12, None))]
        return merge_attention(*parts[0], *parts[1])

    def whole(q, k, v):
        return attention(q, k, v, key_mask=mask, return_lse=True)

    douts = torch.randn(2, 4, 9, 8, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)
    for x, e in zip(halves(*inputs) + gradients(halves, inputs, *douts), whole(*inputs) + gradients(whole, inputs, *douts), strict=True):
        torch.testing.assert_close(x, e)
    nothing = merge_attention(torch.zeros(3, 4), torch.full((3,), -math.inf), torch.zeros(3, 4), torch.full((3,), -math.inf))
    assert (nothing[0] == 0).all() and nothing[1].isneginf().all()
    with pytest.raises(ValueError, match=re.escape("lse2 must be (3,) to fit out1 (3, 4), got (4,)")):
        merge_attention(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 4), torch.zeros(4))


def test_lse(library):
    q, k, v = make(1, 2, 2, 5, 7, 8, 8, torch.bfloat16)
    sinks = torch.randn(2)
    o, lse = attention(q, k, v, sinks=sinks, kv_lens=torch.tensor([0]), return_lse=True)
    assert lse.dtype == torch.float32 and (o == 0).all() and torch.equal(lse, sinks[:, None].expand(2, 5)[None])
    lse = attention(q, k, v, scale=1.0, dropout_p=0.5, return_lse=True)[1]
    torch.testing.assert_close(lse, (q.float() @ k.float().mT).logsumexp(-1))


def test_output_keeps_the_layout():
    q, k, v = make(2, 3, 3, 5, 6, 8, 4)
    assert attention(q, k, v).transpose(1, 2).is_contiguous() and attention(q.contiguous(), k, v).is_contiguous()
    qkv = torch.randn(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)  # one projection: q is not dense, its order is
    assert attention(*qkv).transpose(1, 2).is_contiguous()

"""What attention means, in plain PyTorch: any device, any float dtype, fp64 in and fp64 out, so that it can judge."""

import torch

from minkernels.attention._options import Options, check_lengths, grads_like, like, lse_like, row_deltas, sinks_grad


def fwd(q, k, v, *options):
    x = Options(*options)
    if q.device.type == "cpu":  # elsewhere it would wait for the device
        check_lengths(q, k, x)
    s, _, p_drop = _scores(q, _heads(k, q, x), x)
    p, lse = _probs(s, x)
    v = _heads(v, q, x)
    return like(q, v.shape[-1]).copy_(p * p_drop @ v.to(s.dtype)), lse_like(q).copy_(lse)


def bwd(do, dlse, q, k, v, o, lse, *options):
    *options, bias_grad = options
    x, group = Options(*options), q.shape[1] // k.shape[1]
    k_, v_ = _heads(k, q, x), _heads(v, q, x)
    s, slope, p_drop = _scores(q, k_, x)
    p, _ = _probs(s, x)
    do_, o_, q_, k_, v_ = (t.to(p.dtype) for t in (do, o, q, k_, v_))
    delta = row_deltas(do_, o_, dlse, lse, p.dtype)  # do . o equals (p * dp).sum(-1), without the M x N dp
    ds = p * (p_drop * (do_ @ v_.mT) - delta[..., None])
    grads = grads_like(q, k, v, x.bias, x.sinks, bias_grad)
    if bias_grad:
        grads[3].copy_(ds.sum_to_size(x.bias.shape))
    if x.sinks is not None:
        grads[4].copy_(sinks_grad(delta, lse, x.sinks))
    ds = ds * slope * x.scale
    dk, dv = ((t.mT @ g).unflatten(1, (-1, group)).sum(2) for t, g in ((ds, q_), (p * p_drop, do_)))
    for t, g in zip(grads, (ds @ k_, dk, dv), strict=False):
        t.copy_(g)
    return grads


def _places(q, k, x):
    """What tells where each query and key is in its sequence: i (., ., M, 1), j (., ., 1, N), their sequence's number of each (or
    None) and keys - queries of the sequence, all broadcast to (B, H, M, N)."""
    M, N = q.shape[2], k.shape[2]
    i, j = torch.arange(M, device=q.device)[:, None], torch.arange(N, device=q.device)
    if x.cu_seqlens_q is None:
        return i, j, None, None, (N if x.kv_lens is None else x.kv_lens[:, None, None, None]) - M
    cu_q, cu_k = x.cu_seqlens_q.long(), x.cu_seqlens_k.long()
    row = torch.searchsorted(cu_q[1:], i.contiguous(), right=True)
    col = torch.searchsorted(cu_k[1:], j.contiguous(), right=True)
    return i - cu_q[row], j - cu_k[col], row, col, (cu_k.diff() - cu_q.diff())[row]


def _seen(q, k, x):
    """Which query sees which key: bool, broadcast to (B, H, M, N)."""
    i, j, row, col, off = _places(q, k, x)
    at = i if x.top_left else i + off
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    keep = keep if row is None else keep & (row == col)
    keep = keep if x.left is None else keep & (j >= at - x.left)
    keep = keep if x.right is None else keep & (j <= at + x.right)
    keep = keep if x.kv_lens is None else keep & (j < x.kv_lens[:, None, None, None])
    keep = keep if x.key_mask is None else keep & x.key_mask[:, None, None]
    return keep if x.mask is None else keep & x.mask


def _scores(q, k, x):
    """(B, H, M, N) scores in nats, -inf where a query must not look; the slope of the cap; what dropout multiplies p by. fp32, or
    fp64 for fp64 inputs."""
    acc, slope, p_drop = torch.promote_types(q.dtype, torch.float32), 1.0, 1.0
    s = q.to(acc) @ k.to(acc).mT * x.scale
    if x.softcap:
        t = (s / x.softcap).tanh()
        s, slope = x.softcap * t, 1 - t * t
    s = s if x.bias is None else s + x.bias.to(acc)
    if x.dropout_p:
        p_drop = _kept(q, k, x).to(acc) / (1 - x.dropout_p)
    return s.masked_fill(~_seen(q, k, x), float("-inf")), slope, p_drop


def _heads(t, q, x):
    """k or v for each head of q, with zeros where no query may look: padding may hold NaN, and 0 * NaN is NaN."""
    if x.key_mask is not None:
        t = t.masked_fill(~x.key_mask[:, None, :, None], 0.0)
    if x.kv_lens is not None:
        t = t.masked_fill((torch.arange(t.shape[2], device=t.device) >= x.kv_lens[:, None])[:, None, :, None], 0.0)
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _probs(s, x):
    """The softmax of s, in which sinks take part, 0 for a query that sees no key; and lse."""
    all_s = s if x.sinks is None else torch.cat([s, x.sinks[:, None, None].to(s.dtype).expand(*s.shape[:3], 1)], -1)
    lse = all_s.logsumexp(-1)
    return all_s.softmax(-1)[..., : s.shape[-1]].masked_fill(lse[..., None] == float("-inf"), 0.0), lse


def _kept(q, k, x):
    """Which probabilities dropout keeps, (B, H, M, N): word j % 4 of Philox at (j // 4, i, b * H + h, 0) is at least p * 2**32."""
    i, j, row, _, _ = _places(q, k, x)
    H = q.shape[1]
    b = torch.arange(q.shape[0], device=q.device)[:, None, None, None] if row is None else row
    words = philox(x.seed, j // 4, i, b * H + torch.arange(H, device=q.device)[:, None, None])
    bits = sum(w * (j % 4 == n) for n, w in enumerate(words))
    return bits >= min(round(x.dropout_p * 2**32), 2**32 - 1)


def philox(seed, c0, c1, c2):
    """Four tensors of 32 random bits: Philox 4x32-10 (Salmon et al. 2011) with key seed and counter (c0, c1, c2, 0)."""
    low = 0xFFFFFFFF
    c = [*torch.broadcast_tensors(c0, c1, c2), torch.zeros_like(c0)]
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):
        products = [c[0] * 0xD2511F53, c[2] * 0xCD9E8D57]  # of 32 bits by 32: the upper half survives the wrap of int64
        high = [p >> 32 & low for p in products]
        c = [high[1] ^ c[1] ^ key[0], products[1] & low, high[0] ^ c[3] ^ key[1], products[0] & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return c


def merge_fwd(out1, lse1, out2, lse2):
    w1, w2, lse = _weights(lse1, lse2)
    out = torch.where(w1 != 0, w1 * out1, 0.0) + torch.where(w2 != 0, w2 * out2, 0.0)
    return torch.empty_like(out1).copy_(out), lse


def merge_bwd(dout, dlse, out1, lse1, out2, lse2):
    w1, w2, _ = _weights(lse1, lse2)
    s = torch.where((w1 != 0) & (w2 != 0), dout * (out1.to(lse1.dtype) - out2), 0.0).sum(-1)
    dlse = torch.zeros_like(s) if dlse is None else dlse
    douts = (torch.empty_like(out).copy_(torch.where(w != 0, w * dout, 0.0)) for w, out in ((w1, out1), (w2, out2)))
    w1, w2 = w1[..., 0], w2[..., 0]
    dlse1, dlse2 = torch.where(w1 != 0, w1 * (dlse + w2 * s), 0.0), torch.where(w2 != 0, w2 * (dlse - w1 * s), 0.0)
    return next(douts), dlse1, next(douts), dlse2


def _weights(lse1, lse2):
    """(..., 1) the share of each part; 0 of one that saw no key. And lse."""
    top = torch.maximum(lse1, lse2)
    none = top == float("-inf")
    e = torch.where(none, 0.0, -(lse1 - lse2).abs()).exp()
    large, small, lse = 1 / (1 + e), e / (1 + e), torch.where(none, top, top + e.log1p())
    w1, w2 = torch.where(lse1 >= lse2, large, small), torch.where(lse1 >= lse2, small, large)
    return *(torch.where(none, 0.0, w)[..., None] for w in (w1, w2)), lse

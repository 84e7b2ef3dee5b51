"""What attention means, in plain PyTorch: any device, any float dtype, fp64 in and fp64 out, so that it can judge."""

import torch

from minkernels.attention._outputs import like, lse_like


def fwd(q, k, v, key_mask, causal, scale):
    k, v = (_hide(t, key_mask).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = _scores(q, k, key_mask, causal, scale)
    lse = s.logsumexp(-1)
    return like(q, v.shape[-1]).copy_(_probs(s, lse) @ v.to(s.dtype)), lse_like(q).copy_(lse)


def bwd(do, q, k, v, o, lse, key_mask, causal, scale):
    group = q.shape[1] // k.shape[1]
    k_, v_ = (_hide(t, key_mask).repeat_interleave(group, 1) for t in (k, v))
    p = _probs(_scores(q, k_, key_mask, causal, scale), lse.to(torch.promote_types(q.dtype, torch.float32)))
    do, o, q_, k_, v_ = (t.to(p.dtype) for t in (do, o, q, k_, v_))
    delta = (do * o).sum(-1, keepdim=True)  # equals (p * dp).sum(-1), without the M x N dp
    ds = p * (do @ v_.mT - delta) * scale
    dk, dv = ((t.mT @ g).unflatten(1, (-1, group)).sum(2) for t, g in ((ds, q_), (p, do)))
    return tuple(torch.empty_like(t).copy_(g) for t, g in ((q, ds @ k_), (k, dk), (v, dv)))


def _scores(q, k, key_mask, causal, scale):
    """(B, H, M, N) scores in nats, -inf where a query must not look; fp32, or fp64 for fp64 inputs."""
    acc = torch.promote_types(q.dtype, torch.float32)
    s = q.to(acc) @ k.to(acc).mT * scale
    M, N = s.shape[-2:]
    keep = torch.ones(M, N, dtype=torch.bool, device=q.device)
    keep = keep.tril(N - M) if causal else keep
    keep = keep if key_mask is None else keep & key_mask[:, None, None, :]
    return s.masked_fill(~keep, float("-inf"))


def _hide(t, key_mask):
    """Zeros where no query may look: padding may hold NaN, and 0 * NaN is NaN."""
    return t if key_mask is None else t.masked_fill(~key_mask[:, None, :, None], 0.0)


def _probs(s, lse):
    return (s - lse[..., None]).exp().masked_fill(lse[..., None] == float("-inf"), 0.0)  # a query that sees no key: p = 0

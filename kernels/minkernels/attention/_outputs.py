"""How every backend, and the fake, allocates what attention returns."""

import torch


def like(q, Dv):
    """An empty (B, H, M, Dv), dense in q's dimension order: where q was (B, M, H, D), transpose(1, 2).flatten(2) copies nothing."""
    B, H, M, D = q.shape
    if Dv == D:
        return torch.empty_like(q)
    if q.stride(1) < q.stride(2):
        return q.new_empty((B, M, H, Dv)).transpose(1, 2)
    return q.new_empty((B, H, M, Dv))


def lse_like(q):
    """An empty (B, H, M) log-sum-exp: float64 for float32, whose probabilities an fp32 lse could not give back (at lse = 8 it is off
    by four of their roundings), where the device has it."""
    wide = q.dtype.itemsize >= 4 and q.device.type in ("cpu", "cuda")
    return q.new_empty(q.shape[:3], dtype=torch.float64 if wide else torch.float32)

"""merge_attention on a GPU, in plain Triton: a program owns BLOCK_M rows, a piece of BLOCK_D elements at a time."""

import torch
import triton
import triton.language as tl

from minkernels._triton_launch import cdiv, kernel, next_power_of_2
from minkernels._triton_math import FUSED, INF, LOG2E, log1p
from minkernels.attention._options import merge_like

TILE = 1024  # elements of a block: with 2048 the backward spills for sm_80


@triton.jit
def _weights(LSE1, LSE2, rows, mask):
    """softmax of the two, 0 where both are -inf, and their log-sum-exp."""
    a, b = tl.load(LSE1 + rows, mask=mask, other=0.0), tl.load(LSE2 + rows, mask=mask, other=0.0)
    top = tl.where(a > b, a, b)
    none = top == -INF
    e = tl.exp2(-tl.abs(tl.where(none, 0.0, a - b)) * LOG2E)
    large, first = 1.0 / (1.0 + e), a >= b
    small = e * large
    w1, w2 = tl.where(first, large, small), tl.where(first, small, large)
    return tl.where(none, 0.0, w1), tl.where(none, 0.0, w2), tl.where(none, -INF, top + log1p(e))


@triton.jit
def _row_at(rows, H, M, strides):
    return rows // M // H * strides[0] + rows // M % H * strides[1] + rows % M * strides[2]


@kernel
def _fwd_kernel(
    Out1, LSE1, Out2, LSE2, Out, LSE,  # (B, H, M, D) and (B, H, M), contiguous
    strides1, strides2, strides, R, H, M, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    w1, w2, lse = _weights(LSE1, LSE2, rows, rows < R)
    tl.store(LSE + rows, lse, mask=rows < R)
    w1, w2 = w1[:, None], w2[:, None]
    Out1 += _row_at(rows, H, M, strides1)[:, None]
    Out2 += _row_at(rows, H, M, strides2)[:, None]
    Out += _row_at(rows, H, M, strides)[:, None]
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = (rows < R)[:, None] & (d < D)
        a = tl.load(Out1 + d * strides1[3], mask=mask & (w1 != 0), other=0.0).to(tl.float32)  # a part without a share may hold NaN
        b = tl.load(Out2 + d * strides2[3], mask=mask & (w2 != 0), other=0.0).to(tl.float32)
        tl.store(Out + d * strides[3], (w1 * a + w2 * b).to(Out.dtype.element_ty), mask=mask)


@kernel
def _bwd_kernel(
    DOut, DLSE, Out1, LSE1, Out2, LSE2,  # DLSE (B, H, M), contiguous, or None
    DOut1, DLSE1, DOut2, DLSE2, strides, strides1, strides2, d_strides1, d_strides2, R, H, M, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With s = dout . (out1 - out2): dout_i = w_i dout, dlse1 = w1 (dlse + w2 s), dlse2 = w2 (dlse - w1 s)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    w1, w2, _ = _weights(LSE1, LSE2, rows, rows < R)
    DOut += _row_at(rows, H, M, strides)[:, None]
    Out1 += _row_at(rows, H, M, strides1)[:, None]
    Out2 += _row_at(rows, H, M, strides2)[:, None]
    DOut1 += _row_at(rows, H, M, d_strides1)[:, None]
    DOut2 += _row_at(rows, H, M, d_strides2)[:, None]
    s, some1, some2 = tl.zeros((BLOCK_M,), tl.float32), (w1 != 0)[:, None], (w2 != 0)[:, None]
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = (rows < R)[:, None] & (d < D)
        g = tl.load(DOut + d * strides[3], mask=mask, other=0.0).to(tl.float32)
        a = tl.load(Out1 + d * strides1[3], mask=mask & some1 & some2, other=0.0).to(tl.float32)
        b = tl.load(Out2 + d * strides2[3], mask=mask & some1 & some2, other=0.0).to(tl.float32)
        s += tl.sum(tl.where(some1 & some2, g * (a - b), 0.0), 1)
        tl.store(DOut1 + d * d_strides1[3], tl.where(some1, w1[:, None] * g, 0.0).to(DOut1.dtype.element_ty), mask=mask)
        tl.store(DOut2 + d * d_strides2[3], tl.where(some2, w2[:, None] * g, 0.0).to(DOut2.dtype.element_ty), mask=mask)
    dlse = tl.zeros((BLOCK_M,), tl.float32)
    if DLSE is not None:
        dlse = tl.load(DLSE + rows, mask=rows < R, other=0.0)
    tl.store(DLSE1 + rows, tl.where(w1 != 0, w1 * (dlse + w2 * s), 0.0), mask=rows < R)
    tl.store(DLSE2 + rows, tl.where(w2 != 0, w2 * (dlse - w1 * s), 0.0), mask=rows < R)


def fwd(out1, lse1, out2, lse2):
    out, lse = merge_like(out1, lse1)
    tensors = out1, lse1.contiguous(), out2, lse2.contiguous(), out, lse
    _launch(_fwd_kernel, tensors, (out1, out2, out), out1.shape)
    return out, lse


def bwd(dout, dlse, out1, lse1, out2, lse2):
    grads = merge_like(out1, lse1, out2, lse2)
    tensors = dout, dlse if dlse is None else dlse.contiguous(), out1, lse1.contiguous(), out2, lse2.contiguous(), *grads
    _launch(_bwd_kernel, tensors, (dout, out1, out2, grads[0], grads[2]), out1.shape)
    return grads


def _launch(which, tensors, strided, shape):
    B, H, M, D = shape
    BLOCK_D = min(next_power_of_2(max(D, 1)), 256)
    BLOCK_M, R = TILE // BLOCK_D, B * H * M
    if R:
        with torch.cuda.device_of(tensors[0]):
            which[(cdiv(R, BLOCK_M),)](
                *tensors, *(t.stride() for t in strided), R, H, M, D, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D, num_warps=4, **FUSED
            )

"""The IoU family on a GPU, in plain Triton. Nothing is added up by atomics: sums are a program's own, and those of parts come after."""

import math

import torch
import triton
import triton.language as tl

from minkernels._triton_launch import cdiv, kernel, next_power_of_2
from minkernels._triton_math import EXACT, FUSED
from minkernels.boxes._outputs import grads, loss_output, match_outputs, pair_output
from minkernels.boxes._triton_math import corners, derivative, to_format, value

LOSS_BLOCK = 256
PROGRAMS = 1024  # of a launch whose sums are split into parts: several for each multiprocessor


@kernel
def _pairs_kernel(
    A, B, Out,  # (sets, N, 4), (sets, M, 4), (sets, N, M)
    N, M, a_strides, b_strides, eps,
    KIND: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Owns a tile of the result."""
    across, down = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    set = (pid // across // down).to(tl.int64)
    offs_n, offs_m = pid // across % down * BLOCK_N + tl.arange(0, BLOCK_N), pid % across * BLOCK_M + tl.arange(0, BLOCK_M)
    x1, y1, x2, y2 = corners(A + set * a_strides[0], offs_n[:, None].to(tl.int64), offs_n[:, None] < N, a_strides[1:], FORMAT)
    b = corners(B + set * b_strides[0], offs_m[None, :].to(tl.int64), offs_m[None, :] < M, b_strides[1:], FORMAT)
    out = value((x1, y1, x2, y2), b, eps, KIND, False)
    to = Out + (set * N + offs_n[:, None]) * M + offs_m[None, :]
    tl.store(to, out, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@kernel
def _pairs_grad_kernel(
    Own, Other, DOut, Sums,  # (sets, N, 4), (sets, M, 4), (sets, N, M), (parts, sets, N, 4)
    sets, N, M, part, own_strides, other_strides, dout_strides, eps,  # part: boxes of the other set that a program sums over
    KIND: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK_N boxes of one set and streams a part of the other set past them."""
    pid, down = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    number = pid // down // sets
    set = (pid // down % sets).to(tl.int64)
    offs_n = pid % down * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    own = corners(Own + set * own_strides[0], offs_n[:, None].to(tl.int64), mask_n[:, None], own_strides[1:], FORMAT)
    dx1, dy1 = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    dx2, dy2 = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    end = tl.minimum(number * part + part, M)
    for start in range(number * part, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        other = corners(Other + set * other_strides[0], offs_m[None, :].to(tl.int64), mask_m[None, :], other_strides[1:], FORMAT)
        at = DOut + set * dout_strides[0] + offs_n[:, None].to(tl.int64) * dout_strides[1] + offs_m[None, :].to(tl.int64) * dout_strides[2]
        g = tl.load(at, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        x1, y1, x2, y2 = derivative(own, other, eps, g, KIND, False)
        dx1, dy1, dx2, dy2 = dx1 + tl.sum(x1, 1), dy1 + tl.sum(y1, 1), dx2 + tl.sum(x2, 1), dy2 + tl.sum(y2, 1)
    dx1, dy1, dx2, dy2 = to_format(dx1, dy1, dx2, dy2, FORMAT)
    to = Sums + ((number.to(tl.int64) * sets + set) * N + offs_n) * 4
    tl.store(to, dx1, mask=mask_n)
    tl.store(to + 1, dy1, mask=mask_n)
    tl.store(to + 2, dx2, mask=mask_n)
    tl.store(to + 3, dy2, mask=mask_n)


@kernel
def _match_kernel(
    Own, Other, BestIoU, BestAt,  # (sets, N, 4), (sets, M, 4), (parts, sets, N)
    sets, N, M, part, own_strides, other_strides,
    FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK_N boxes and streams a part of the other set past them; -inf and -1 where there is no match."""
    pid, down = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    number = pid // down // sets
    set = (pid // down % sets).to(tl.int64)
    offs_n = pid % down * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    own = corners(Own + set * own_strides[0], offs_n[:, None].to(tl.int64), mask_n[:, None], own_strides[1:], FORMAT)
    best, best_at = tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.full((BLOCK_N,), -1, tl.int32)
    end = tl.minimum(number * part + part, M)
    for start in range(number * part, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        other = corners(Other + set * other_strides[0], offs_m[None, :].to(tl.int64), mask_m[None, :], other_strides[1:], FORMAT)
        iou = value(own, other, 0.0, "iou", False)
        iou = tl.where((iou == iou) & mask_m[None, :], iou, float("-inf"))
        top = tl.max(iou, 1)
        at = tl.min(tl.where(iou == top[:, None], offs_m[None, :], 2147483647), 1)  # of equal ones the first
        better = top > best
        best, best_at = tl.where(better, top, best), tl.where(better, at, best_at)
    to = (number.to(tl.int64) * sets + set) * N + offs_n
    tl.store(BestIoU + to, best, mask=mask_n)
    tl.store(BestAt + to, best_at.to(tl.int64), mask=mask_n)


@kernel
def _loss_kernel(
    A, B, Loss, Sums,  # (P, 4); (P,) or None; of each program, or None
    P, a_strides, b_strides, eps,
    KIND: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < P
    loss = 1.0 - value(corners(A, i, inside, a_strides, FORMAT), corners(B, i, inside, b_strides, FORMAT), eps, KIND, True)
    if Loss is not None:
        tl.store(Loss + i, loss, mask=inside)
    if Sums is not None:
        tl.store(Sums + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), 0))


@triton.jit
def _store_grads(To, i, inside, d, FORMAT: tl.constexpr):
    x1, y1, x2, y2 = to_format(d[0], d[1], d[2], d[3], FORMAT)
    tl.store(To + i * 4, x1.to(To.dtype.element_ty), mask=inside)
    tl.store(To + i * 4 + 1, y1.to(To.dtype.element_ty), mask=inside)
    tl.store(To + i * 4 + 2, x2.to(To.dtype.element_ty), mask=inside)
    tl.store(To + i * 4 + 3, y2.to(To.dtype.element_ty), mask=inside)


@kernel
def _loss_grad_kernel(
    DLoss, A, B, DA, DB,  # (P,); (P, 4); (P, 4) or None where it is not wanted
    P, dloss_stride, a_strides, b_strides, eps,
    KIND: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < P
    g = -tl.load(DLoss + i * dloss_stride, mask=inside, other=0.0)
    a, b = corners(A, i, inside, a_strides, FORMAT), corners(B, i, inside, b_strides, FORMAT)
    if DA is not None:
        _store_grads(DA, i, inside, derivative(a, b, eps, g, KIND, True), FORMAT)
    if DB is not None:
        _store_grads(DB, i, inside, derivative(b, a, eps, g, KIND, True), FORMAT)


def pairs_fwd(boxes1, boxes2, kind, fmt, eps):
    out, (a, b) = pair_output(boxes1, boxes2), (_sets(boxes1), _sets(boxes2))
    (sets, N, _), M = a.shape, b.shape[1]
    if out.numel():
        BLOCK_M = _block(M, 128)
        BLOCK_N = _block(N, 1024 // BLOCK_M)
        with torch.cuda.device_of(a):
            _pairs_kernel[(sets * cdiv(N, BLOCK_N) * cdiv(M, BLOCK_M),)](
                a, b, out, N, M, a.stride(), b.stride(), eps, KIND=kind, FORMAT=fmt, BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M, num_warps=4, **EXACT,
            )  # fmt: skip
    return out


def pairs_bwd(dout, boxes1, boxes2, kind, fmt, eps, need1, need2):
    dout, a, b = _sets(dout), _sets(boxes1), _sets(boxes2)
    d1, d2 = grads(boxes1, boxes2, need1, need2)
    for d, own, other, upstream, need in ((d1, a, b, dout, need1), (d2, b, a, dout.mT, need2)):
        if need:
            (sets, N, _), M = own.shape, other.shape[1]
            if not dout.numel():
                d.zero_()
                continue
            BLOCK_N, BLOCK_M = _block(N, 8), _block(M, 32)  # two pairs a thread: with four, CIoU spills
            part, parts = _split(sets * cdiv(N, BLOCK_N), M)
            sums = d.new_empty((parts, *d.shape)) if parts > 1 else d
            with torch.cuda.device_of(a):
                _pairs_grad_kernel[(parts * sets * cdiv(N, BLOCK_N),)](
                    own, other, upstream, sums, sets, N, M, part, own.stride(), other.stride(), upstream.stride(), eps,
                    KIND=kind, FORMAT=fmt, BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M, num_warps=4, **FUSED,
                )  # fmt: skip
            if parts > 1:
                torch.sum(sums, 0, out=d)
    return d1, d2


def match(boxes, gts, fmt):
    outputs, (a, b) = match_outputs(boxes, gts), (_sets(boxes), _sets(gts))
    for own, other, best_iou, best_at in ((a, b, *outputs[:2]), (b, a, *outputs[2:])):
        (sets, N, _), M = own.shape, other.shape[1]
        if not best_iou.numel():
            continue
        BLOCK_N, BLOCK_M = _block(N, 32), _block(max(M, 1), 32)
        part, parts = _split(sets * cdiv(N, BLOCK_N), M)
        iou, at = (t.new_empty((parts, *t.shape)) for t in (best_iou, best_at))
        with torch.cuda.device_of(a):
            _match_kernel[(parts * sets * cdiv(N, BLOCK_N),)](
                own, other, iou, at, sets, N, M, part, own.stride(), other.stride(), FORMAT=fmt, BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M,
                num_warps=4, **EXACT,
            )  # fmt: skip
        first = iou.argmax(0, keepdim=True)  # of equal ones the first part
        best_at.copy_(at.gather(0, first)[0])
        best_iou.copy_(iou.gather(0, first)[0].masked_fill_(best_at < 0, 0.0))
    return outputs


def loss_fwd(input, target, kind, fmt, eps, reduction):
    loss, a, b = loss_output(input, reduction), _rows(input), _rows(target)
    P = a.shape[0]
    each = reduction == "none"
    sums = None if each else loss.new_empty(cdiv(P, LOSS_BLOCK))
    if P:
        with torch.cuda.device_of(a):
            _loss_kernel[(cdiv(P, LOSS_BLOCK),)](
                a, b, loss if each else None, sums, P, a.stride(), b.stride(), eps, KIND=kind, FORMAT=fmt, BLOCK=LOSS_BLOCK, num_warps=4,
                **FUSED,
            )  # fmt: skip
    if not each:
        loss = sums.sum() / (max(P, 1) if reduction == "mean" else 1)
    return loss


def loss_bwd(dloss, input, target, kind, fmt, eps, need_input, need_target):
    d1, d2 = grads(input, target, need_input, need_target)
    dloss, a, b = dloss.reshape(-1), _rows(input), _rows(target)
    P = a.shape[0]
    if P:
        with torch.cuda.device_of(a):
            _loss_grad_kernel[(cdiv(P, LOSS_BLOCK),)](
                dloss, a, b, d1 if need_input else None, d2 if need_target else None, P, dloss.stride(0), a.stride(), b.stride(), eps,
                KIND=kind, FORMAT=fmt, BLOCK=LOSS_BLOCK, num_warps=4, **FUSED,
            )  # fmt: skip
    return d1, d2


def _sets(t):
    """(..., N, 4) as (sets, N, 4); a copy where leading dimensions do not lie one stride apart."""
    return t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:])


def _rows(t):
    return t.reshape(t.numel() // 4, 4)


def _block(n, most):
    return min(most, next_power_of_2(n))


def _split(programs, n):
    """n boxes in parts, where there are too few programs without: how large, and how many."""
    parts = min(cdiv(n, 256), max(1, PROGRAMS // programs))
    part = cdiv(n, max(parts, 1))
    return part, max(cdiv(n, max(part, 1)), 1)

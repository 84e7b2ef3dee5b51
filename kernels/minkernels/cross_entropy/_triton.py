"""Softmax cross-entropy on a GPU, in plain Triton: one program a row, which forms the loss and its gradient together.

A row of up to ONE_READ classes stays in registers and is read once. A longer one is read twice, the second time from its
end, which is what the L2 cache is the surest to hold still.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) == exp2(x * LOG2E), and exp2 is one instruction
INF = tl.constexpr(float("inf"))
ONE_READ = 32768  # classes
ASSERT = dict(debug=True, sanitize_overflow=False)  # keeps the device assert of _load_label, and adds no other
PROGRAMS = 1024  # of _scale_kernel: enough to fill a GPU, few enough to end at once where there is nothing to do


@triton.jit
def _load_label(Target, row, stride, V, ignore_index):
    """The label, whether its row counts, and whether it names a class."""
    target = tl.load(Target + row * stride)
    counts, fits = target != ignore_index, (target >= 0) & (target < V)
    tl.device_assert(fits | (target == ignore_index), "target out of range")
    return target, counts, fits


@triton.jit
def _load(X, offs, stride, V, EVICT: tl.constexpr):
    return tl.load(X + offs.to(tl.int64) * stride, mask=offs < V, other=-INF, eviction_policy=EVICT).to(tl.float32)


@triton.jit
def _store(X, x, offs, stride, V):
    tl.store(X + offs.to(tl.int64) * stride, x.to(X.dtype.element_ty), mask=offs < V)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _fwd_kernel(
    X, Target, Count,  # (N, V) logits; (N,) labels; how many rows count, for a mean, or None
    Loss, Stats,  # (N,) nats, 0 where ignored; (N, 2) the row's maximum and sum of exp(x - maximum); both fp32
    Grad,  # (N, V) d sum(Loss) / d X, divided by Count for a mean; or None
    x_strides, target_stride, grad_strides,  # in elements
    V, ignore_index,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,  # WHOLE: V <= BLOCK
):
    row = tl.program_id(0).to(tl.int64)  # int64: offsets can pass 2**31
    target, counts, fits = _load_label(Target, row, target_stride, V, ignore_index)
    X += row * x_strides[0]
    if Grad is not None:
        Grad += row * grad_strides[0]
    tile, blocks = tl.arange(0, BLOCK), 1 if WHOLE else tl.cdiv(V, BLOCK)
    if counts:
        if WHOLE:
            x = _load(X, tile, x_strides[1], V, "evict_first")
            m = tl.max(x, 0)
            e = _exp(x - m)
            d = tl.sum(e, 0)
        else:
            m, d = float("-inf"), 0.0  # running max of x, and sum of exp(x - m)
            for i in range(blocks):
                x = _load(X, i * BLOCK + tile, x_strides[1], V, "evict_last")
                m_new = tl.maximum(m, tl.max(x, 0))
                shift = tl.where(m_new == -INF, 0.0, m_new)  # avoid inf - inf
                d, m = d * _exp(m - shift) + tl.sum(_exp(x - shift), 0), m_new
        x_label = tl.load(X + target.to(tl.int64) * x_strides[1], mask=fits, other=float("nan")).to(tl.float32)
        tl.store(Loss + row, m - x_label + tl.log(d))  # in this order, or the log would drown in a large m
        tl.store(Stats + row * 2, m)
        tl.store(Stats + row * 2 + 1, d)
        if Grad is not None:
            scale = 1.0 if Count is None else 1.0 / tl.load(Count).to(tl.float32)
            for i in range(blocks):
                offs = (blocks - 1 - i) * BLOCK + tile
                if not WHOLE:
                    e = _exp(_load(X, offs, x_strides[1], V, "evict_first") - m)
                p = e / d
                _store(Grad, tl.where(offs == target, p - 1.0, p) * scale, offs, grad_strides[1], V)
    else:  # ignored, and not even read
        tl.store(Loss + row, 0.0)
        tl.store(Stats + row * 2 + tl.arange(0, 2), tl.zeros((2,), tl.float32))
        if Grad is not None:
            for i in range(blocks):
                _store(Grad, tl.zeros((BLOCK,), tl.float32), i * BLOCK + tile, grad_strides[1], V)


@triton.jit
def _bwd_kernel(
    DLoss, X, Target, Stats, Count, Grad,
    dloss_stride, x_strides, target_stride, stats_strides, grad_strides,
    V, ignore_index,
    BLOCK: tl.constexpr,
):
    """Owns BLOCK classes of one row."""
    blocks = tl.cdiv(V, BLOCK)
    row, offs = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    target, counts, _ = _load_label(Target, row, target_stride, V, ignore_index)
    grad = tl.zeros((BLOCK,), tl.float32)
    if counts:
        scale = tl.load(DLoss + row * dloss_stride).to(tl.float32)
        if Count is not None:
            scale /= tl.load(Count).to(tl.float32)
        m, d = tl.load(Stats + row * stats_strides[0]), tl.load(Stats + row * stats_strides[0] + stats_strides[1])
        p = _exp(_load(X + row * x_strides[0], offs, x_strides[1], V, "evict_first") - m) / d
        grad = tl.where(offs == target, p - 1.0, p) * scale
    _store(Grad + row * grad_strides[0], grad, offs, grad_strides[1], V)


@triton.jit
def _scale_kernel(X, Scale, strides, rows, cols, BLOCK: tl.constexpr):
    scale = tl.load(Scale).to(tl.float32)
    if scale != 1.0:
        blocks = tl.cdiv(cols, BLOCK)
        for i in range(tl.program_id(0).to(tl.int64), rows * blocks, tl.num_programs(0)):
            row, offs = i // blocks, i % blocks * BLOCK + tl.arange(0, BLOCK)
            ptrs = X + row * strides[0] + offs.to(tl.int64) * strides[1]
            tl.store(ptrs, (tl.load(ptrs, mask=offs < cols).to(tl.float32) * scale).to(X.dtype.element_ty), mask=offs < cols)


def fwd(input, target, ignore_index, reduction, with_grad):
    N, V = input.shape
    loss, stats = input.new_empty(N, dtype=torch.float32), input.new_empty((N, 2), dtype=torch.float32)
    grad = torch.empty_like(input) if with_grad else None
    count = (target != ignore_index).sum() if reduction == "mean" else None
    BLOCK = triton.next_power_of_2(V) if V <= ONE_READ else ONE_READ // 2
    with torch.cuda.device_of(input):
        _fwd_kernel[(N,)](
            input, target, count, loss, stats, grad,
            input.stride(), target.stride(0), grad.stride() if with_grad else (0, 0),
            V, ignore_index, WHOLE=V <= ONE_READ, BLOCK=BLOCK, num_warps=_num_warps(BLOCK), **ASSERT,
        )
    if reduction != "none":
        loss = loss.sum() if count is None else loss.sum() / count
    return loss, stats, grad if with_grad else input.new_empty(0)


def bwd(dloss, input, target, stats, ignore_index, reduction):
    N, V = input.shape
    grad = torch.empty_like(input)
    count = (target != ignore_index).sum() if reduction == "mean" else None
    BLOCK = min(4096, triton.next_power_of_2(V))
    with torch.cuda.device_of(input):
        _bwd_kernel[(N * triton.cdiv(V, BLOCK),)](
            dloss, input, target, stats, count, grad,
            dloss.stride(0) if dloss.dim() else 0, input.stride(), target.stride(0), stats.stride(), grad.stride(),
            V, ignore_index, BLOCK=BLOCK, num_warps=_num_warps(BLOCK), **ASSERT,
        )
    return grad


def scale_(x, scale):
    """x, (N, V), times the scalar that scale holds on the device; where that is 1 nothing is read."""
    x = x.T if x.stride(0) < x.stride(1) else x
    rows, cols = (1, x.numel()) if x.is_contiguous() else x.shape
    with torch.cuda.device_of(x):
        _scale_kernel[(PROGRAMS,)](x, scale, x.stride(), rows, cols, BLOCK=4096)


def _num_warps(BLOCK):
    return max(1, min(16, BLOCK // 512))

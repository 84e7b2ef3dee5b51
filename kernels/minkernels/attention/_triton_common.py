"""What the attention kernels share: where a program works, what it loads, and what the options make of its scores.

A tile that is as wide as a head dim is a tuple of one or two, since tl.dot takes powers of two alone: 96 = 64 + 32. DIMS says how:
(head dim, first width, second width or 0).
"""

import triton
import triton.language as tl

from minkernels._triton_math import INF, LOG2E, tanh

LN2 = tl.constexpr(0.6931471805599453)
SIZES = [  # any value runs the same code: one compilation for all
    "H", "Hkv", "M", "N", "rows", "cols", "heads", "heads_at_once", "left", "right", "drop", "stats_stride", "pad", "parts", "part",
]  # fmt: skip


@triton.jit
def program(tiles, heads, heads_at_once):
    """This program's tile and head. Heads take turns, heads_at_once at a time, which keeps what they read in the L2 cache;
    of those, tile 0 of each comes first: under causality it is the longest."""
    pid = tl.program_id(0)
    first = pid // (tiles * heads_at_once) * heads_at_once
    pid = pid % (tiles * heads_at_once)
    count = tl.minimum(heads - first, heads_at_once)
    return pid // count, (first + pid % count).to(tl.int64)  # int64: offsets can pass 2**31


@triton.jit
def sequence(b, sequences, KvLens, CuQ, CuK, M, N, rows, cols):
    """Sequence b: the batch it lies in, its first query and how many, its first key and how many. M, N: those of the longest;
    rows, cols: those of a batch. Wrong lengths stop the kernel, and if asserts are off they read nothing out of bounds."""
    if CuQ is not None:
        first_m, M = _packed(b, sequences, CuQ, M, rows)
        first_n, N = _packed(b, sequences, CuK, N, cols)
        return tl.cast(0, tl.int64), first_m, M, first_n, N
    else:
        if KvLens is not None:
            keys = tl.load(KvLens + b)
            tl.device_assert((keys >= 0) & (keys <= N), "kv_lens out of range")
            N = tl.minimum(tl.maximum(keys, 0), N)
        return b, 0, M, 0, N


@triton.jit
def _packed(b, sequences, Cu, longest, total):
    start, end = tl.load(Cu + b), tl.load(Cu + b + 1)
    tl.device_assert((start >= 0) & (start <= end) & (end <= total) & (end - start <= longest), "cu_seqlens out of range")
    tl.device_assert(((b > 0) | (start == 0)) & ((b + 1 < sequences) | (end == total)), "cu_seqlens leave something out")
    start = tl.minimum(tl.maximum(start, 0), total)
    return start.to(tl.int64), tl.minimum(tl.maximum(end - start, 0), tl.minimum(total - start, longest))


@triton.jit
def aligned(strides, UNIT: tl.constexpr):
    """The same strides, now known to be multiples of UNIT, but for the last: Triton finds out multiples of 16 alone by itself."""
    return strides[0] // UNIT * UNIT, strides[1] // UNIT * UNIT, strides[2] // UNIT * UNIT, strides[3]


@triton.jit
def head(X, b, h, first, strides):
    return X + b * strides[0] + h * strides[1] + first * strides[2]


@triton.jit
def at(rows, cols, strides, g=None):
    """Offsets of a tile; g: the head of each row, where they differ."""
    offs = rows.to(tl.int64)[:, None] * strides[2] + cols.to(tl.int64)[None, :] * strides[3]
    if g is not None:
        offs += g.to(tl.int64)[:, None] * strides[1]
    return offs


@triton.jit
def load_tile(ptrs, rows, cols):
    """The tile at ptrs, 0 where rows or cols is False (None: True for all)."""
    if rows is None and cols is None:
        return tl.load(ptrs)
    elif rows is None:
        return tl.load(ptrs, mask=cols[None, :], other=0.0)
    elif cols is None:
        return tl.load(ptrs, mask=rows[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=rows[:, None] & cols[None, :], other=0.0)


@triton.jit
def load(X, rows, strides, mask, DIMS: tl.constexpr, g=None):
    """These rows of X, 0 where mask is False (None: True for all)."""
    cols = tl.arange(0, DIMS[1])
    first = load_tile(X + at(rows, cols, strides, g), mask, cols < DIMS[0] if DIMS[1] > DIMS[0] else None)
    if DIMS[2] == 0:
        return (first,)
    else:
        cols = DIMS[1] + tl.arange(0, DIMS[2])
        return first, load_tile(X + at(rows, cols, strides, g), mask, cols < DIMS[0] if DIMS[1] + DIMS[2] > DIMS[0] else None)


@triton.jit
def store(X, x, rows, strides, mask, DIMS: tl.constexpr, g=None):
    cols = tl.arange(0, DIMS[1])
    tl.store(X + at(rows, cols, strides, g), x[0].to(X.dtype.element_ty), mask=mask[:, None] & (cols < DIMS[0])[None, :])
    if DIMS[2]:
        cols = DIMS[1] + tl.arange(0, DIMS[2])
        tl.store(X + at(rows, cols, strides, g), x[1].to(X.dtype.element_ty), mask=mask[:, None] & (cols < DIMS[0])[None, :])


@triton.jit
def load_keys(KeyMask, stride, offs_n, N):
    return tl.load(KeyMask + offs_n.to(tl.int64) * stride, mask=offs_n < N, other=0) != 0


@triton.jit
def zeros(ROWS: tl.constexpr, DIMS: tl.constexpr):
    FIRST: tl.constexpr = DIMS[1]
    SECOND: tl.constexpr = DIMS[2]
    if SECOND == 0:
        return (tl.zeros((ROWS, FIRST), tl.float32),)
    else:
        return tl.zeros((ROWS, FIRST), tl.float32), tl.zeros((ROWS, SECOND), tl.float32)


@triton.jit
def times(x, factor):
    if len(x) == 1:
        return ((x[0] * factor).to(x[0].dtype),)
    else:
        return (x[0] * factor).to(x[0].dtype), (x[1] * factor).to(x[1].dtype)


@triton.jit
def where_rows(rows, x):
    """x with zeros, not NaN times 0, where rows is False."""
    if len(x) == 1:
        return (tl.where(rows[:, None], x[0], 0.0),)
    else:
        return tl.where(rows[:, None], x[0], 0.0), tl.where(rows[:, None], x[1], 0.0)


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # fp32 products stay fp32, never TF32


@triton.jit
def dot_rows(x, y):
    """x @ y.T, over the head dim."""
    s = _dot(x[0], tl.trans(y[0]))
    if len(x) == 2:
        s = _dot(x[1], tl.trans(y[1]), s)
    return s


@triton.jit
def add_dot(acc, p, x):
    """acc + p @ x, over keys or queries."""
    p = p.to(x[0].dtype)
    if len(x) == 1:
        return (_dot(p, x[0], acc[0]),)
    else:
        return _dot(p, x[0], acc[0]), _dot(p, x[1], acc[1])


LEAST = tl.constexpr(-(2.0**126))  # of a bias that is finite


@triton.jit
def scores(s, scale_log2, cap_log2, bias):
    """q @ k.T in log2 units, after softcap and bias, and the slope of the cap. If cap_log2 is the cap in log2 units, scale_log2
    turns q @ k.T into the share of the cap."""
    s *= scale_log2
    slope = 1.0
    if cap_log2 is not None:
        t = tanh(s)
        s = t * cap_log2
        slope = 1.0 - t * t
    if bias is not None:
        s += tl.where(bias < LEAST, tl.where(bias == -INF, -INF, LEAST * LOG2E), bias * LOG2E)  # what is finite stays so
    return s, slope


@triton.jit
def kept(Seed, drop, bh, offs_m, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which probabilities of these queries and the BLOCK_N keys from first, a multiple of 4, dropout keeps. Key j of query i has
    word j % 4 of Philox 4x32-10 at the counter (j // 4, i, bh, 0), in every kernel and whatever its tiles."""
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    c0 = zero + (first // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = tl.philox(tl.load(Seed), c0, zero + offs_m[:, None], zero + bh.to(tl.int32), zero)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >= drop.to(tl.uint32, bitcast=True)


@triton.jit
def key_bounds(
    first_m, last_m, KeyMask, mask_stride, M, N, left, right,
    TOP_LEFT: tl.constexpr, SCAN: tl.constexpr, ROUND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """start, whole, edge, end: of the keys, queries first_m to last_m see none outside start .. end, and all from whole to edge.
    start is a multiple of ROUND, and whole tiles lie between start and whole, and whole and edge."""
    off = 0 if TOP_LEFT else N - M
    last_m = tl.minimum(last_m, M - 1)
    start, shown, end = 0, N, N  # all keys from start to shown are shown
    if KeyMask is not None:
        if SCAN:
            STEP: tl.constexpr = 4096
            start, end = N, 0
            for n in range(0, N, STEP):
                offs_n = n + tl.arange(0, STEP)
                seen = load_keys(KeyMask, mask_stride, offs_n, N)
                start = tl.minimum(start, tl.min(tl.where(seen, offs_n, N), 0))
                shown = tl.minimum(shown, tl.min(tl.where(seen | (offs_n < start), N, offs_n), 0))
                end = tl.maximum(end, tl.max(tl.where(seen, offs_n + 1, 0), 0))
        else:
            shown = 0
    if right is not None:
        shown = tl.minimum(shown, first_m + off + right + 1)
        end = tl.minimum(end, last_m + off + right + 1)
    whole = start
    if left is not None:
        whole = tl.maximum(start, last_m + off - left)
        start = tl.maximum(start, first_m + off - left)
    start = start // ROUND * ROUND
    whole = start + tl.cdiv(whole - start, BLOCK_N) * BLOCK_N
    return start, whole, whole + tl.maximum(shown - whole, 0) // BLOCK_N * BLOCK_N, end

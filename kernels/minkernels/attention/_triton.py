"""Attention on a GPU, in plain Triton: one forward kernel, and two for the backward, so that neither needs atomics.

A kernel owns one tile of a sequence and streams the tiles of the other past it, in two passes: those that are seen whole,
then the edge, where causality or the end of the sequence cuts and alone a mask is paid for.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from minkernels.attention._outputs import like, lse_like

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) == exp2(x * LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
L2_BYTES = 2**25  # keys and values that stay in the L2 cache (40 MB on an A100, 50 on an H100)

TILES = {  # architecture: (kernel, bytes of an element, head dim up to): BLOCK_M, BLOCK_N, num_warps, num_stages
    "any": {  # within the 99 KB of shared memory that every NVIDIA GPU since sm_80 has
        ("fwd", 2, 64): (128, 64, 8, 3),
        ("fwd", 2, 128): (128, 32, 8, 3),
        ("fwd", 2, 256): (64, 32, 8, 2),
        ("dq", 2, 64): (128, 64, 8, 2),
        ("dq", 2, 128): (64, 64, 8, 2),
        ("dq", 2, 256): (32, 32, 4, 2),
        ("dkdv", 2, 64): (64, 128, 8, 2),
        ("dkdv", 2, 128): (64, 64, 8, 2),
        ("dkdv", 2, 256): (32, 32, 8, 2),
        ("fwd", 4, 64): (64, 32, 8, 2),
        ("fwd", 4, 128): (32, 32, 8, 1),
        ("fwd", 4, 256): (32, 16, 8, 1),
        ("dq", 4, 64): (64, 32, 8, 2),
        ("dq", 4, 128): (32, 16, 8, 2),
        ("dq", 4, 256): (16, 16, 8, 2),
        ("dkdv", 4, 64): (32, 32, 8, 1),
        ("dkdv", 4, 128): (16, 16, 8, 2),
        ("dkdv", 4, 256): (16, 16, 8, 1),
    },
    "sm_90": {  # within 227 KB; fp32, which uses no tensor core, is as above
        ("fwd", 2, 64): (128, 128, 8, 3),
        ("fwd", 2, 128): (128, 128, 8, 2),
        ("fwd", 2, 256): (128, 32, 8, 2),
        ("dq", 2, 64): (128, 64, 8, 3),
        ("dq", 2, 128): (128, 64, 8, 2),
        ("dq", 2, 256): (128, 32, 8, 2),
        ("dkdv", 2, 64): (64, 128, 8, 3),
        ("dkdv", 2, 128): (64, 128, 8, 2),
        ("dkdv", 2, 256): (64, 32, 8, 2),
    },
}
SIZES = ["H", "Hkv", "M", "N", "heads", "heads_at_once"]  # any value runs the same code: one compilation for all


@triton.jit
def _program(tiles, heads, heads_at_once):
    """This program's tile and head. Heads take turns, heads_at_once at a time, which keeps what they read in the L2 cache;
    of those, tile 0 of each comes first: under causality it is the longest."""
    pid = tl.program_id(0)
    first = pid // (tiles * heads_at_once) * heads_at_once
    pid = pid % (tiles * heads_at_once)
    count = tl.minimum(heads - first, heads_at_once)
    return pid // count, (first + pid % count).to(tl.int64)  # int64: offsets can pass 2**31


@triton.jit
def _aligned(strides, UNIT: tl.constexpr):
    """The same strides, now known to be multiples of UNIT, but for the last: Triton finds out multiples of 16 alone by itself."""
    return strides[0] // UNIT * UNIT, strides[1] // UNIT * UNIT, strides[2] // UNIT * UNIT, strides[3]


@triton.jit
def _head(X, b, h, strides):
    return X + b * strides[0] + h * strides[1]


@triton.jit
def _at(rows, cols, strides):
    return rows.to(tl.int64)[:, None] * strides[2] + cols.to(tl.int64)[None, :] * strides[3]


@triton.jit
def _load(ptrs, rows, cols):
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
def _load_mask(KeyMask, stride, offs_n, N):
    return tl.load(KeyMask + offs_n.to(tl.int64) * stride, mask=offs_n < N, other=0) != 0


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # fp32 products stay fp32, never TF32


@triton.jit
def _probs(s, scale_log2, lse2, rest):
    """exp(s * scale - lse). lse2: lse in log2 units; rest: what it lacks for want of fp32 digits, or None."""
    if rest is None:
        return tl.exp2(s * scale_log2 - lse2)
    else:
        return tl.exp2((s * scale_log2 - lse2) - rest)


@triton.jit
def _key_bounds(tile, KeyMask, mask_stride, M, N, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """start, edge, end: a tile of queries sees no key outside start .. end, and whole tiles of keys from start to edge."""
    start, shown, end = 0, N, N  # all keys from start to shown are shown
    if KeyMask is not None:
        SCAN: tl.constexpr = 4096
        start, end = N, 0
        for at in range(0, N, SCAN):
            offs_n = at + tl.arange(0, SCAN)
            seen = _load_mask(KeyMask, mask_stride, offs_n, N)
            start = tl.minimum(start, tl.min(tl.where(seen, offs_n, N), 0))
            shown = tl.minimum(shown, tl.min(tl.where(seen | (offs_n < start), N, offs_n), 0))
            end = tl.maximum(end, tl.max(tl.where(seen, offs_n + 1, 0), 0))
    if CAUSAL:  # query i sees keys 0 .. i + N - M
        shown = tl.minimum(shown, tile * BLOCK_M + 1 + N - M)
        end = tl.minimum(end, tile * BLOCK_M + BLOCK_M + N - M)
    return start, start + tl.maximum(shown - start, 0) // BLOCK_N * BLOCK_N, end


@triton.jit(do_not_specialize=SIZES)
def _fwd_kernel(
    Q, K, V, KeyMask, O, LSE,  # (B, H or Hkv, M or N, D or Dv); KeyMask (B, N) bool or None; LSE (B, H, M) nats, wider than Q
    q_strides, k_strides, v_strides, mask_strides, o_strides,  # tuples, in elements
    H, Hkv, M, N, heads, heads_at_once,  # heads = B * H
    scale_log2,  # SIGN * scale_log2 turns q @ k.T into log2 units
    SIGN: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Owns BLOCK_M queries of one head."""
    q_strides, k_strides, v_strides = _aligned(q_strides, UNIT), _aligned(k_strides, UNIT), _aligned(v_strides, UNIT)
    tiles = tl.cdiv(M, BLOCK_M)
    tile, bh = _program(tiles, heads, heads_at_once)
    tile = tiles - 1 - tile  # the last queries see the most keys
    b, h = bh // H, bh % H
    hkv = h // (H // Hkv)
    Q, O = _head(Q, b, h, q_strides), _head(O, b, h, o_strides)
    K, V = _head(K, b, hkv, k_strides), _head(V, b, hkv, v_strides)
    if KeyMask is not None:
        KeyMask += b * mask_strides[0]
    offs_m, offs_d, offs_dv = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_d, mask_dv = offs_d < D if BLOCK_D != D else None, offs_dv < Dv if BLOCK_DV != Dv else None

    q = _load(Q + _at(offs_m, offs_d, q_strides), offs_m < M, mask_d)
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)  # exact; lets a positive scale be applied after the row maximum
    m = tl.full((BLOCK_M,), -INF, tl.float32)  # running max of s * scale, in log2 units
    l = tl.zeros((BLOCK_M,), tl.float32)  # running sum of p
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)  # running sum of p @ v
    last_n = offs_m + N - M  # the last key that each query sees, if causal
    start, edge, end = _key_bounds(tile, KeyMask, mask_strides[1], M, N, CAUSAL, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        for at in range(edge if EDGE else start, end if EDGE else edge, BLOCK_N):
            offs_n = at + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N if EDGE else None
            k = _load(K + _at(offs_n, offs_d, k_strides), mask_n, mask_d)
            s = _dot(q, tl.trans(k))
            if EDGE:
                seen = mask_n if KeyMask is None else _load_mask(KeyMask, mask_strides[1], offs_n, N)
                s = tl.where(seen[None, :], s, -INF)
            if CAUSAL and EDGE:
                s = tl.where(offs_n[None, :] <= last_n[:, None], s, -INF)
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            shift = tl.where(m_new == -INF, 0.0, m_new)  # no key seen so far: avoid inf - inf
            p, alpha = tl.exp2(s * scale_log2 - shift[:, None]), tl.exp2(m - shift)
            l, m = l * alpha + tl.sum(p, 1), m_new
            v = _load(V + _at(offs_n, offs_dv, v_strides), mask_n, mask_dv)
            if EDGE and KeyMask is not None:
                v = tl.where(seen[:, None], v, 0.0)  # padding may hold NaN, and 0 * NaN is NaN
            acc = _dot(p.to(v.dtype), v, acc * alpha[:, None])

    l = tl.where(l == 0.0, 1.0, l)  # a query that sees no key: o = 0, lse = -inf
    o = (acc / l[:, None]).to(O.dtype.element_ty)
    tl.store(O + _at(offs_m, offs_dv, o_strides), o, mask=(offs_m < M)[:, None] & (offs_dv < Dv)[None, :])
    lse = m.to(LSE.dtype.element_ty) * LN2 + tl.log(l.to(LSE.dtype.element_ty))
    tl.store(LSE + bh * M + offs_m, lse, mask=offs_m < M)


@triton.jit(do_not_specialize=SIZES)
def _dq_kernel(
    DO, Q, K, V, O, LSE, KeyMask, DQ,  # as above
    LSE2, Rest, Delta,  # for _dkdv_kernel, (B, H, whole tiles of M) fp32: see _probs; Delta = sum(do * o)
    do_strides, q_strides, k_strides, v_strides, o_strides, mask_strides, dq_strides,
    H, Hkv, M, N, heads, heads_at_once,
    scale, scale_log2,  # turn q @ k.T into nats, and into log2 units
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Owns BLOCK_M queries of one head."""
    q_strides, k_strides, v_strides = _aligned(q_strides, UNIT), _aligned(k_strides, UNIT), _aligned(v_strides, UNIT)
    do_strides = _aligned(do_strides, UNIT)
    tiles = tl.cdiv(M, BLOCK_M)
    tile, bh = _program(tiles, heads, heads_at_once)
    tile = tiles - 1 - tile
    b, h = bh // H, bh % H
    hkv = h // (H // Hkv)
    Q, DQ = _head(Q, b, h, q_strides), _head(DQ, b, h, dq_strides)
    O, DO = _head(O, b, h, o_strides), _head(DO, b, h, do_strides)
    K, V = _head(K, b, hkv, k_strides), _head(V, b, hkv, v_strides)
    if KeyMask is not None:
        KeyMask += b * mask_strides[0]
    offs_m, offs_d, offs_dv = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_m = offs_m < M
    mask_d, mask_dv = offs_d < D if BLOCK_D != D else None, offs_dv < Dv if BLOCK_DV != Dv else None

    q = _load(Q + _at(offs_m, offs_d, q_strides), mask_m, mask_d)
    do = _load(DO + _at(offs_m, offs_dv, do_strides), mask_m, mask_dv)
    o = _load(O + _at(offs_m, offs_dv, o_strides), mask_m, mask_dv)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(LSE + bh * M + offs_m, mask=mask_m, other=-INF)
    lse = tl.where(lse == -INF, 2.0**127, lse * LOG2E)  # a query that sees no key: p = 0
    lse2, stats = lse.to(tl.float32), bh * (tiles * BLOCK_M) + offs_m
    rest = None
    if Rest is not None:
        rest = (lse - lse2).to(tl.float32)[:, None]
        tl.store(Rest + stats[:, None], rest)
    tl.store(LSE2 + stats, lse2)
    tl.store(Delta + stats, delta)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last_n = offs_m + N - M  # the last key that each query sees, if causal
    start, edge, end = _key_bounds(tile, KeyMask, mask_strides[1], M, N, CAUSAL, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        for at in range(edge if EDGE else start, end if EDGE else edge, BLOCK_N):
            offs_n = at + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N if EDGE else None
            seen = _load_mask(KeyMask, mask_strides[1], offs_n, N) if EDGE and KeyMask is not None else mask_n
            k = _load(K + _at(offs_n, offs_d, k_strides), seen, mask_d)
            p = _probs(_dot(q, tl.trans(k)), scale_log2, lse2[:, None], rest)
            v = _load(V + _at(offs_n, offs_dv, v_strides), mask_n, mask_dv)
            ds = p * (_dot(do, tl.trans(v)) - delta[:, None])
            if EDGE:
                ds = tl.where(seen[None, :], ds, 0.0)
            if CAUSAL and EDGE:
                ds = tl.where(offs_n[None, :] <= last_n[:, None], ds, 0.0)
            dq = _dot(ds.to(k.dtype), k, dq)

    dq = (dq * scale).to(DQ.dtype.element_ty)
    tl.store(DQ + _at(offs_m, offs_d, dq_strides), dq, mask=mask_m[:, None] & (offs_d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _dkdv_kernel(
    DO, Q, K, V, LSE2, Rest, Delta, KeyMask, DK, DV,
    do_strides, q_strides, k_strides, v_strides, mask_strides, dk_strides, dv_strides,
    H, Hkv, M, N, heads, heads_at_once, stats_stride,  # heads = B * Hkv; stats_stride from head to head in LSE2 and Delta
    scale, scale_log2,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Owns BLOCK_N keys of one key head; each query head that reads it streams past. A hidden key spoils only its own row of
    dk and dv, which is zeroed at the end."""
    q_strides, k_strides, v_strides = _aligned(q_strides, UNIT), _aligned(k_strides, UNIT), _aligned(v_strides, UNIT)
    do_strides = _aligned(do_strides, UNIT)
    tile, bh = _program(tl.cdiv(N, BLOCK_N), heads, heads_at_once)
    b, h, group = bh // Hkv, bh % Hkv, H // Hkv
    K, DK = _head(K, b, h, k_strides), _head(DK, b, h, dk_strides)
    V, DV = _head(V, b, h, v_strides), _head(DV, b, h, dv_strides)
    Q, DO = _head(Q, b, h * group, q_strides), _head(DO, b, h * group, do_strides)
    offs_n, offs_d, offs_dv = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_n = offs_n < N
    mask_d, mask_dv = offs_d < D if BLOCK_D != D else None, offs_dv < Dv if BLOCK_DV != Dv else None

    k = _load(K + _at(offs_n, offs_d, k_strides), mask_n, mask_d)
    v = _load(V + _at(offs_n, offs_dv, v_strides), mask_n, mask_dv)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    start, whole, end = 0, 0, tl.cdiv(M, BLOCK_M)  # tiles: from start on they see some of these keys, from whole on all
    if CAUSAL:
        start = tl.minimum(tl.maximum(tile * BLOCK_N - N + M, 0) // BLOCK_M, end)
        whole = tl.minimum(tl.cdiv(tl.maximum(tile * BLOCK_N + BLOCK_N - 1 - N + M, 0), BLOCK_M), end)
    first_m = offs_n + M - N  # the first query that sees each key, if causal
    turns = group
    if KeyMask is not None:
        seen = _load_mask(KeyMask + b * mask_strides[0], mask_strides[1], offs_n, N)
        turns = group * tl.max(seen.to(tl.int32), 0)  # 0 if every key is hidden
    for EDGE in tl.static_range(2 if CAUSAL else 1):
        first = start if EDGE else whole
        count = (whole if EDGE else end) - first
        for i in range(turns * count):  # heads and tiles in one loop: two nested ones cost registers
            g, offs_m = tl.cast(i // count, tl.int64), (first + i % count) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m, stats = offs_m < M, (bh * group + g) * stats_stride + offs_m
            q = _load(Q + g * q_strides[1] + _at(offs_m, offs_d, q_strides), mask_m, mask_d)
            do = _load(DO + g * do_strides[1] + _at(offs_m, offs_dv, do_strides), mask_m, mask_dv)
            rest = None if Rest is None else tl.load(Rest + stats)[None, :]
            p = _probs(_dot(k, tl.trans(q)), scale_log2, tl.load(LSE2 + stats)[None, :], rest)  # (BLOCK_N, BLOCK_M), as is ds
            if EDGE:
                p = tl.where(first_m[:, None] <= offs_m[None, :], p, 0.0)
            dv = _dot(p.to(do.dtype), do, dv)
            ds = p * (_dot(v, tl.trans(do)) - tl.load(Delta + stats)[None, :])
            dk = _dot(ds.to(q.dtype), q, dk)

    if KeyMask is not None:
        dk, dv = tl.where(seen[:, None], dk, 0.0), tl.where(seen[:, None], dv, 0.0)
    dk, dv = (dk * scale).to(DK.dtype.element_ty), dv.to(DV.dtype.element_ty)
    tl.store(DK + _at(offs_n, offs_d, dk_strides), dk, mask=mask_n[:, None] & (offs_d < D)[None, :])
    tl.store(DV + _at(offs_n, offs_dv, dv_strides), dv, mask=mask_n[:, None] & (offs_dv < Dv)[None, :])


def fwd(q, k, v, key_mask, causal, scale):
    (B, H, M, D), (Hkv, N, Dv) = q.shape, v.shape[1:]
    o, lse = like(q, Dv), lse_like(q)
    options = _options("fwd", q, Dv)
    with torch.cuda.device_of(q):
        _fwd_kernel[(triton.cdiv(M, options["BLOCK_M"]) * B * H,)](
            q, k, v, key_mask, o, lse,
            q.stride(), k.stride(), v.stride(), _mask_strides(key_mask), o.stride(),
            H, Hkv, M, N, B * H, _heads_at_once(B * H, k, v),
            max(abs(scale) * math.log2(math.e), 2.0**-126),  # not 0 in fp32: 0 * -inf is NaN
            SIGN=(scale > 0) - (scale < 0), CAUSAL=causal, UNIT=_unit(q, k, v), D=D, Dv=Dv, **options,
        )
    return o, lse


def bwd(do, q, k, v, o, lse, key_mask, causal, scale):
    (B, H, M, D), (Hkv, N, Dv) = q.shape, v.shape[1:]
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    strides = do.stride(), q.stride(), k.stride(), v.stride()
    scales, unit = (scale, scale * math.log2(math.e)), _unit(do, q, k, v)
    options = _options("dq", q, Dv)
    tiles = triton.cdiv(M, options["BLOCK_M"])
    lse2, rest, delta = q.new_empty((3, B, H, tiles * options["BLOCK_M"]), dtype=torch.float32)
    rest = rest if q.dtype == torch.float32 else None
    with torch.cuda.device_of(q):
        _dq_kernel[(tiles * B * H,)](
            do, q, k, v, o, lse.contiguous(), key_mask, dq, lse2, rest, delta,
            *strides, o.stride(), _mask_strides(key_mask), dq.stride(),
            H, Hkv, M, N, B * H, _heads_at_once(B * H, k, v), *scales,
            CAUSAL=causal, UNIT=unit, D=D, Dv=Dv, **options,
        )
        options = _options("dkdv", q, Dv)
        _dkdv_kernel[(triton.cdiv(N, options["BLOCK_N"]) * B * Hkv,)](
            do, q, k, v, lse2, rest, delta, key_mask, dk, dv,
            *strides, _mask_strides(key_mask), dk.stride(), dv.stride(),
            H, Hkv, M, N, B * Hkv, _heads_at_once(B * Hkv, q, do), lse2.stride(1), *scales,
            CAUSAL=causal, UNIT=unit, D=D, Dv=Dv, **options,
        )
    return dq, dk, dv


def _options(kernel, q, Dv):
    """What a kernel is compiled for: tiles from the table, and head dims rounded up to what tl.dot takes."""
    BLOCK_D, BLOCK_DV = (max(16, triton.next_power_of_2(d)) for d in (q.shape[3], Dv))
    width = max(64, BLOCK_D, BLOCK_DV)
    if (BLOCK_D, BLOCK_DV) != (q.shape[3], Dv):
        width = 256  # the masks of padded head dims take registers too
    key = kernel, q.element_size(), width
    BLOCK_M, BLOCK_N, num_warps, num_stages = TILES.get(_arch(q.device), {}).get(key) or TILES["any"][key]
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    if q.dtype == torch.float32 and not torch.version.hip:
        options["maxnreg"] = 255  # all there are; else ptxas spills here, to make room for programs that never come
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV) | options


@functools.cache
def _arch(device):
    if device.type != "cuda" or torch.version.hip:
        return "any"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _unit(*tensors):
    """How many elements every row of the tensors starts at a multiple of: 16 bytes of them, for wide loads, or 1."""
    unit = 16 // tensors[0].element_size()
    return unit if all(stride % unit == 0 for t in tensors for stride in t.stride()[:3]) else 1


def _mask_strides(key_mask):
    return (0, 0) if key_mask is None else key_mask.stride()


def _heads_at_once(heads, x, y):
    """How many of the heads, which read all of x and y between them, find their part in the L2 cache."""
    return max(1, min(heads, heads * L2_BYTES // max(1, x.nbytes + y.nbytes)))

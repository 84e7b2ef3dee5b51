"""The forward: one kernel that owns queries and streams the keys past them, and one that merges its parts where keys were split."""

import triton.language as tl

from minkernels._triton_launch import kernel
from minkernels._triton_math import INF, LOG2E
from minkernels.attention._triton_common import (
    LN2,
    SIZES,
    add_dot,
    aligned,
    at,
    dot_rows,
    head,
    kept,
    key_bounds,
    load,
    load_keys,
    load_tile,
    program,
    scores,
    sequence,
    store,
    times,
    where_rows,
    zeros,
)


@kernel(do_not_specialize=SIZES)
def _fwd_kernel(
    Q, K, V, O, LSE,  # (B, H or Hkv, M or N, D or Dv), packed or not; LSE (B, H, M) nats, wider than Q
    Bias, Sinks, KeyMask, KvLens, Mask, CuQ, CuK, Seed,  # as in _options.py, or None
    q_strides, k_strides, v_strides, o_strides, bias_strides, mask_strides, key_strides,  # tuples, in elements
    H, Hkv, M, N, rows, cols, heads, heads_at_once,  # M, N: see sequence(); heads = B * H / FOLD
    parts, part,  # the keys are split in parts, and O and LSE hold one after the other, LSE part elements apart
    left, right, scale_log2, cap_log2, drop, keep_scale,  # SIGN * scale_log2 and cap_log2: see scores()
    SIGN: tl.constexpr, TOP_LEFT: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr, VDIMS: tl.constexpr,
    FOLD: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK_M queries of one head, or BLOCK_M / FOLD of each of the FOLD heads that share a key head."""
    q_strides, k_strides, v_strides = aligned(q_strides, UNIT), aligned(k_strides, UNIT), aligned(v_strides, UNIT)
    tiles = tl.cdiv(M * FOLD, BLOCK_M)
    tile, bh = program(tiles, heads, heads_at_once)
    tile = tiles - 1 - tile  # the last queries see the most keys
    bh *= FOLD
    b, h = bh // H, bh % H
    hkv = h // (H // Hkv)
    batch, first_m, M, first_n, N = sequence(b, heads * FOLD // H, KvLens, CuQ, CuK, M, N, rows, cols)
    if CuQ is not None:  # noqa: SIM102  Triton takes the first for a constant, the second not
        if tile * BLOCK_M >= M * FOLD:
            return
    if SPLIT:
        O += tl.program_id(1).to(tl.int64) * part * VDIMS[0]
        LSE += tl.program_id(1).to(tl.int64) * part
    Q, O = head(Q, batch, h, first_m, q_strides), head(O, batch, h, first_m, o_strides)
    K, V = head(K, batch, hkv, first_n, k_strides), head(V, batch, hkv, first_n, v_strides)
    LSE += (batch * H + h) * rows + first_m
    if KeyMask is not None:
        KeyMask += b * key_strides[0]
    if Mask is not None:
        Mask = head(Mask, b, h, 0, mask_strides)
    if Bias is not None:
        Bias = head(Bias, b, h, 0, bias_strides)
    offs_m, g = tile * BLOCK_M + tl.arange(0, BLOCK_M), None
    if FOLD > 1:
        offs_m, g = offs_m // FOLD, offs_m % FOLD
    mask_m = offs_m < M

    q = load(Q, offs_m, q_strides, mask_m, DIMS, g)
    if SIGN != 1:
        q = times(q, SIGN)  # exact; lets a positive scale be applied after the row maximum
    m = tl.full((BLOCK_M,), -INF, tl.float32)  # running max of s * unit, in log2 units
    l = tl.zeros((BLOCK_M,), tl.float32)  # running sum of p
    if Sinks is not None:  # a key whose value is 0, which is in the first part
        counts = tl.program_id(1) == 0
        sink = tl.load(Sinks + h + (0 if g is None else g)).to(tl.float32) * LOG2E
        m, l = tl.where(counts, sink, m), tl.where(counts, 1.0, l)
    acc = zeros(BLOCK_M, VDIMS)  # running sum of p @ v
    turns = bh if g is None else (bh + g)[:, None]  # what dropout counts
    RAW: tl.constexpr = Bias is None and cap_log2 is None  # s is q @ k.T, scaled after the maximum: a multiplication less
    unit = scale_log2 if RAW else 1.0
    off = 0 if TOP_LEFT else N - M
    start, whole, edge, end = key_bounds(
        tile * BLOCK_M // FOLD, (tile * BLOCK_M + BLOCK_M - 1) // FOLD, KeyMask, key_strides[1], M, N, left, right,
        TOP_LEFT, not SPLIT, 1 if Seed is None else 4, BLOCK_N,
    )  # fmt: skip
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N), parts) * BLOCK_N
        start += tl.program_id(1) * share
        whole, edge = tl.minimum(tl.maximum(whole, start), start + share), tl.minimum(tl.maximum(edge, start), start + share)
        end = tl.minimum(end, start + share)
    for EDGE in tl.static_range(2):
        for turn in range(edge - (whole - start) if EDGE else whole, end if EDGE else edge, BLOCK_N):
            n = turn
            if EDGE and (left is not None or Seed is not None):
                n = tl.where(turn < edge, turn - (edge - whole), turn)  # the left edge, then the right
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N if EDGE else None
            k = load(K, offs_n, k_strides, mask_n, DIMS)
            s = dot_rows(q, k)
            if not RAW:
                bias = None
                if Bias is not None:
                    bias = load_tile(Bias + at(offs_m, offs_n, bias_strides, g), mask_m, mask_n).to(tl.float32)
                s = scores(s, scale_log2, cap_log2, bias)[0]
            if EDGE:
                seen = mask_n if KeyMask is None else load_keys(KeyMask, key_strides[1], offs_n, N)
                s = tl.where(seen[None, :], s, -INF)
            if EDGE and right is not None:
                s = tl.where(offs_n[None, :] <= (offs_m + (off + right))[:, None], s, -INF)
            if EDGE and left is not None:
                s = tl.where(offs_n[None, :] >= (offs_m + (off - left))[:, None], s, -INF)
            if Mask is not None:
                s = tl.where(load_tile(Mask + at(offs_m, offs_n, mask_strides, g), mask_m, mask_n) != 0, s, -INF)
            m_new = tl.maximum(m, tl.max(s, 1) * unit)
            shift = tl.where(m_new == -INF, 0.0, m_new)  # no key seen so far: avoid inf - inf
            p, alpha = tl.exp2(s * unit - shift[:, None]), tl.exp2(m - shift)
            l, m = l * alpha + tl.sum(p, 1), m_new
            if Seed is not None:
                p = tl.where(kept(Seed, drop, turns, offs_m, n, BLOCK_M, BLOCK_N), p, 0.0)
            v = load(V, offs_n, v_strides, mask_n, VDIMS)
            if EDGE and KeyMask is not None:
                v = where_rows(seen, v)  # padding may hold NaN
            acc = add_dot(times(acc, alpha[:, None]), p, v)

    l = tl.where(l == 0.0, 1.0, l)  # a query that sees no key: o = 0, lse = -inf
    weight = 1.0 / l if Seed is None else keep_scale / l
    store(O, times(acc, weight[:, None]), offs_m, o_strides, mask_m, VDIMS, g)
    lse = m.to(LSE.dtype.element_ty) * LN2 + tl.log(l.to(LSE.dtype.element_ty))
    tl.store(LSE + (offs_m if g is None else offs_m + g * rows), lse, mask=mask_m)


@kernel(do_not_specialize=SIZES)
def _merge_kernel(
    Parts, LSEs, O, LSE,  # Parts (parts, B, H, M, Dv) fp32, LSEs (parts, B, H, M)
    o_strides, H, rows, parts, part, Dv: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_PARTS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Owns one query of one head, and loads TURN parts at a time."""
    row = tl.program_id(0).to(tl.int64)
    O = head(O, row // rows // H, row // rows % H, row % rows, o_strides)
    offs, offs_dv = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_DV)
    lses = tl.load(LSEs + offs * tl.cast(part, tl.int64) + row, mask=offs < parts, other=-INF)
    top = tl.max(lses, 0)
    top = tl.where(top == -INF, 0.0, top)  # no key in any part: avoid inf - inf
    total = tl.sum(tl.exp2((lses - top) * LOG2E), 0)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for first in range(0, parts, TURN):
        i = first + tl.arange(0, TURN)
        at_part, mask = i * tl.cast(part, tl.int64) + row, i < parts
        weight = tl.exp2((tl.load(LSEs + at_part, mask=mask, other=-INF) - top) * LOG2E).to(tl.float32)
        acc += tl.sum(weight[:, None] * load_tile(Parts + at_part[:, None] * Dv + offs_dv[None, :], mask, offs_dv < Dv), 0)
    acc /= tl.where(total == 0.0, 1.0, total).to(tl.float32)
    tl.store(O + offs_dv * o_strides[3], acc.to(O.dtype.element_ty), mask=offs_dv < Dv)
    tl.store(LSE + row, top + tl.log(total))

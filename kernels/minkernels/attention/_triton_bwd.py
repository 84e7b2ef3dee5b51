"""The backward: a kernel that owns queries, one that owns keys, and one that owns a bias which queries or heads share, so that
none needs atomics. All rebuild p from lse."""

import triton
import triton.language as tl

from minkernels._triton_launch import kernel
from minkernels._triton_math import INF, LOG2E
from minkernels.attention._triton_common import (
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


@triton.jit
def _probs(s, lse2, rest, bias):
    """exp2(s - lse). lse2: lse in log2 units; rest: what it lacks for want of fp32 digits, or None."""
    log_p = s - lse2 if rest is None else (s - lse2) - rest
    if bias is not None:
        log_p = tl.where(log_p > 0, 0.0, log_p)  # an lse of -1e9 in fp32 may be off by 64
    return tl.exp2(log_p)


@triton.jit
def _sum_products(x, y):
    """(x * y).sum(-1), in fp32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if len(x) == 2:
        total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
    return total


@kernel(do_not_specialize=SIZES)
def _dq_kernel(
    DO, DLSE, Q, K, V, O, LSE, DQ, DBias,  # as in the forward; DBias (B, H, M, N) or None
    LSE2, Rest, Delta,  # for the others, fp32, of each head and sequence whole tiles of M: see _probs; Delta = sum(do * o) - dlse
    Bias, KeyMask, KvLens, Mask, CuQ, CuK, Seed,
    do_strides, q_strides, k_strides, v_strides, o_strides, dq_strides, bias_strides, mask_strides, key_strides, dbias_strides,
    H, Hkv, M, N, rows, cols, heads, heads_at_once,
    stats_stride, pad,  # from head to head in LSE2, Rest and Delta; what a packed sequence has more of there
    left, right, scale, scale_log2, cap_log2, drop, keep_scale,
    TOP_LEFT: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr, VDIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK_M queries of one head."""
    q_strides, k_strides, v_strides = aligned(q_strides, UNIT), aligned(k_strides, UNIT), aligned(v_strides, UNIT)
    do_strides = aligned(do_strides, UNIT)
    tiles = tl.cdiv(M, BLOCK_M)
    tile, bh = program(tiles, heads, heads_at_once)
    tile = tiles - 1 - tile
    b, h = bh // H, bh % H
    hkv = h // (H // Hkv)
    batch, first_m, M, first_n, N = sequence(b, heads // H, KvLens, CuQ, CuK, M, N, rows, cols)
    if CuQ is not None:  # noqa: SIM102  Triton takes the first for a constant, the second not
        if tile * BLOCK_M >= M:
            return
    Q, DQ = head(Q, batch, h, first_m, q_strides), head(DQ, batch, h, first_m, dq_strides)
    O, DO = head(O, batch, h, first_m, o_strides), head(DO, batch, h, first_m, do_strides)
    K, V = head(K, batch, hkv, first_n, k_strides), head(V, batch, hkv, first_n, v_strides)
    if KeyMask is not None:
        KeyMask += b * key_strides[0]
    if Mask is not None:
        Mask = head(Mask, b, h, 0, mask_strides)
    if Bias is not None:
        Bias = head(Bias, b, h, 0, bias_strides)
    if DBias is not None:
        DBias = head(DBias, b, h, 0, dbias_strides)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M

    q = load(Q, offs_m, q_strides, mask_m, DIMS)
    do = load(DO, offs_m, do_strides, mask_m, VDIMS)
    delta = _sum_products(do, load(O, offs_m, o_strides, mask_m, VDIMS))
    at_lse = (batch * H + h) * rows + first_m + offs_m
    if DLSE is not None:
        delta -= tl.load(DLSE + at_lse, mask=mask_m, other=0.0).to(tl.float32)
    lse = tl.load(LSE + at_lse, mask=mask_m, other=-INF)
    delta = tl.where(lse == -INF, 0.0, delta)  # a query that sees no key: p = 0, and so is ds, whatever comes from above
    lse = tl.where(lse == -INF, 2.0**127, lse * LOG2E)
    lse2, stats = lse.to(tl.float32), (batch * H + h) * stats_stride + first_m + b * pad + offs_m
    rest = None
    if Rest is not None:
        rest = (lse - lse2).to(tl.float32)[:, None]
        tl.store(Rest + stats[:, None], rest)
    tl.store(LSE2 + stats, lse2)
    tl.store(Delta + stats, delta)
    dq = zeros(BLOCK_M, DIMS)
    off = 0 if TOP_LEFT else N - M
    start, whole, edge, end = key_bounds(
        tile * BLOCK_M, tile * BLOCK_M + BLOCK_M - 1, KeyMask, key_strides[1], M, N, left, right,
        TOP_LEFT, True, 1 if Seed is None else 4, BLOCK_N,
    )  # fmt: skip
    for EDGE in tl.static_range(2):
        for turn in range(edge - (whole - start) if EDGE else whole, end if EDGE else edge, BLOCK_N):
            n = turn
            if EDGE and (left is not None or Seed is not None):
                n = tl.where(turn < edge, turn - (edge - whole), turn)  # the left edge, then the right
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N if EDGE else None
            seen = load_keys(KeyMask, key_strides[1], offs_n, N) if EDGE and KeyMask is not None else mask_n
            k = load(K, offs_n, k_strides, seen, DIMS)
            bias = None
            if Bias is not None:
                bias = load_tile(Bias + at(offs_m, offs_n, bias_strides), mask_m, mask_n).to(tl.float32)
            s, slope = scores(dot_rows(q, k), scale_log2, cap_log2, bias)
            p = _probs(s, lse2[:, None], rest, bias)
            dp = dot_rows(do, load(V, offs_n, v_strides, mask_n, VDIMS))
            if Seed is not None:
                dp = tl.where(kept(Seed, drop, bh, offs_m, n, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if EDGE:
                ds = tl.where(seen[None, :], ds, 0.0)
            if EDGE and right is not None:
                ds = tl.where(offs_n[None, :] <= (offs_m + (off + right))[:, None], ds, 0.0)
            if EDGE and left is not None:
                ds = tl.where(offs_n[None, :] >= (offs_m + (off - left))[:, None], ds, 0.0)
            if Mask is not None:
                ds = tl.where(load_tile(Mask + at(offs_m, offs_n, mask_strides), mask_m, mask_n) != 0, ds, 0.0)
            if DBias is not None:
                mask = mask_m[:, None] & (offs_n < N)[None, :]
                tl.store(DBias + at(offs_m, offs_n, dbias_strides), ds.to(DBias.dtype.element_ty), mask=mask)
            dq = add_dot(dq, ds * slope, k)

    store(DQ, times(dq, scale), offs_m, dq_strides, mask_m, DIMS)


@kernel(do_not_specialize=SIZES)
def _dkdv_kernel(
    DO, Q, K, V, DK, DV, LSE2, Rest, Delta,
    Bias, KeyMask, KvLens, Mask, CuQ, CuK, Seed,
    do_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides, bias_strides, mask_strides, key_strides,
    H, Hkv, M, N, rows, cols, heads, heads_at_once, stats_stride, pad,  # heads = B * Hkv
    left, right, scale, scale_log2, cap_log2, drop, keep_scale,
    TOP_LEFT: tl.constexpr, UNIT: tl.constexpr, DIMS: tl.constexpr, VDIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK_N keys of one key head; each query head that reads it streams past. A hidden key spoils only its own row of
    dk and dv, which is zeroed at the end."""
    q_strides, k_strides, v_strides = aligned(q_strides, UNIT), aligned(k_strides, UNIT), aligned(v_strides, UNIT)
    do_strides = aligned(do_strides, UNIT)
    tile, bh = program(tl.cdiv(N, BLOCK_N), heads, heads_at_once)
    b, hkv, group = bh // Hkv, bh % Hkv, H // Hkv
    h, allotted = hkv * group, N
    batch, first_m, M, first_n, N = sequence(b, heads // Hkv, KvLens, CuQ, CuK, M, N, rows, cols)
    if CuQ is not None:
        allotted = N
        if tile * BLOCK_N >= N:
            return
    K, DK = head(K, batch, hkv, first_n, k_strides), head(DK, batch, hkv, first_n, dk_strides)
    V, DV = head(V, batch, hkv, first_n, v_strides), head(DV, batch, hkv, first_n, dv_strides)
    Q, DO = head(Q, batch, h, first_m, q_strides), head(DO, batch, h, first_m, do_strides)
    if Mask is not None:
        Mask = head(Mask, b, h, 0, mask_strides)
    if Bias is not None:
        Bias = head(Bias, b, h, 0, bias_strides)
    stats = (batch * H + h) * stats_stride + first_m + b * pad
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    k = load(K, offs_n, k_strides, mask_n, DIMS)
    v = load(V, offs_n, v_strides, mask_n, VDIMS)
    dk = zeros(BLOCK_N, DIMS)
    dv = zeros(BLOCK_N, VDIMS)
    off = 0 if TOP_LEFT else N - M
    start, whole, edge, end = 0, 0, tl.cdiv(M, BLOCK_M), tl.cdiv(M, BLOCK_M)  # tiles: none sees these keys outside start .. end, and
    if right is not None:  # all do from whole to edge
        start = tl.minimum(tl.maximum(tile * BLOCK_N - off - right, 0) // BLOCK_M, end)
        whole = tl.minimum(tl.cdiv(tl.maximum(tile * BLOCK_N + BLOCK_N - 1 - off - right, 0), BLOCK_M), end)
    if left is not None:
        end = tl.minimum(tl.cdiv(tl.maximum(tl.minimum(tile * BLOCK_N + BLOCK_N, N) - off + left, 0), BLOCK_M), end)
        whole = tl.minimum(whole, end)
        edge = tl.minimum(tl.maximum((tile * BLOCK_N - off + left + 1) // BLOCK_M, whole), end)
    turns = group  # of tiles
    seen = mask_n
    if KeyMask is not None:
        seen = load_keys(KeyMask + b * key_strides[0], key_strides[1], offs_n, N)
        turns = group * tl.max(seen.to(tl.int32), 0)  # 0 if every key is hidden
    if KvLens is not None:
        turns = tl.where(tile * BLOCK_N < N, turns, 0)
    for EDGE in tl.static_range(1 if left is None and right is None else 2):
        count = edge - whole
        if EDGE:
            count = whole - start if left is None else (end - start) - (edge - whole)
        for i in range(turns * count):  # heads and tiles in one loop: two nested ones cost registers
            g, turn = tl.cast(i // count, tl.int64), i % count
            if EDGE:
                turn += start
                if left is not None:
                    turn = tl.where(turn < whole, turn, turn + (edge - whole))  # the tiles before whole, then those from edge on
            else:
                turn += whole
            offs_m = turn * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m, at_stats = offs_m < M, stats + g * stats_stride + offs_m
            q = load(Q + g * q_strides[1], offs_m, q_strides, mask_m, DIMS)
            do = load(DO + g * do_strides[1], offs_m, do_strides, mask_m, VDIMS)
            bias = None  # (BLOCK_N, BLOCK_M), as all below
            if Bias is not None:
                turned = bias_strides[0], bias_strides[1], bias_strides[3], bias_strides[2]
                bias = load_tile(Bias + g * bias_strides[1] + at(offs_n, offs_m, turned), mask_n, mask_m).to(tl.float32)
            s, slope = scores(dot_rows(k, q), scale_log2, cap_log2, bias)
            p = _probs(s, tl.load(LSE2 + at_stats)[None, :], None if Rest is None else tl.load(Rest + at_stats)[None, :], bias)
            if EDGE and right is not None:
                p = tl.where((offs_n - (off + right))[:, None] <= offs_m[None, :], p, 0.0)
            if EDGE and left is not None:
                p = tl.where((offs_n - (off - left))[:, None] >= offs_m[None, :], p, 0.0)
            if Mask is not None:
                turned = mask_strides[0], mask_strides[1], mask_strides[3], mask_strides[2]
                p = tl.where(load_tile(Mask + g * mask_strides[1] + at(offs_n, offs_m, turned), mask_n, mask_m) != 0, p, 0.0)
            if Seed is None:
                dv = add_dot(dv, p, do)
                dp = dot_rows(v, do)
            else:
                keep = tl.trans(kept(Seed, drop, b * H + h + g, offs_m, tile * BLOCK_N, BLOCK_M, BLOCK_N))
                dv = add_dot(dv, tl.where(keep, p, 0.0), do)
                dp = tl.where(keep, dot_rows(v, do) * keep_scale, 0.0)
            ds = p * (dp - tl.load(Delta + at_stats)[None, :])
            dk = add_dot(dk, ds * slope, q)

    if KeyMask is not None or KvLens is not None:
        dk, dv = where_rows(seen, dk), where_rows(seen, dv)
    store(DK, times(dk, scale), offs_n, dk_strides, offs_n < allotted, DIMS)
    store(DV, dv if Seed is None else times(dv, keep_scale), offs_n, dv_strides, offs_n < allotted, VDIMS)


@kernel(do_not_specialize=[*SIZES, "bias_h", "bias_m", "bias_n", "turns_b", "turns_h", "turns_m", "turns_n"])
def _dbias_kernel(
    DO, Q, K, V, DBias, LSE2, Rest, Delta,  # DBias (parts, *bias.shape)
    Bias, KeyMask, KvLens, Mask, CuQ, CuK, Seed,  # CuQ and CuK are None: packed sequences have no bias
    do_strides, q_strides, k_strides, v_strides, bias_strides, mask_strides, key_strides,
    H, Hkv, M, N, bias_h, bias_m, bias_n,  # the bias' own H, M and N, 1 where it is shared
    turns_b, turns_h, turns_m, turns_n,  # how many batches, heads and tiles share it: 1 where it is not shared
    parts, part,  # of the turns; DBias has part elements for each
    stats_stride, left, right, scale_log2, cap_log2, drop, keep_scale,
    TOP_LEFT: tl.constexpr, DIMS: tl.constexpr, VDIMS: tl.constexpr,
    SHARED_M: tl.constexpr, SHARED_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Owns a tile of the bias, and takes in turn what shares it."""
    tiles_n, tiles_m = tl.cdiv(bias_n, BLOCK_N), tl.cdiv(bias_m, BLOCK_M)
    pid = tl.program_id(0)
    own_n, own_m, own_bh = pid % tiles_n, pid // tiles_n % tiles_m, pid // (tiles_n * tiles_m)
    own_h, own_b = own_bh % bias_h, own_bh // bias_h
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    turns = turns_b * turns_h * turns_m * turns_n
    share = tl.cdiv(turns, parts)
    for turn in range(tl.program_id(1) * share, tl.minimum(turns, (tl.program_id(1) + 1) * share)):
        n, m = (own_n + turn % turns_n) * BLOCK_N, (own_m + turn // turns_n % turns_m) * BLOCK_M
        bh = turn // (turns_n * turns_m)
        b, h = (own_b + bh // turns_h).to(tl.int64), (own_h + bh % turns_h).to(tl.int64)
        keys = sequence(b, 0, KvLens, CuQ, CuK, M, N, M, N)[4]
        off = 0 if TOP_LEFT else keys - M
        visible = n < keys
        if right is not None:
            visible &= n <= m + BLOCK_M - 1 + off + right
        if left is not None:
            visible &= n + BLOCK_N - 1 >= m + off - left
        if visible:
            offs_m, offs_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
            mask_m, seen = offs_m < M, offs_n < keys
            if KeyMask is not None:
                seen = load_keys(KeyMask + b * key_strides[0], key_strides[1], offs_n, keys)
            hkv, at_stats = h // (H // Hkv), (b * H + h) * stats_stride + offs_m
            do = load(head(DO, b, h, 0, do_strides), offs_m, do_strides, mask_m, VDIMS)
            dp = dot_rows(do, load(head(V, b, hkv, 0, v_strides), offs_n, v_strides, seen, VDIMS))
            q = load(head(Q, b, h, 0, q_strides), offs_m, q_strides, mask_m, DIMS)
            s = dot_rows(q, load(head(K, b, hkv, 0, k_strides), offs_n, k_strides, seen, DIMS))
            bias = load_tile(head(Bias, b, h, 0, bias_strides) + at(offs_m, offs_n, bias_strides), mask_m, seen).to(tl.float32)
            s = scores(s, scale_log2, cap_log2, bias)[0]
            rest = None if Rest is None else tl.load(Rest + at_stats, mask=mask_m, other=0.0)[:, None]
            p = _probs(s, tl.load(LSE2 + at_stats, mask=mask_m, other=2.0**127)[:, None], rest, bias)
            if Seed is not None:
                dp = tl.where(kept(Seed, drop, b * H + h, offs_m, n, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
            keep = mask_m[:, None] & seen[None, :]
            if right is not None:
                keep &= offs_n[None, :] <= (offs_m + (off + right))[:, None]
            if left is not None:
                keep &= offs_n[None, :] >= (offs_m + (off - left))[:, None]
            if Mask is not None:
                keep &= load_tile(head(Mask, b, h, 0, mask_strides) + at(offs_m, offs_n, mask_strides), mask_m, seen) != 0
            acc += tl.where(keep, p * (dp - tl.load(Delta + at_stats, mask=mask_m, other=0.0)[:, None]), 0.0)

    offs_m = own_m * BLOCK_M + tl.arange(0, 1 if SHARED_M else BLOCK_M)
    offs_n = own_n * BLOCK_N + tl.arange(0, 1 if SHARED_N else BLOCK_N)
    acc = tl.sum(acc, 0, keep_dims=True) if SHARED_M else acc
    acc = tl.sum(acc, 1, keep_dims=True) if SHARED_N else acc
    DBias += tl.program_id(1).to(tl.int64) * part + own_bh.to(tl.int64) * bias_m * bias_n
    at_tile = offs_m.to(tl.int64)[:, None] * bias_n + offs_n[None, :]
    tl.store(DBias + at_tile, acc.to(DBias.dtype.element_ty), mask=(offs_m < bias_m)[:, None] & (offs_n < bias_n)[None, :])

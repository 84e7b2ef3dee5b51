"""The kernels of the softmax losses: statistics and losses of rows, their merging where rows were split, gradients.

A program owns a tile of ROWS rows by BLOCK classes, which it moves along the classes. Its rows are positions s of one batch b of (B, V, D),
the row b * D + s of everything that has one value a row. Numbers that are None are options that are off. m, d, T, U, E, and P, Q, H, S:
_options.py. T, U and E are kept relative to the running maximum, or to 0 where that is still -inf.
"""

import triton
import triton.language as tl

from minkernels._triton_launch import kernel
from minkernels._triton_math import INF, blocks_of, exp, tanh

LOOSE = ["tiles", "parts", "share", "ignore_index"]  # any value runs the same code: one compilation for all
NO_HINT = tl.constexpr("")
PARTIAL = tl.constexpr(6)  # numbers that a part leaves of a row: m, d, T, U, E, and the bits of an int32, the first of the largest


@triton.jit
def _rows(pid, tiles, D, ROWS: tl.constexpr):
    """This tile's batch, its positions, and which of them there are."""
    pid = pid.to(tl.int64)  # offsets can pass 2**31
    s = pid % tiles * ROWS + tl.arange(0, ROWS)
    return pid // tiles, s, s < D


@triton.jit
def _labels(Target, b, s, live, strides, V, ignore_index, CHECKED: tl.constexpr):
    """Labels, which rows count, and which labels name a class; without labels, the target being probabilities, all rows count."""
    if Target is None:
        return s, live, live
    else:
        label = tl.load(Target + b * strides[0] + s * strides[1], mask=live, other=0).to(tl.int64)
        counts = live & (label != ignore_index)
        fits = counts & (label >= 0) & (label < V)
        if CHECKED:
            tl.device_assert(fits == counts, "target out of range")
        return label, counts, fits


@triton.jit
def _transform(x, scale, softcap):
    """z. With a softcap, scale is logit_scale / softcap."""
    if softcap is not None:
        return softcap * tanh(x * scale)
    elif scale is not None:
        return x * scale
    else:
        return x


@triton.jit
def _at(s, offs, strides):
    return s[:, None] * strides[2] + offs.to(tl.int64)[None, :] * strides[1]


@triton.jit
def _load_z(X, s, offs, strides, mask, scale, softcap, EVICT: tl.constexpr):
    """z, -inf where masked."""
    x = tl.load(X + _at(s, offs, strides), mask=mask, other=-INF, eviction_policy=EVICT).to(tl.float32)
    if scale is not None:
        x = tl.where(mask, _transform(x, scale, softcap), -INF)  # a negative scale would turn -inf round
    return x


@triton.jit
def _load_c(Probs, Weight, s, offs, strides, mask, V, keep, spread, EVICT: tl.constexpr):
    """c, 0 where masked."""
    c = tl.where(mask, 1.0, 0.0)
    if Probs is not None:
        c = tl.load(Probs + _at(s, offs, strides), mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
        if spread is not None:
            c = tl.where(mask, c * keep + spread, 0.0)
    if Weight is not None:
        c *= tl.load(Weight + offs, mask=offs < V, other=0.0)[None, :]
    return c


@triton.jit
def _add_block(z, c, mask, offs, m, d, T, U, E, best, WEIGHED: tl.constexpr, ENTROPY: tl.constexpr):
    """The numbers of a row with one block more, and exp(z - the running maximum)."""
    top = tl.maximum(m, tl.max(z, 1))
    if ENTROPY:
        best = tl.where(top > m, tl.min(tl.where(z == top[:, None], offs[None, :], 2**31 - 1), 1), best)
    before, shift = tl.where(m == -INF, 0.0, m), tl.where(top == -INF, 0.0, top)  # 0: avoid inf - inf
    above = z - shift[:, None]  # at most 0
    e, alpha = exp(above), exp(m - shift)
    if WEIGHED:
        U += T * (shift - before) - tl.sum(tl.where(mask, c * above, 0.0), 1)
        T += tl.sum(c, 1)
    if ENTROPY:
        E = tl.where(alpha > 0.0, (E + d * (shift - before)) * alpha, 0.0) - tl.sum(tl.where(e > 0.0, e * above, 0.0), 1)
    return top, d * alpha + tl.sum(e, 1), T, U, E, best, e


@triton.jit
def _finish(
    X, Probs, Weight, Divisor, Loss, Stats, Argmax,
    row, s, live, label, counts, fits, m, d, T, U, E, best,
    stride, scale, softcap, keep, spread, z_loss, factor, COLUMNS: tl.constexpr, SHARD: tl.constexpr,
):  # fmt: skip
    """Stores what a row leaves, zeros for one that does not count; returns P, H and S of an upstream gradient of 1, and the label's z."""
    rel, z, w, log_d, f = tl.zeros_like(m), tl.zeros_like(m), tl.full(m.shape, 1.0, tl.float32), tl.log(d), factor
    if Probs is None:
        z = _label_z(X, s, label, fits, stride, scale, softcap)
        rel = tl.where(fits, m - z, 0.0 if SHARD else float("nan"))
        if Weight is not None:
            w = tl.load(Weight + label, mask=fits, other=0.0)
    if Stats is not None:
        tl.store(Stats + row * COLUMNS, tl.where(counts, m, 0.0), mask=live)
        tl.store(Stats + row * COLUMNS + 1, tl.where(counts, d, 0.0), mask=live)
        if COLUMNS > 2:
            tl.store(Stats + row * COLUMNS + 2, tl.where(counts, T, 0.0), mask=live)
        if COLUMNS > 3:
            tl.store(Stats + row * COLUMNS + 3, tl.where(counts, rel, 0.0), mask=live)
            tl.store(Stats + row * COLUMNS + 4, tl.where(counts, U, 0.0), mask=live)
        if COLUMNS > 5:
            tl.store(Stats + row * COLUMNS + 5, tl.where(counts, E, 0.0), mask=live)
    if Argmax is not None:
        tl.store(Argmax + row, tl.where(counts, best, -1).to(tl.int64), mask=live)
    if Divisor is not None:
        f /= tl.load(Divisor).to(tl.float32)
    H, S = keep * w, tl.zeros_like(m)
    if Probs is not None:
        H, S = tl.zeros_like(m), S + 1.0
    elif spread is not None:
        S += spread
    total = H  # the sum of H and S c: what the loss multiplies lse by
    loss = H * (log_d + rel)  # in this order, or the log would drown in a large m
    if Probs is not None or spread is not None:
        total += S * T
        loss += S * (T * log_d + U)
    if z_loss is not None:
        loss += z_loss * w * (m + log_d) * (m + log_d)
        total += 2.0 * z_loss * w * (m + log_d)
    if Loss is not None:
        tl.store(Loss + row, tl.where(counts, loss, 0.0), mask=live)
    return f * total / d, f * H, f * S, z


@triton.jit
def _label_z(X, s, label, fits, stride, scale, softcap):
    return _transform(tl.load(X + s * stride[2] + label * stride[1], mask=fits, other=0.0).to(tl.float32), scale, softcap)


@triton.jit
def _gradient(z, e, c, P, Q, H, S, m, scale, softcap):
    """At the label, where H is not None, and elsewhere."""
    if scale is not None:
        by = scale if softcap is None else scale * softcap
        P, S = P * by, S * by
        if H is not None:
            H *= by
        if Q is not None:
            Q *= by
    g = P[:, None]
    if Q is not None:
        g += Q[:, None] * tl.minimum(m[:, None] - z, 2000.0)  # exp(-2000) is 0, and 0 * inf is NaN
    g = e * g
    if c is not None:
        g -= tl.where(S[:, None] != 0.0, S[:, None] * c, 0.0)
    if H is not None:
        g -= H[:, None]
    if softcap is not None:
        t = z / softcap
        g *= 1.0 - t * t
    return g


@kernel(do_not_specialize=LOOSE)
def _stats_kernel(
    X, Target, Probs, Weight, Divisor,  # (B, V, D); (B, D) labels, or None and (B, V, D); (V,) fp32; what a mean divides by; or None
    Loss, Stats, Argmax, Grad, Parts,  # (B D,) nats, (B D, COLUMNS) fp32, (B D,) int64, (B, V, D), (B D, parts, PARTIAL) fp32; or None
    x_strides, target_strides, probs_strides, grad_strides,  # in elements
    V, D, tiles, parts, share,  # with Parts, program_id(1) has `share` classes, a multiple of BLOCK
    ignore_index, scale, softcap, keep, spread, z_loss, factor,  # keep: 1 - label_smoothing; spread: label_smoothing / V
    COLUMNS: tl.constexpr, SHARD: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,  # WHOLE: V <= BLOCK
):  # fmt: skip
    b, s, live = _rows(tl.program_id(0), tiles, D, ROWS)
    row = b * D + s
    X += b * x_strides[0]
    label, counts, fits = _labels(Target, b, s, live, target_strides, V, ignore_index, not SHARD)
    if Probs is not None:
        Probs += b * probs_strides[0]
    if Grad is not None:
        Grad += b * grad_strides[0]
    WEIGHED: tl.constexpr = Probs is not None or spread is not None
    ENTROPY: tl.constexpr = Argmax is not None
    ONCE: tl.constexpr = "evict_first"
    AGAIN: tl.constexpr = "evict_last" if Grad is not None else "evict_first"
    tile, zero = tl.arange(0, BLOCK), tl.zeros((ROWS,), tl.float32)
    m, d, T, U, E, best = zero - INF, zero, zero, zero, zero, tl.zeros((ROWS,), tl.int32)
    if tl.max(counts.to(tl.int32), 0) > 0:
        if WHOLE:
            mask, c = counts[:, None] & (tile < V)[None, :], None
            z = _load_z(X, s, tile, x_strides, mask, scale, softcap, ONCE)
            if WEIGHED:
                c = _load_c(Probs, Weight, s, tile, probs_strides, mask, V, keep, spread, ONCE)
            m, d, T, U, E, best, e = _add_block(z, c, mask, tile, m, d, T, U, E, best, WEIGHED, ENTROPY)
        else:
            start, stop = 0, V
            if Parts is not None:
                start = tl.program_id(1) * share
                stop = tl.minimum(start + share, V)
            for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
                offs = first + tile
                mask, c = counts[:, None] & (offs < V)[None, :], None
                z = _load_z(X, s, offs, x_strides, mask, scale, softcap, AGAIN)
                if WEIGHED:
                    c = _load_c(Probs, Weight, s, offs, probs_strides, mask, V, keep, spread, AGAIN)
                m, d, T, U, E, best, _ = _add_block(z, c, mask, offs, m, d, T, U, E, best, WEIGHED, ENTROPY)
        if Parts is not None:
            Part = Parts + (row * parts + tl.program_id(1)) * PARTIAL
            tl.store(Part, m, mask=counts)
            tl.store(Part + 1, d, mask=counts)
            if WEIGHED:
                tl.store(Part + 2, T, mask=counts)
                tl.store(Part + 3, U, mask=counts)
            if ENTROPY:
                tl.store(Part + 4, E, mask=counts)
                tl.store(Part + 5, best.to(tl.float32, bitcast=True), mask=counts)
        else:
            P, H, S, label_z = _finish(
                X, Probs, Weight, Divisor, Loss, Stats, Argmax,
                row, s, live, label, counts, fits, m, d, T, U, E, best,
                x_strides, scale, softcap, keep, spread, z_loss, factor, COLUMNS, SHARD,
            )  # fmt: skip
            if Grad is not None:
                tl.debug_barrier()  # Grad may be X: every warp has its label's logit before any is written over
                if WHOLE:
                    g = _gradient(z, e, c, P, None, None, S, m, scale, softcap)
                    _store(Grad, g, s, tile, grad_strides, live, counts, V)
                else:
                    blocks = tl.cdiv(V, BLOCK)
                    for i in tl.range(blocks, num_stages=STAGES):  # from the end, which is what the L2 cache is the surest to hold still
                        offs = (blocks - 1 - i) * BLOCK + tile
                        mask, c = counts[:, None] & (offs < V)[None, :], None
                        z = _load_z(X, s, offs, x_strides, mask, scale, softcap, ONCE)
                        if WEIGHED:
                            c = _load_c(Probs, Weight, s, offs, probs_strides, mask, V, keep, spread, ONCE)
                        g = _gradient(z, exp(z - m[:, None]), c, P, None, None, S, m, scale, softcap)
                        _store(Grad, g, s, offs, grad_strides, live, counts, V, ONCE)
                if Target is not None:
                    _store_label(Grad, Weight, label_z, P, None, H, S, s, label, fits, m, grad_strides, scale, softcap, spread)
    elif Parts is None:  # ignored, and not even read
        _finish(
            X, Probs, Weight, None, Loss, Stats, Argmax,
            row, s, live, label, counts, fits, zero, zero, zero, zero, zero, best,
            x_strides, scale, softcap, keep, spread, z_loss, factor, COLUMNS, SHARD,
        )  # fmt: skip
        if Grad is not None:
            for first in range(0, V, BLOCK):
                _store(Grad, tl.zeros((ROWS, BLOCK), tl.float32), s, first + tile, grad_strides, live, counts, V)


@triton.jit
def _store(Grad, g, s, offs, strides, live, counts, V, EVICT: tl.constexpr = NO_HINT):
    if g.shape[0] > 1:  # a row that does not count and is alone is not computed
        g = tl.where(counts[:, None], g, 0.0)
    tl.store(Grad + _at(s, offs, strides), g.to(Grad.dtype.element_ty), mask=live[:, None] & (offs < V)[None, :], eviction_policy=EVICT)


@triton.jit
def _store_label(Grad, Weight, z, P, Q, H, S, s, label, fits, m, strides, scale, softcap, spread):
    """The gradient at the label, over what the tile, which does not look for it, has left there."""
    tl.debug_barrier()
    z, c = z[:, None], None
    if spread is not None:
        c = tl.full(z.shape, 1.0, tl.float32) if Weight is None else tl.load(Weight + label, mask=fits, other=0.0)[:, None]
    g = _gradient(z, exp(z - m[:, None]), c, P, Q, H, S, m, scale, softcap)
    tl.store(Grad + (s * strides[2] + label * strides[1])[:, None], g.to(Grad.dtype.element_ty), mask=fits[:, None])


@kernel(do_not_specialize=LOOSE)
def _merge_kernel(
    X, Target, Probs, Weight, Divisor, Loss, Stats, Argmax, Parts, Coefficients,  # as above; (B D, 5) fp32 or None
    x_strides, target_strides, V, D, parts,
    ignore_index, scale, softcap, keep, spread, z_loss, factor,
    COLUMNS: tl.constexpr, SHARD: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Owns one row, of which every part has left its numbers."""
    b, s, live = _rows(tl.program_id(0), D, D, 1)
    row = b * D + s
    label, counts, fits = _labels(Target, b, s, live, target_strides, V, ignore_index, not SHARD)
    WEIGHED: tl.constexpr = Probs is not None or spread is not None
    offs = tl.arange(0, BLOCK_PARTS)
    mask = counts[:, None] & (offs < parts)[None, :]
    Part = Parts + (row * parts)[:, None] * PARTIAL + offs[None, :] * PARTIAL
    m, d = tl.load(Part, mask=mask, other=-INF), tl.load(Part + 1, mask=mask, other=0.0)
    top = tl.max(m, 1)
    shift, before = tl.where(top == -INF, 0.0, top)[:, None], tl.where(m == -INF, 0.0, m)
    alpha, T, U, E, best = exp(m - shift), tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top), tl.zeros((1,), tl.int32)
    if WEIGHED:
        t = tl.load(Part + 2, mask=mask, other=0.0)
        T, U = tl.sum(t, 1), tl.sum(tl.where(mask, tl.load(Part + 3, mask=mask, other=0.0) + t * (shift - before), 0.0), 1)
    if Argmax is not None:
        E = tl.sum(tl.where(alpha > 0.0, (tl.load(Part + 4, mask=mask, other=0.0) + d * (shift - before)) * alpha, 0.0), 1)
        bests = tl.load(Part + 5, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        best = tl.min(tl.where(mask & (m == top[:, None]), bests, 2**31 - 1), 1)
    d = tl.sum(d * alpha, 1)
    P, H, S, _ = _finish(
        X + b * x_strides[0], Probs, Weight, Divisor, Loss, Stats, Argmax,
        row, s, live, label, counts, fits, top, d, T, U, E, best,
        x_strides, scale, softcap, keep, spread, z_loss, factor, COLUMNS, SHARD,
    )  # fmt: skip
    if Coefficients is not None:
        tl.store(Coefficients + row * 5, top, mask=counts)
        tl.store(Coefficients + row * 5 + 1, P, mask=counts)
        tl.store(Coefficients + row * 5 + 2, tl.zeros_like(P), mask=counts)
        tl.store(Coefficients + row * 5 + 3, H, mask=counts)
        tl.store(Coefficients + row * 5 + 4, S, mask=counts)


@kernel(do_not_specialize=LOOSE)
def _grad_kernel(
    X, Target, Probs, Weight, Coefficients, Grad,  # as above
    x_strides, target_strides, probs_strides, k_strides, grad_strides,
    V, D, tiles, ignore_index, scale, softcap, keep, spread,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Owns ROWS rows by BLOCK classes, and stays there."""
    blocks = tl.cdiv(V, BLOCK)
    b, s, live = _rows(tl.program_id(0) // blocks, tiles, D, ROWS)
    first = tl.program_id(0) % blocks * BLOCK
    offs = first + tl.arange(0, BLOCK)
    label, counts, fits = _labels(Target, b, s, live, target_strides, V, ignore_index, False)
    X += b * x_strides[0]
    Grad += b * grad_strides[0]
    if tl.max(counts.to(tl.int32), 0) > 0:
        K = Coefficients + (b * D + s) * k_strides[0]
        m, P = tl.load(K, mask=counts, other=0.0), tl.load(K + k_strides[1], mask=counts, other=0.0)
        Q, S = tl.load(K + 2 * k_strides[1], mask=counts, other=0.0), tl.load(K + 4 * k_strides[1], mask=counts, other=0.0)
        mask, c = counts[:, None] & (offs < V)[None, :], None
        z = _load_z(X, s, offs, x_strides, mask, scale, softcap, "evict_first")
        if Probs is not None:
            Probs += b * probs_strides[0]
        if Probs is not None or spread is not None:
            c = _load_c(Probs, Weight, s, offs, probs_strides, mask, V, keep, spread, "evict_first")
        if Target is not None:
            fits = fits & (label >= first) & (label < first + BLOCK)
            label_z, H = _label_z(X, s, label, fits, x_strides, scale, softcap), tl.load(K + 3 * k_strides[1], mask=fits, other=0.0)
            tl.debug_barrier()  # as above
        g = _gradient(z, exp(z - m[:, None]), c, P, Q, None, S, m, scale, softcap)
        _store(Grad, g, s, offs, grad_strides, live, counts, V)
        if Target is not None:
            _store_label(Grad, Weight, label_z, P, Q, H, S, s, label, fits, m, grad_strides, scale, softcap, spread)
    else:
        _store(Grad, tl.zeros((ROWS, BLOCK), tl.float32), s, offs, grad_strides, live, counts, V)


@kernel
def _scale_kernel(X, Scale, sizes, strides, BLOCK: tl.constexpr):
    """x of (., ., .) times what Scale holds; where that is 1 nothing is read."""
    scale = tl.load(Scale).to(tl.float32)
    if scale != 1.0:
        blocks = blocks_of(sizes[2], BLOCK)
        for i in range(tl.program_id(0).to(tl.int64), sizes[0] * sizes[1] * blocks, tl.num_programs(0)):
            row, offs = i // blocks, i % blocks * BLOCK + tl.arange(0, BLOCK)
            ptrs = X + row // sizes[1] * strides[0] + row % sizes[1] * strides[1] + offs * strides[2]
            mask = offs < sizes[2]
            tl.store(ptrs, (tl.load(ptrs, mask=mask).to(tl.float32) * scale).to(X.dtype.element_ty), mask=mask)

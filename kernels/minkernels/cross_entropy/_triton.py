"""Softmax losses on a GPU, in plain Triton: launchers, and the tiles that they launch. _triton_kernels.py holds the kernels.

A row that fits into one tile stays in registers and is read once; of a longer one a loss alone takes one read, its gradient two. Rows whose
positions lie side by side in memory share a tile, and so do short rows. Few and long rows are split over programs, and merged.
"""

import torch

from minkernels._triton_launch import cdiv, next_power_of_2, processors
from minkernels._triton_math import ASSERT, FUSED, registers
from minkernels.cross_entropy._options import (
    Options,
    is_ignored,
    is_labels,
    new_loss,
    new_stats,
    per_row,
    row_weights,
    saved_stats,
    weighted,
)
from minkernels.cross_entropy._triton_kernels import PARTIAL, _grad_kernel, _merge_kernel, _scale_kernel, _stats_kernel

WHOLE = 32768  # elements of the largest tile: half of a processor's registers
TILE = 4096  # elements of a tile that is one of many
SIDE_BY_SIDE = 32  # positions at least, 64 bytes of 16-bit logits, in a tile whose positions lie side by side
MOST_PARTS = 128
SCALE_PROGRAMS = 1024  # enough to fill a GPU, few enough to end at once where there is nothing to do


def fwd(input, target, weight, *options, divisor=None, out=None):
    """divisor: what a mean divides by, where these rows are a part of it. out: where the gradient goes, which may be input."""
    *options, reduction, empty_zero, with_grad = options
    x, rows, factor = Options(*options), target.numel(), 1.0
    labels = is_labels(target)
    if not labels:
        rows //= input.shape[1]
    if reduction != "mean":
        divisor = None
    elif divisor is None:
        if labels:
            w = ~is_ignored(target, x.ignore_index) if weight is None else row_weights(target, weight, x.ignore_index, torch.float32)
            divisor = weighted(w.sum(dtype=torch.float32), empty_zero)
        else:
            factor = 1 / max(1, rows)
    loss = new_loss(input, reduction) if reduction == "none" else input.new_empty(rows, dtype=torch.float32)
    stats, grad = saved_stats(input, target), (torch.empty_like(input) if out is None else out) if with_grad else None
    _rows(input, target, weight, x, divisor, factor, loss, stats, None, grad, False)
    if reduction != "none":
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / (divisor if divisor is not None else rows or int(empty_zero))
    return loss, stats, grad if with_grad else input.new_empty(0)


def stats(input, target, weight, *options):
    *options, shard, entropy = options
    stats = new_stats(input, target.numel(), 6 if entropy else 5)
    argmax = input.new_empty(per_row(input) if entropy else 0, dtype=torch.int64)
    _rows(input, target, weight, Options(*options), None, 1.0, None, stats, argmax if entropy else None, None, shard)
    return stats, argmax


def grad(input, target, weight, coefficients, *options, out=None):
    grad = torch.empty_like(input) if out is None else out
    with torch.cuda.device_of(input):
        _grad(input, target, weight, coefficients, Options(*options), grad)
    return grad


def scale_(x, scale):
    """x, of up to three dimensions, times the scalar that scale holds on the device."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    sizes, strides = ((x.numel(),), (1,)) if x.is_contiguous() else (x.shape, x.stride())
    with torch.cuda.device_of(x):
        _scale_kernel[(SCALE_PROGRAMS,)](
            x, scale, (1, 1, 1)[len(sizes) :] + tuple(sizes), (0, 0, 0)[len(sizes) :] + tuple(strides), BLOCK=4096, **FUSED
        )


def _rows(input, target, weight, x, divisor, factor, loss, stats, argmax, grad, shard):
    """Fills all that is not None."""
    (B, V, D), x_strides = _sizes(input), _strides(input)
    if B * D == 0:
        return
    labels, probs, target_strides, probs_strides = _target(target)
    heavy = (probs is not None) + (x.label_smoothing > 0) + (x.softcap > 0) + (argmax is not None)
    most = WHOLE >> min(heavy, 2) if grad is not None else WHOLE // 4
    ROWS, BLOCK, whole = _tile(V, D, x_strides, most, most // 2)
    tiles, parts, share, scratch = cdiv(D, ROWS), 1, V, None
    if not whole:
        blocks = cdiv(V, BLOCK_SPLIT := TILE // ROWS)
        parts = max(1, min(2 * processors(input.device) // max(1, B * tiles), MOST_PARTS, blocks))
        if parts > 1:
            share = cdiv(blocks, parts)
            parts, share, BLOCK = cdiv(blocks, share), share * BLOCK_SPLIT, BLOCK_SPLIT
            scratch = input.new_empty((B * D, parts, PARTIAL.value), dtype=torch.float32)
    split, num_warps = scratch is not None, _num_warps(ROWS * BLOCK)
    room = registers(2 * num_warps if whole and not heavy and ROWS * BLOCK <= WHOLE // 2 else num_warps)  # for two programs, or for one
    alone = not whole and ROWS * BLOCK > TILE and V % 16 == x_strides[2] % 16 == 0 and not torch.version.hip
    tensors = input, labels, probs, weight, divisor, loss, stats, argmax
    shared = dict(x_strides=x_strides, target_strides=target_strides, V=V, D=D, parts=parts, **_numbers(x, V), z_loss=x.z_loss or None)
    shared |= dict(factor=factor, COLUMNS=stats.shape[1], SHARD=shard, **FUSED, **({} if shard else ASSERT))
    with torch.cuda.device_of(input):
        _stats_kernel[B * tiles, parts](
            *tensors, None if split else grad, scratch, probs_strides=probs_strides,
            grad_strides=(0, 0, 0) if grad is None else _strides(grad), tiles=tiles, share=share,
            WHOLE=whole, ROWS=ROWS, BLOCK=BLOCK, STAGES=2 if alone else 1, num_warps=num_warps, **room, **shared,
        )  # fmt: skip
        if split:
            k = None if grad is None else scratch.new_empty((B * D, 5))
            _merge_kernel[(B * D,)](*tensors, scratch, k, BLOCK_PARTS=next_power_of_2(parts), num_warps=1, **shared)
            if grad is not None:
                _grad(input, target, weight, k, x, grad)


def _grad(input, target, weight, coefficients, x, grad):
    (B, V, D), x_strides = _sizes(input), _strides(input)
    if B * D == 0:
        return
    labels, probs, target_strides, probs_strides = _target(target)
    ROWS, BLOCK, _ = _tile(V, D, x_strides, TILE, TILE)
    tiles = cdiv(D, ROWS)
    _grad_kernel[(B * tiles * cdiv(V, BLOCK),)](
        input, labels, probs, weight, coefficients, grad,
        x_strides, target_strides, probs_strides, coefficients.stride(), _strides(grad),
        V, D, tiles, **_numbers(x, V), ROWS=ROWS, BLOCK=BLOCK, num_warps=_num_warps(ROWS * BLOCK), **FUSED,
    )  # fmt: skip


def _tile(V, D, strides, most, piece):
    """ROWS and BLOCK, a tile of `most` elements that holds whole rows, or of `piece` elements; and whether it holds whole rows."""
    block, side_by_side = next_power_of_2(V), D > 1 and 0 < strides[2] < strides[1]
    rows, most = max(1, TILE // block), most // 2 if side_by_side else most  # what there is of a row takes registers too
    if side_by_side:
        rows = max(rows, SIDE_BY_SIDE)
        if rows * block > most:  # in pieces, and longer runs are to be had
            rows, piece = 2 * SIDE_BY_SIDE, TILE
    rows = min(rows, next_power_of_2(D))
    whole = rows * block <= most
    return rows, block if whole else piece // rows, whole


def _sizes(t):
    """(B, V, D) of (N, V) as (1, V, N), whose rows may then share a tile, and so (N, V, 1)."""
    return (1, t.shape[1], t.shape[0]) if t.dim() == 2 or t.shape[2] == 1 else t.shape


def _strides(t):
    return (0, t.stride(1), t.stride(0)) if t.dim() == 2 or t.shape[2] == 1 else t.stride()


def _target(target):
    """Labels or None, their strides; probabilities or None, theirs."""
    if not is_labels(target):
        return None, target, (0, 0), _strides(target)
    return target, None, (0, target.stride(0)) if target.dim() == 1 or target.shape[1] == 1 else target.stride(), (0, 0, 0)


def _numbers(x, V):
    """As the kernels take them: None for an option that is off is compiled away."""
    if x.softcap:
        scale, softcap = x.logit_scale / x.softcap, x.softcap
    else:
        scale, softcap = None if x.logit_scale == 1 else x.logit_scale, None
    spread = x.label_smoothing / V if x.label_smoothing else None
    return dict(ignore_index=x.ignore_index, scale=scale, softcap=softcap, keep=1 - x.label_smoothing, spread=spread)


def _num_warps(elements):
    return max(1, min(16, elements // 512))

"""Soft-NMS and Matrix NMS on a GPU, in plain Triton. Soft-NMS is one program an image, and one step a selected box; Matrix NMS two passes
over the pairs of boxes, after a sort."""

import torch
import triton
import triton.language as tl

from minkernels._triton_launch import cdiv, kernel, next_power_of_2
from minkernels._triton_math import EXACT, INF, LOG2E, image_and_block, registers
from minkernels.soft_nms._options import arithmetic, below, outputs

BLOCK = 2048  # boxes that one step of Soft-NMS looks at together, at most
ROWS, COLUMNS = 16, 128  # boxes above, and boxes, of a tile of Matrix NMS


def soft_nms(boxes, scores, class_ids, method, iou_threshold, sigma, min_score, max_output):
    (B, N), dtype = scores.shape, arithmetic(boxes, scores)
    indices, out, counts = outputs(boxes, scores, max_output)
    indices.fill_(-1), out.zero_(), counts.zero_()
    if B * N:
        block = min(BLOCK, next_power_of_2(N))
        with torch.cuda.device_of(boxes):
            _soft_kernel[(B,)](
                *_dense(boxes, scores, class_ids, dtype), torch.empty_like(scores, dtype=dtype, memory_format=torch.contiguous_format),
                indices, out, counts, N, max_output, below(iou_threshold, dtype), 1 / sigma, below(min_score, dtype),
                GAUSSIAN=method == "gaussian", BLOCK=block, num_warps=max(1, min(8, block // 128)), **EXACT,
            )  # fmt: skip
    return indices, out, counts


def matrix_nms(boxes, scores, class_ids, method, sigma, min_score, max_output):
    (B, N), dtype = scores.shape, arithmetic(boxes, scores)
    indices, out, counts = outputs(boxes, scores, max_output)
    indices.fill_(-1), out.zero_(), counts.zero_()
    if B * N:
        boxes, scores, class_ids = _dense(boxes, scores, class_ids, dtype)
        least = below(min_score, dtype)
        scores = torch.where((scores > least) & ~boxes.isnan().any(-1), scores, -INF.value)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        c, new = torch.empty_like(scores), torch.empty_like(scores)
        shared = dict(N=N, GAUSSIAN=method == "gaussian", ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8, **registers(8), **EXACT)
        with torch.cuda.device_of(boxes):
            for decay in (False, True):
                _matrix_kernel[(B * cdiv(N, COLUMNS),)](
                    boxes, scores, class_ids, order, c, new, factor=sigma, least=least, DECAY=decay, **shared
                )
        new, order = new.sort(dim=1, descending=True, stable=True)
        some = min(max_output, N)
        found = new[:, :some] > -INF.value
        indices[:, :some], out[:, :some] = torch.where(found, order[:, :some], -1), torch.where(found, new[:, :some], 0.0)
        counts.copy_(found.sum(1))
    return indices, out, counts


def _dense(boxes, scores, class_ids, dtype):
    return boxes.to(dtype).contiguous(), scores.to(dtype).contiguous(), None if class_ids is None else class_ids.long().contiguous()


@triton.jit
def _iou(x1, y1, x2, y2, x1_, y1_, x2_, y2_):
    w = tl.maximum(tl.minimum(x2, x2_) - tl.maximum(x1, x1_), 0.0)
    h = tl.maximum(tl.minimum(y2, y2_) - tl.maximum(y1, y1_), 0.0)
    both = w * h
    ratio = tl.div_rn(both, (x2 - x1) * (y2 - y1) + (x2_ - x1_) * (y2_ - y1_) - both)
    return tl.where(ratio < 1.0, ratio, tl.where(ratio == ratio, 1.0, 0.0))


@triton.jit
def _exp_of_minus(u):
    """exp(-u), as exp_of_minus() of reference.py has it."""
    v = tl.minimum(u, 87.0)
    n = (v * LOG2E + 0.5).to(tl.int32)
    k = n.to(tl.float32)
    r = (k * 0.693359375 - v) + k * -2.12194440e-4
    p = r * (1.0 / 5040) + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return tl.where(u > 87.0, 0.0, p * ((127 - n) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _load_boxes(Boxes, i, mask):
    box = Boxes + i.to(tl.int64) * 4
    x1 = tl.load(box, mask=mask, other=0.0)
    y1 = tl.load(box + 1, mask=mask, other=0.0)
    x2 = tl.load(box + 2, mask=mask, other=0.0)
    y2 = tl.load(box + 3, mask=mask, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _best(s, i, top, at):
    """The higher of (top, at) and the first of the highest scores of this block, which comes after it."""
    here = tl.max(s, axis=0)
    first = tl.min(tl.where(s == here, i, 2**31 - 1), axis=0)
    return tl.maximum(top, here), tl.where(here > top, first, at)


@kernel
def _soft_kernel(
    Boxes, Scores, ClassIds, Work, Indices, Out, Counts,  # (B, N, 4); (B, N) three times, ClassIds or None; (B, max_output) twice; (B,)
    N, max_output, iou_threshold, factor, least, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One image. Work: the scores as they are by now, -inf of boxes that are out."""
    b = tl.program_id(0).to(tl.int64)
    Boxes, Scores, Work = Boxes + b * N * 4, Scores + b * N, Work + b * N
    offs = tl.arange(0, BLOCK)
    lowest, count = tl.full((), -INF, tl.float32), tl.full((), 0, tl.int32)
    top, at = lowest, count
    for start in range(0, N, BLOCK):
        i = start + offs
        x1, y1, x2, y2 = _load_boxes(Boxes, i, i < N)
        s = tl.load(Scores + i, mask=i < N, other=-INF)
        s = tl.where((s > least) & (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2), s, -INF)
        tl.store(Work + i, s, mask=i < N)
        top, at = _best(s, i, top, at)
    while (count < max_output) & (top > least):
        tl.debug_barrier()  # Work is written by one thread and read by another
        tl.store(Indices + b * max_output + count, at.to(tl.int64))
        tl.store(Out + b * max_output + count, top)
        count += 1
        own = Boxes + at.to(tl.int64) * 4
        x1_, y1_, x2_, y2_ = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
        chosen = at
        top, at = lowest, at * 0
        for start in range(0, N, BLOCK):
            i = start + offs
            x1, y1, x2, y2 = _load_boxes(Boxes, i, i < N)
            s = tl.load(Work + i, mask=i < N, other=-INF)
            iou = _iou(x1_, y1_, x2_, y2_, x1, y1, x2, y2)
            weight = _exp_of_minus(iou * iou * factor) if GAUSSIAN else tl.where(iou > iou_threshold, 1.0 - iou, 1.0)
            if ClassIds is not None:
                ids = tl.load(ClassIds + b * N + i, mask=i < N, other=0)
                weight = tl.where(ids == tl.load(ClassIds + b * N + chosen), weight, 1.0)
            s = s * weight
            s = tl.where((s > least) & (i != chosen), s, -INF)
            tl.store(Work + i, s, mask=i < N)
            top, at = _best(s, i, top, at)
    tl.store(Counts + b, count.to(tl.int64))


@kernel
def _matrix_kernel(
    Boxes, Scores, ClassIds, Order,  # (B, N, 4) and (B, N), by index; but Scores are by rank, and Order: the index of each
    C, New,  # (B, N): by rank, what _matrix_kernel without DECAY leaves for the one with it; by index
    N, factor, least, GAUSSIAN: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Boxes of COLUMNS ranks against all above. Without DECAY: their c (squared if GAUSSIAN, else 1 - c). With it: their new scores."""
    b, block = image_and_block(N, COLUMNS)
    Boxes, Scores, Order, C, New = Boxes + b * N * 4, Scores + b * N, Order + b * N, C + b * N, New + b * N
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(Order + j, mask=j < N, other=0)
    x1, y1, x2, y2 = _load_boxes(Boxes, index, j < N)
    ids = index
    if ClassIds is not None:
        ids = tl.load(ClassIds + b * N + index, mask=j < N, other=0)
    found = tl.zeros((COLUMNS,), tl.float32)  # the largest so far; of the linear decay, the smallest
    if DECAY and not GAUSSIAN:
        found += 1.0
    for start in range(0, tl.minimum(N, (block + 1) * COLUMNS), ROWS):
        i = start + tl.arange(0, ROWS)
        counts = tl.load(Scores + i, mask=i < N, other=-INF) > -INF
        above = tl.load(Order + i, mask=i < N, other=0)
        x1_, y1_, x2_, y2_ = _load_boxes(Boxes, above, i < N)
        pair = counts[:, None] & (i[:, None] < j[None, :])
        if ClassIds is not None:
            pair = pair & (tl.load(ClassIds + b * N + above, mask=i < N, other=0)[:, None] == ids[None, :])
        iou = _iou(x1_[:, None], y1_[:, None], x2_[:, None], y2_[:, None], x1[None, :], y1[None, :], x2[None, :], y2[None, :])
        iou = tl.where(pair, iou, 0.0)
        if DECAY:
            c = tl.load(C + i, mask=i < N, other=1.0)[:, None]
            if GAUSSIAN:
                found = tl.maximum(found, tl.max(tl.where(pair, iou * iou - c, 0.0), axis=0))
            else:
                ratio = tl.div_rn(1.0 - iou, tl.where(c > 0, c, 1.0))
                found = tl.minimum(found, tl.min(tl.where(pair & (c > 0), ratio, 1.0), axis=0))
        else:
            found = tl.maximum(found, tl.max(iou, axis=0))
    if DECAY:
        weight = _exp_of_minus(found * factor) if GAUSSIAN else found
        s = tl.load(Scores + j, mask=j < N, other=0.0) * weight
        tl.store(New + index, tl.where(s > least, s, -INF), mask=j < N)
    else:
        tl.store(C + j, found * found if GAUSSIAN else 1.0 - found, mask=j < N)

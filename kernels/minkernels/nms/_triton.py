"""NMS on a GPU, in plain Triton: the boxes of an image by descending score, in tiles, with no wait in between.

The boxes of several tiles are first held against those of the same tile, a bit for each pair. Then tile follows tile, two launches each:
one program decides what stays, for which it needs the bits alone, and many hold that against all later tiles. Classes are compared, not
sorted, so that the order of the results is the order of the work, and work ends where an image has its max_output boxes.
"""

import torch
import triton
import triton.language as tl

from minkernels._triton_launch import cdiv, kernel
from minkernels._triton_math import EXACT, image_and_block
from minkernels.nms._common import CUT, FILTERED, KEPT, new_outputs, round_down

TILE = 1024  # boxes
AHEAD = 8  # tiles whose bits are found at once
WORDS = 8  # of 32 boxes of a tile, which a program holds COLUMNS boxes against
COLUMNS = 64  # boxes of a program that holds them against others,
ROWS = 16  # kept ones of a tile at a time
BLOCK = 256  # boxes of a program that looks at each alone
SIZES = ["N", "words", "width", "start", "ahead", "max_output"]  # any value runs the same code: one compilation for all

UNDECIDED, DROPPED, STAYS = tl.constexpr(CUT), tl.constexpr(FILTERED), tl.constexpr(KEPT)  # State, where it is no rank
NO_RANK = tl.constexpr(2**31 - 1)


def nms(boxes, scores, idxs, iou_threshold):
    classes = None if idxs is None else idxs[None]
    scores = scores.nan_to_num(torch.nan, torch.inf, -torch.inf)  # a sort on a GPU may go by bits, and a NaN's sign is one
    indices, counts, _ = _greedy(boxes[None], scores[None], classes, iou_threshold, False, None, len(scores), False)
    return indices[0, : int(counts)].clone()  # not a view of N elements


def nms_padded(boxes, scores, class_ids, iou_threshold, score_threshold, max_output, with_suppressor):
    return _greedy(boxes, scores, class_ids, iou_threshold, True, score_threshold, max_output, with_suppressor)


def launches(N, with_suppressor):
    """Kernels of this file that a call launches, beside PyTorch's sort and two fills: what the host knows, it launches."""
    tiles = cdiv(N, TILE)
    return 0 if N == 0 else 1 + cdiv(tiles, AHEAD) + tiles + (tiles - 1) + int(with_suppressor)


def _greedy(boxes, scores, class_ids, iou_threshold, drop, score_threshold, max_output, with_suppressor):
    (B, N), new = scores.shape, scores.new_empty
    indices, counts, suppressor = new_outputs(scores, max_output, with_suppressor)
    indices.fill_(-1), counts.zero_()
    if B * N == 0:
        return indices, counts, suppressor
    order = scores.sort(dim=1, descending=True, stable=True).indices.contiguous()
    ranked, state = new((B, 5, N), dtype=torch.float32), new((B, N), dtype=torch.int32)  # x1, y1, x2, y2, area; by rank
    classes = None if class_ids is None else new((B, N), dtype=torch.int64)
    words, width = cdiv(min(N, TILE), 32), min(N, AHEAD * TILE)
    bits = new((B, words, width), dtype=torch.int32)  # of the boxes before one in its tile: those that would suppress it
    kept, last = new((B, TILE + 1), dtype=torch.int32), new(B, dtype=torch.int32)  # of a tile: how many, and their ranks
    threshold, blocks = round_down(iou_threshold), cdiv(N, BLOCK)
    shared = dict(State=state, Counts=counts, N=N, max_output=max_output, TILE=TILE, **EXACT)
    of_bits, pairs = dict(Bits=bits, words=words, width=width), dict(Ranked=ranked, Classes=classes, threshold=threshold, COLUMNS=COLUMNS)
    with torch.cuda.device_of(scores):
        _rank_kernel[(B * blocks,)](
            boxes, scores, class_ids, order, ranked, classes, state, boxes.stride(), scores.stride(),
            (0, 0) if class_ids is None else class_ids.stride(), N,
            None if score_threshold is None else round_down(score_threshold), DROP=drop, BLOCK=BLOCK, num_warps=4, **EXACT,
        )  # fmt: skip
        for start in range(0, N, TILE):
            ahead = start % (AHEAD * TILE)
            if ahead == 0:
                grid = B * cdiv(min(width, N - start), COLUMNS), cdiv(words, WORDS)
                _bits_kernel[grid](start=start, WORDS=WORDS, num_warps=8, **of_bits, **pairs, **shared)
            _resolve_kernel[(B,)](
                Order=order, Indices=indices, Kept=kept, Last=last, start=start, ahead=ahead, num_warps=16, **of_bits, **shared
            )
            if start + TILE < N:
                later = cdiv(N - start - TILE, COLUMNS)
                _push_kernel[(B * later,)](Kept=kept, start=start + TILE, ROWS=ROWS, num_warps=4, **pairs, **shared)
        if with_suppressor:
            _suppressor_kernel[(B * blocks,)](order, state, counts, last, suppressor, N, max_output, BLOCK=BLOCK, num_warps=4, **EXACT)
    return indices, counts, suppressor


@kernel(do_not_specialize=SIZES)
def _rank_kernel(
    Boxes, Scores, ClassIds, Order, Ranked, Classes, State,
    box_strides, score_strides, class_strides, N, score_threshold, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Boxes by rank, in float32; the area of one that neither suppresses nor is suppressed is 0."""
    b, block = image_and_block(N, BLOCK)
    rank = block * BLOCK + tl.arange(0, BLOCK)
    mask = rank < N
    i = tl.load(Order + b * N + rank, mask=mask, other=0)
    box, step = Boxes + b * box_strides[0] + i * box_strides[1], tl.cast(box_strides[2], tl.int64)
    x1 = tl.load(box, mask=mask, other=0).to(tl.float32)
    y1 = tl.load(box + step, mask=mask, other=0).to(tl.float32)
    x2 = tl.load(box + 2 * step, mask=mask, other=0).to(tl.float32)
    y2 = tl.load(box + 3 * step, mask=mask, other=0).to(tl.float32)
    w = x2 - x1
    area = w * (y2 - y1)
    active = (w > 0) & (area > 0) & (area < float("inf"))
    ranked = Ranked + b * 5 * N + rank
    tl.store(ranked, x1, mask=mask)
    ranked += N  # step by step: 4 * N would not fit 32 bits
    tl.store(ranked, y1, mask=mask)
    ranked += N
    tl.store(ranked, x2, mask=mask)
    ranked += N
    tl.store(ranked, y2, mask=mask)
    ranked += N
    tl.store(ranked, tl.where(active, area, 0.0), mask=mask)
    if ClassIds is not None:
        ids = tl.load(ClassIds + b * class_strides[0] + i * class_strides[1], mask=mask, other=0)
        tl.store(Classes + b * N + rank, ids, mask=mask)
    stays = mask
    if DROP:
        score = tl.load(Scores + b * score_strides[0] + i * score_strides[1], mask=mask, other=0).to(tl.float32)
        stays = (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2) & (score == score)
        if score_threshold is not None:
            stays = stays & (score > score_threshold)
    tl.store(State + b * N + rank, tl.where(stays, UNDECIDED, DROPPED), mask=mask)


@triton.jit
def _load(Ranked, Classes, b, N, rank, mask):
    """Coordinates, area and class. A rank behind the last has area 0."""
    ranked = Ranked + b * 5 * N + rank
    x1 = tl.load(ranked, mask=mask, other=0.0)
    ranked += N  # as it was stored
    y1 = tl.load(ranked, mask=mask, other=0.0)
    ranked += N
    x2 = tl.load(ranked, mask=mask, other=0.0)
    ranked += N
    y2 = tl.load(ranked, mask=mask, other=0.0)
    ranked += N
    area = tl.load(ranked, mask=mask, other=0.0)
    ids = rank.to(tl.int64) * 0
    if Classes is not None:
        ids = tl.load(Classes + b * N + rank, mask=mask, other=0)
    return x1, y1, x2, y2, area, ids


@triton.jit
def _overlaps(x1, y1, x2, y2, area, ids, x1_, y1_, x2_, y2_, area_, ids_, threshold, CLASSES: tl.constexpr):
    """(rows, columns) int1: whether the IoU is above the threshold, in the order of torchvision's CPU loop."""
    w = tl.minimum(x2[:, None], x2_[None, :]) - tl.maximum(x1[:, None], x1_[None, :])
    h = tl.minimum(y2[:, None], y2_[None, :]) - tl.maximum(y1[:, None], y1_[None, :])
    inter = tl.maximum(w, 0.0) * tl.maximum(h, 0.0)
    whole = area[:, None] + area_[None, :] - inter
    active = (area[:, None] > 0) & (area_[None, :] > 0)
    yes = active & (tl.div_rn(inter, tl.where(active, whole, 1.0)) > threshold)
    if CLASSES:
        yes = yes & (ids[:, None] == ids_[None, :])
    return yes


@kernel(do_not_specialize=SIZES)
def _bits_kernel(
    Ranked, Classes, State, Counts, Bits, words, width, N, start, threshold, max_output,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Holds COLUMNS of the `width` boxes from `start` on against 32 * WORDS of the same tile, unless those all come later."""
    b, block = image_and_block(tl.minimum(width, N - start), COLUMNS)
    place = block * COLUMNS + tl.arange(0, COLUMNS)
    rank = start + place
    mask = rank < N
    first = start + block * COLUMNS // TILE * TILE + tl.program_id(1) * WORDS * 32
    undecided = tl.load(State + b * N + rank, mask=mask, other=DROPPED) == UNDECIDED
    if (first < start + block * COLUMNS + COLUMNS) & (tl.sum(undecided.to(tl.int32)) > 0) & (tl.load(Counts + b) < max_output):
        x1, y1, x2, y2, area, ids = _load(Ranked, Classes, b, N, rank, mask)
        bit = tl.arange(0, 32)
        for i in range(WORDS):
            word = tl.program_id(1) * WORDS + i
            row = first + i * 32 + bit
            r1, s1, r2, s2, row_area, row_ids = _load(Ranked, Classes, b, N, row, row < N)
            hits = _overlaps(x1, y1, x2, y2, area, ids, r1, s1, r2, s2, row_area, row_ids, threshold, CLASSES=Classes is not None)
            hits = (hits & (row[None, :] < rank[:, None])).to(tl.int32)
            tl.store(Bits + (b * words + word) * width + place, tl.sum(hits << bit[None, :], axis=1), mask=mask & (word < words))


@triton.jit
def _packed(x):
    """32 of x, 0 or 1, a word."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 32, 32)) << tl.arange(0, 32)[None, :], axis=1).to(tl.uint32, bitcast=True)


@kernel(do_not_specialize=SIZES)
def _resolve_kernel(
    Bits, Order, State, Indices, Counts, Kept, Last, words, width, N, start, ahead, max_output, TILE: tl.constexpr
):  # fmt: skip
    """Decides what is undecided in the tile from `start` on, whose bits lie from `ahead` on: one program an image. What stays goes to
    Indices, and to Kept for the push."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(Counts + b).to(tl.int32)
    if count < max_output:
        place, word = tl.arange(0, TILE), tl.arange(0, TILE // 32)
        rank = start + place
        mask = rank < N
        state = tl.load(State + b * N + rank, mask=mask, other=DROPPED)
        undecided = (state == UNDECIDED).to(tl.int32)
        written = (undecided[None, :] > 0) & (word[:, None] * 32 < place[None, :])
        bits = tl.load(Bits + (b * words + word)[:, None] * width + (ahead + place)[None, :], mask=written, other=0)
        bits = bits.to(tl.uint32, bitcast=True)
        open_, changed = _packed(undecided), 1
        kept = open_
        while changed > 0:  # each round decides one box more at least; the fixed point is the greedy answer
            before = kept
            kept = _packed((tl.max(bits & kept[:, None], axis=0) == 0).to(tl.int32)) & open_
            changed = tl.sum((kept != before).to(tl.int32))
        hits = bits & (kept + changed)[:, None]  # + 0: Triton 3.6 fails on a loop one of whose results is not used
        by = tl.min(tl.where(hits != 0, word[:, None], TILE // 32), axis=0)  # the first word with a bit, then that word, then its bit
        hit = tl.sum(tl.where(word[:, None] == by[None, :], hits, 0), axis=0).to(tl.int32, bitcast=True)
        lowest = (hit & -hit).to(tl.uint32, bitcast=True).to(tl.float32)  # a power of two: the bit is its exponent
        first = start + by * 32 + (lowest.to(tl.int32, bitcast=True) >> 23) - 127
        stay = (undecided > 0) & (hit == 0)
        place = tl.cumsum(stay.to(tl.int32), 0) - 1
        stay = stay & (count + place < max_output)
        total = tl.sum(stay.to(tl.int32))
        state = tl.where(hit != 0, first, state)
        tl.store(State + b * N + rank, tl.where(stay, STAYS, state), mask=mask)
        i = tl.load(Order + b * N + rank, mask=mask, other=0)
        tl.store(Indices + b * max_output + count + place, i, mask=stay)
        tl.store(Kept + b * (TILE + 1) + 1 + place, rank, mask=stay)
        tl.store(Kept + b * (TILE + 1), total)
        tl.store(Counts + b, (count + total).to(tl.int64))
        tl.store(Last + b, tl.max(tl.where(stay, rank, -1)))


@kernel(do_not_specialize=SIZES)
def _push_kernel(
    Ranked, Classes, State, Kept, Counts, N, start, threshold, max_output,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Holds COLUMNS of the boxes from `start` on against those that the last tile kept."""
    b, block = image_and_block(N - start, COLUMNS)
    rank = start + block * COLUMNS + tl.arange(0, COLUMNS)
    mask = rank < N
    state = tl.load(State + b * N + rank, mask=mask, other=DROPPED)
    total = tl.load(Kept + b * (TILE + 1))
    if tl.load(Counts + b) == max_output:
        total = 0  # the image is done, and Kept may be of an earlier tile
    if tl.sum((state == UNDECIDED).to(tl.int32)) > 0:
        x1, y1, x2, y2, area, ids = _load(Ranked, Classes, b, N, rank, mask)
        for k in range(0, total, ROWS):
            at = k + tl.arange(0, ROWS)
            row = tl.load(Kept + b * (TILE + 1) + 1 + at, mask=at < total, other=0)
            r1, s1, r2, s2, row_area, row_ids = _load(Ranked, Classes, b, N, row, at < total)
            hits = _overlaps(
                r1, s1, r2, s2, row_area, row_ids, x1, y1, x2, y2, area, ids, threshold, CLASSES=Classes is not None
            )  # fmt: skip
            first = tl.min(tl.where(hits, row[:, None], NO_RANK), axis=0)
            state = tl.where((state == UNDECIDED) & (first != NO_RANK), first, state)
        tl.store(State + b * N + rank, state, mask=mask)


@kernel(do_not_specialize=SIZES)
def _suppressor_kernel(Order, State, Counts, Last, Suppressor, N, max_output, BLOCK: tl.constexpr):
    """From ranks to indices; what comes behind the last kept box of an image that is full was not to be looked at."""
    b, block = image_and_block(N, BLOCK)
    rank = block * BLOCK + tl.arange(0, BLOCK)
    mask = rank < N
    state = tl.load(State + b * N + rank, mask=mask, other=DROPPED)
    full = tl.load(Counts + b) == max_output
    by = tl.load(Order + b * N + state, mask=mask & (state >= 0), other=0)
    by = tl.where(state >= 0, by, state.to(tl.int64))
    by = tl.where(full & (rank > tl.load(Last + b)) & (state != DROPPED), UNDECIDED, by)
    i = tl.load(Order + b * N + rank, mask=mask, other=0)
    tl.store(Suppressor + b * N + i, by, mask=mask)

"""yolo_detect on a GPU, in plain Triton: candidates, the library's NMS, results. All buffers have sizes that the host knows.

Without multi_label the best class of every place is found first; then a place is one candidate. Where there may be more candidates than
max_candidates, those that enter are chosen: a radix select of the lowest score that does, by integer counts, whose sums have no order; then
the candidates are written in their own order. Launches that have nothing to choose, since few scores pass, end at once.
"""

import torch
import triton
import triton.language as tl

from minkernels._triton_launch import cdiv, kernel
from minkernels._triton_math import EXACT, INF, blocks_of, image_and_block
from minkernels.nms import _triton as nms
from minkernels.yolo._options import HEADS, Options, arithmetic, outputs

BLOCK = 128  # places of a program
ROWS = 16  # classes that it loads at a time
DIGITS = (21, 11), (10, 11), (0, 10)  # of a score's 32 bits: the lowest bit, and how many
V1, PLANAR, V8, BEST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def detect(pred, *options):
    x = Options(*options)
    boxes, scores, classes, counts = outputs(pred, x.max_output)
    B, C, P = len(pred), x.num_classes, x.places(pred)
    pred = pred if x.head.startswith("v8") else pred.contiguous()
    strides = pred.stride() if pred.dim() == 3 else (pred.stride(0), 0, 0)
    of_pred = dict(Pred=pred, strides=strides, P=P, S=1 if x.head.startswith("v8") else x.grid(pred), BOXES=x.boxes_per_cell)
    head, least = HEADS[x.head], x.least(arithmetic(pred))
    pairs = P * C if x.multi_label else P
    N = min(pairs, x.max_candidates)
    new = scores.new_empty
    blocks, warps = cdiv(P, BLOCK), dict(BLOCK=BLOCK, num_warps=4)
    with torch.cuda.device_of(pred):
        best, best_class, number = None, None, None
        raw = dict(of_pred, Best=None, C=C, HEAD=head)
        if B * P and not x.multi_label:
            best, best_class = new((B, P)), new((B, P), dtype=torch.int32)
            _best_kernel[(B * blocks,)](**raw, Out=best, Class=best_class, least=least, ROWS=ROWS, **warps, **EXACT)
            raw = dict(of_pred, Best=best, C=1, HEAD=BEST.value)
        if B * P and N < pairs:
            number = _choose(raw, least, N, B, blocks, warps, new)
        box, score, class_id = new((B, N, 4)), new((B, N)), new((B, N), dtype=torch.int64)
        if B * N:
            _candidate_kernel[(B * cdiv(N, BLOCK),)](
                **of_pred, Best=best, BestClass=best_class, Number=number, Box=box, Score=score, ClassId=class_id, N=N, C=C, least=least,
                height=x.height, width=x.width, SQRT=x.sqrt_wh, HEAD=head, **warps, **EXACT,
            )  # fmt: skip
        ids = None if x.class_agnostic else class_id
        indices, kept, _ = nms.nms_padded(box, score, ids, x.iou_threshold, None, x.max_output, False)
        counts.copy_(kept)
        if B:
            _result_kernel[(B * cdiv(x.max_output, BLOCK),)](
                box, score, class_id, indices, boxes, scores, classes, N, x.max_output, LOGITS=x.logits, **warps, **EXACT
            )
    return boxes, scores, classes, counts


def _choose(raw, least, N, B, blocks, warps, new):
    """(B, N) numbers of the candidates that enter, place * C + class, in their order; -1 behind the last."""
    number = new((B, N), dtype=torch.int64).fill_(-1)
    above, ties = (new((B, blocks), dtype=torch.int32) for _ in range(2))  # of each block: candidates above the lowest score, and at it
    lowest, quota = new(B, dtype=torch.int64).fill_(-1), new(B, dtype=torch.int64).fill_(N)  # its key, and how many at it enter
    grid, shared = (B * blocks,), dict(raw, least=least, **warps, **EXACT)
    _count_kernel[grid](**shared, Above=above, Ties=ties, Lowest=lowest, Total=None, N=N, ROWS=ROWS)
    total = above.sum(1)
    prefix = torch.zeros_like(lowest)
    for shift, bits in DIGITS:
        bins = torch.zeros((B, 2**bits), dtype=torch.int32, device=number.device)
        _histogram_kernel[grid](**shared, Total=total, Prefix=prefix, Bins=bins, N=N, SHIFT=shift, BITS=bits, ROWS=ROWS)
        _digit_kernel[(B,)](total, prefix, quota, lowest, bins, N, BITS=bits, LAST=shift == 0, num_warps=8, **EXACT)
    _count_kernel[grid](**shared, Above=above, Ties=ties, Lowest=lowest, Total=total, N=N, ROWS=ROWS)
    starts = (t.cumsum(1) - t for t in (above, ties))
    _write_kernel[grid](**shared, Lowest=lowest, Quota=quota, AboveStart=next(starts), TieStart=next(starts), Number=number, N=N)
    return number


@triton.jit
def _raw(Pred, Best, strides, b, place, c, mask, P, C, S, HEAD: tl.constexpr, BOXES: tl.constexpr):
    """The raw scores of class c of a place, in float32."""
    if HEAD == BEST:
        return tl.load(Best + b * P + place + c * 0, mask=mask, other=0.0)
    elif HEAD == V8:
        x = tl.load(Pred + b * strides[0] + (4 + tl.cast(c, tl.int64)) * strides[1] + place * strides[2], mask=mask, other=0.0)
        return x.to(tl.float32)
    else:
        image, cell = Pred + b * strides[0], place // BOXES
        if HEAD == V1:
            image += cell * (5 * BOXES + C)
            confidence = tl.load(image + place % BOXES * 5 + 4 + c * 0, mask=mask, other=0.0)
            prob = tl.load(image + 5 * BOXES + c, mask=mask, other=0.0)
        else:
            confidence = tl.load(image + S * S * C + place + c * 0, mask=mask, other=0.0)
            prob = tl.load(image + cell * C + c, mask=mask, other=0.0)
        return confidence.to(tl.float32) * prob.to(tl.float32)


@triton.jit
def _tile(Pred, Best, strides, b, place, start, P, C, S, least, HEAD: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, BLOCK) raw scores of classes from `start` on, -inf where one does not pass; and the classes."""
    c = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = (c < C) & (place < P)[None, :]
    x = _raw(Pred, Best, strides, b, place[None, :], c, mask, P, C, S, HEAD, BOXES)
    return tl.where(mask & (x > least), x, -INF), c


@kernel
def _best_kernel(
    Pred, Best, strides, P, C, S, Out, Class, least,  # Out, Class: (B, P)
    HEAD: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, block = image_and_block(P, BLOCK)
    place = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    best, of = tl.full((BLOCK,), -INF, tl.float32), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, C, ROWS):
        x, c = _tile(Pred, Best, strides, b, place, start, P, C, S, least, HEAD, BOXES, ROWS)
        top = tl.max(x, axis=0)
        first = tl.min(tl.where(x == top[None, :], c, 2**31 - 1), axis=0)
        of = tl.where(top > best, first, of)
        best = tl.maximum(best, top)
    tl.store(Out + b * P + place, best, mask=place < P)
    tl.store(Class + b * P + place, of.to(tl.int32), mask=place < P)


@triton.jit
def _key(x):
    """An integer of 32 bits in int64, in the order of x; 0 and -0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 2**31, 0xFFFFFFFF - bits, bits + 2**31)


@kernel
def _count_kernel(
    Pred, Best, strides, P, C, S, least, Above, Ties, Lowest, Total, N,  # Above, Ties: (B, blocks)
    HEAD: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Candidates of a block whose key is above the lowest, and at it; again only for an image that has more than N."""
    b, block = image_and_block(P, BLOCK)
    place = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    many = N >= 0
    if Total is not None:
        many = tl.load(Total + b) > N
    if many:
        lowest = tl.load(Lowest + b)
        above, ties = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
        for start in range(0, C, ROWS):
            x, _ = _tile(Pred, Best, strides, b, place, start, P, C, S, least, HEAD, BOXES, ROWS)
            key = _key(x)
            above += tl.sum(((x > -INF) & (key > lowest)).to(tl.int32), axis=0)
            ties += tl.sum(((x > -INF) & (key == lowest)).to(tl.int32), axis=0)
        at = b * blocks_of(P, BLOCK) + block
        tl.store(Above + at, tl.sum(above, axis=0))
        tl.store(Ties + at, tl.sum(ties, axis=0))


@kernel
def _histogram_kernel(
    Pred, Best, strides, P, C, S, least, Total, Prefix, Bins, N,  # Bins: (B, 2**BITS)
    SHIFT: tl.constexpr, BITS: tl.constexpr, HEAD: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of the keys that begin with the prefix have each digit."""
    b, block = image_and_block(P, BLOCK)
    place = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    if tl.load(Total + b) > N:
        prefix = tl.load(Prefix + b)
        for start in range(0, C, ROWS):
            x, _ = _tile(Pred, Best, strides, b, place, start, P, C, S, least, HEAD, BOXES, ROWS)
            key = _key(x)
            here = (x > -INF) & (key >> (SHIFT + BITS) == prefix)
            tl.atomic_add(Bins + b * 2**BITS + ((key >> SHIFT) & (2**BITS - 1)), 1, mask=here, sem="relaxed")


@kernel
def _digit_kernel(Total, Prefix, Quota, Lowest, Bins, N, BITS: tl.constexpr, LAST: tl.constexpr):
    """The digit of the quota-th highest key that begins with the prefix; the quota among those that begin with both."""
    b, digit = tl.program_id(0).to(tl.int64), tl.arange(0, 2**BITS)
    if tl.load(Total + b) > N:
        quota, bins = tl.load(Quota + b), tl.load(Bins + b * 2**BITS + digit).to(tl.int64)
        from_here = tl.sum(bins, axis=0) - tl.cumsum(bins, 0) + bins
        own = tl.max(tl.where(from_here >= quota, digit, 0), axis=0)
        prefix = tl.load(Prefix + b) * 2**BITS + own
        tl.store(Quota + b, quota - tl.sum(tl.where(digit > own, bins, 0), axis=0))
        tl.store(Prefix + b, prefix)
        if LAST:
            tl.store(Lowest + b, prefix)


@kernel
def _write_kernel(
    Pred, Best, strides, P, C, S, least, Lowest, Quota, AboveStart, TieStart, Number, N,  # starts: (B, blocks), counts before each
    HEAD: tl.constexpr, BOXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, block = image_and_block(P, BLOCK)
    place = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    at, lowest, quota = b * blocks_of(P, BLOCK) + block, tl.load(Lowest + b), tl.load(Quota + b)
    above, ties = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for c in range(C):
        x = _raw(Pred, Best, strides, b, place, c, place < P, P, C, S, HEAD, BOXES)
        passes, key = (place < P) & (x > least), _key(x)
        above += (passes & (key > lowest)).to(tl.int64)
        ties += (passes & (key == lowest)).to(tl.int64)
    above = tl.load(AboveStart + at) + tl.cumsum(above, 0) - above  # before this place
    ties = tl.load(TieStart + at) + tl.cumsum(ties, 0) - ties
    for c in range(C):
        x = _raw(Pred, Best, strides, b, place, c, place < P, P, C, S, HEAD, BOXES)
        passes, key = (place < P) & (x > least), _key(x)
        higher, equal = passes & (key > lowest), passes & (key == lowest)
        enters = higher | (equal & (ties < quota))
        to = above + tl.minimum(ties, quota)
        tl.store(Number + b * N + to, place * C + c, mask=enters & (to < N))
        above += higher.to(tl.int64)
        ties += equal.to(tl.int64)


@kernel
def _candidate_kernel(
    Pred, Best, BestClass, Number, strides, P, C, S, Box, Score, ClassId, N, least, height, width,  # (B, N, 4), (B, N), (B, N)
    SQRT: tl.constexpr, HEAD: tl.constexpr, BOXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Corners, raw score and class of BLOCK candidates; a score of NaN where there is none."""
    b, block = image_and_block(N, BLOCK)
    n = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    number, mask = n, n < N
    if Number is not None:
        number = tl.load(Number + b * N + n, mask=mask, other=-1)
        mask = mask & (number >= 0)
    number = tl.where(mask, number, 0)
    if Best is not None:
        place = number
        c = tl.load(BestClass + b * P + place, mask=mask, other=0).to(tl.int64)
        x = tl.load(Best + b * P + place, mask=mask, other=0.0)
    else:
        place, c = number // C, number % C
        x = _raw(Pred, Best, strides, b, place, c, mask, P, C, S, HEAD, BOXES)
    mask = mask & (x > least)
    image = Pred + b * strides[0]
    if HEAD == V8:
        box, step = image + place * strides[2], tl.cast(strides[1], tl.int64)
    elif HEAD == V1:
        box, step = image + place // BOXES * (5 * BOXES + C) + place % BOXES * 5, 1
    else:
        box, step = image + S * S * (C + BOXES) + place * 4, 1
    cx = tl.load(box, mask=mask, other=0.0).to(tl.float32)
    cy = tl.load(box + step, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(box + 2 * step, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(box + 3 * step, mask=mask, other=0.0).to(tl.float32)
    if HEAD != V8:
        cell, side = place // BOXES, (place * 0 + S).to(tl.float32)
        cx = tl.div_rn(cx + (cell % S).to(tl.float32), side) * width
        cy = tl.div_rn(cy + (cell // S).to(tl.float32), side) * height
        if SQRT:
            w, h = w * w, h * h
        w, h = w * width, h * height
    w, h = w * 0.5, h * 0.5
    to = Box + (b * N + n) * 4
    tl.store(to, cx - w, mask=n < N)
    tl.store(to + 1, cy - h, mask=n < N)
    tl.store(to + 2, cx + w, mask=n < N)
    tl.store(to + 3, cy + h, mask=n < N)
    tl.store(Score + b * N + n, tl.where(mask, x, float("nan")), mask=n < N)
    tl.store(ClassId + b * N + n, c, mask=n < N)


@kernel
def _result_kernel(
    Box, Score, ClassId, Indices, Boxes, Scores, Classes,  # (B, N, ...), and (B, max_output, ...)
    N, max_output, LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, block = image_and_block(max_output, BLOCK)
    k = block * BLOCK + tl.arange(0, BLOCK)
    mask = k < max_output
    i = tl.load(Indices + b * max_output + k, mask=mask, other=-1)
    found, start, to = i >= 0, b * N + i, b * max_output + k
    for j in tl.static_range(4):
        tl.store(Boxes + to * 4 + j, tl.load(Box + start * 4 + j, mask=found, other=0.0), mask=mask)
    x = tl.load(Score + start, mask=found, other=0.0)
    if LOGITS:  # in float64, and rounded once
        x = (1.0 / (1.0 + tl.exp(-x.to(tl.float64)))).to(tl.float32)
    tl.store(Scores + to, tl.where(found, x, 0.0), mask=mask)
    tl.store(Classes + to, tl.load(ClassId + start, mask=found, other=-1), mask=mask)

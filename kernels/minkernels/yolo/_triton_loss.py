"""yolo_loss on a GPU, in plain Triton: a program owns BLOCK cells of an image; the sums of programs are added up after it, in order."""

import torch
import triton
import triton.language as tl

from minkernels._triton_launch import cdiv, kernel
from minkernels._triton_math import ASSERT, EXACT, INF, image_and_block
from minkernels.yolo._options import loss_factor, loss_output

BLOCK, TILE = 64, 16  # cells of a program; classes that it takes at a time


@triton.jit
def _side(a, size_a, b, size_b):
    """Of one dimension: what two boxes share of it, and the length of each, of their centres and sizes."""
    half_a, half_b = 0.5 * size_a, 0.5 * size_b
    a1, a2, b1, b2 = a - half_a, a + half_a, b - half_b, b + half_b
    return tl.maximum(tl.minimum(a2, b2) - tl.maximum(a1, b1), 0.0), a2 - a1, b2 - b1


@triton.jit
def _term(Grad, at, inside, counts, weight, error, upstream):
    """A squared error; and its gradient, where there is somewhere to put it."""
    if Grad is not None:
        tl.store(Grad + at, tl.where(counts, 2.0 * weight * upstream * error, 0.0).to(Grad.dtype.element_ty), mask=inside)
    return tl.where(counts, weight * error * error, 0.0)


@kernel
def _loss_kernel(
    Pred, Boxes, Classes,  # (N, K, K, 5 BOXES + C), (N, K, K, 4), (N, K, K)
    Sums,  # of each program, or None
    DLoss, Grad,  # (N,) or one number by a stride of 0; as Pred; or None
    K, C, pred_strides, boxes_strides, classes_strides, dloss_stride, grad_strides, coord, noobj, factor,
    BOXES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, block = image_and_block(K * K, BLOCK)
    cell = block * BLOCK + tl.arange(0, BLOCK)
    inside, row, column = cell < K * K, (cell // K).to(tl.int64), (cell % K).to(tl.int64)
    Pred += n * pred_strides[0] + row * pred_strides[1] + column * pred_strides[2]
    Boxes += n * boxes_strides[0] + row * boxes_strides[1] + column * boxes_strides[2]
    at, upstream, step, to = row * 0, 0.0, tl.cast(pred_strides[3], tl.int64), 0
    if Grad is not None:
        at = n * grad_strides[0] + row * grad_strides[1] + column * grad_strides[2]
        upstream = tl.load(DLoss + n * dloss_stride).to(tl.float32) * factor
        to = tl.cast(grad_strides[3], tl.int64)
    place = Classes + n * classes_strides[0] + row * classes_strides[1] + column * classes_strides[2]
    label = tl.load(place, mask=inside, other=-1)
    tl.device_assert((label >= -1) & (label < C), "a class is out of range")
    has, side, box_step = label >= 0, (cell * 0 + K).to(tl.float32), tl.cast(boxes_strides[3], tl.int64)
    tx = tl.load(Boxes, mask=has, other=0.0)
    ty = tl.load(Boxes + box_step, mask=has, other=0.0)
    tw = tl.load(Boxes + 2 * box_step, mask=has, other=0.0)
    th = tl.load(Boxes + 3 * box_step, mask=has, other=0.0)

    best, mine = tl.full((BLOCK,), -INF, tl.float32), tl.zeros((BLOCK,), tl.int32)
    for b in tl.static_range(BOXES):
        x = tl.load(Pred + 5 * b * step, mask=has, other=0.0).to(tl.float32)
        y = tl.load(Pred + (5 * b + 1) * step, mask=has, other=0.0).to(tl.float32)
        w = tl.load(Pred + (5 * b + 2) * step, mask=has, other=0.0).to(tl.float32)
        h = tl.load(Pred + (5 * b + 3) * step, mask=has, other=0.0).to(tl.float32)
        shared_w, own_w, truth_w = _side(tl.div_rn(x, side), w * w, tl.div_rn(tx, side), tw)
        shared_h, own_h, truth_h = _side(tl.div_rn(y, side), h * h, tl.div_rn(ty, side), th)
        inter = shared_w * shared_h
        union = own_w * own_h + truth_w * truth_h - inter  # a NaN is in the areas
        overlap = tl.where(union == 0, 0.0, tl.div_rn(inter, tl.where(union == 0, 1.0, union)))
        better = (overlap > best) | ((overlap != overlap) & (best == best))
        best, mine = tl.where(better, overlap, best), tl.where(better, b, mine)

    loss, kinds = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, TILE), tl.float32)  # one sum would have the tile's layout
    for b in tl.static_range(BOXES):
        own = has & (mine == b)
        for k in tl.static_range(4):
            channel = 5 * b + k
            truth = tx if k == 0 else ty if k == 1 else tl.sqrt_rn(tw) if k == 2 else tl.sqrt_rn(th)
            x = tl.load(Pred + channel * step, mask=own, other=0.0).to(tl.float32)
            loss += _term(Grad, at + channel * to, inside, own, coord, x - truth, upstream)
        x = tl.load(Pred + (5 * b + 4) * step, mask=inside, other=0.0).to(tl.float32)
        error, weight = x - tl.where(own, best, 0.0), tl.where(own, 1.0, noobj)
        loss += _term(Grad, at + (5 * b + 4) * to, inside, inside, weight, error, upstream)
    for start in range(0, C, TILE):
        c = (start + tl.arange(0, TILE)).to(tl.int64)[None, :]
        wanted = has[:, None] & (c < C)
        probs = tl.load(Pred[:, None] + (5 * BOXES + c) * step, mask=wanted, other=0.0).to(tl.float32)
        errors, out = probs - (c == label[:, None]).to(tl.float32), at[:, None] + (5 * BOXES + c) * to
        kinds += _term(Grad, out, inside[:, None] & (c < C), wanted, 1.0, errors, upstream)
    if Sums is not None:
        tl.store(Sums + tl.program_id(0), tl.sum(loss, 0) + tl.sum(tl.sum(kinds, 1), 0))


def loss_fwd(pred, boxes, classes, boxes_per_cell, coord, noobj, reduction):
    sums = loss_output(pred, "none").new_empty((len(pred), cdiv(pred.shape[1] ** 2, BLOCK)))
    _launch(pred, boxes, classes, boxes_per_cell, coord, noobj, 1.0, Sums=sums)
    loss = sums.sum(1)
    return loss if reduction == "none" else loss.sum() * loss_factor(pred, reduction)


def loss_bwd(dloss, pred, boxes, classes, boxes_per_cell, coord, noobj, reduction):
    grad = torch.empty_like(pred)
    _launch(pred, boxes, classes, boxes_per_cell, coord, noobj, loss_factor(pred, reduction), DLoss=dloss, Grad=grad)
    return grad


def _launch(pred, boxes, classes, boxes_per_cell, coord, noobj, factor, Sums=None, DLoss=None, Grad=None):
    N, K, _, channels = pred.shape
    if not N * K:
        return
    strides = dict(
        pred_strides=pred.stride(), boxes_strides=boxes.stride(), classes_strides=classes.stride(),
        dloss_stride=0 if DLoss is None or not DLoss.dim() else DLoss.stride(0), grad_strides=(0,) * 4 if Grad is None else Grad.stride(),
    )  # fmt: skip
    with torch.cuda.device_of(pred):
        _loss_kernel[(cdiv(K * K, BLOCK) * N,)](
            pred, boxes, classes, Sums, DLoss, Grad, K, channels - 5 * boxes_per_cell, **strides, coord=coord, noobj=noobj, factor=factor,
            BOXES=boxes_per_cell, TILE=TILE, BLOCK=BLOCK, num_warps=4, **EXACT, **ASSERT,
        )  # fmt: skip

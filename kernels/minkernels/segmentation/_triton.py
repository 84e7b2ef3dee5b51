"""The segmentation losses on a GPU, in plain Triton: blocks of 1024 elements, whose sums are added up by a second launch, in order.

Everything that an element needs comes from e = exp(-|x|): sigmoid(|x|) = 1 / (1 + e), sigmoid(-|x|) = e / (1 + e) and
softplus(-|x|) = log1p(e). None of them cancels.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from minkernels._triton_launch import cdiv, kernel, next_power_of_2
from minkernels._triton_math import ASSERT, FUSED, LOG2E, blocks_of, image_and_block, log1p
from minkernels.segmentation._outputs import bce_dice_outputs, sigmoid_loss_outputs

BLOCK = 1024  # elements of a program


@triton.jit
def _exp_of_negative(x):
    """e**x for x <= 0. x - n ln 2 in two steps, of which the first is exact: a rounded x * LOG2E would cost |x| roundings."""
    x = tl.where(x < -88.0, -88.0, x)  # a NaN stays
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(r * LOG2E) * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    """sigmoid(x), sigmoid(-x), log1p(exp(-|x|))"""
    e = _exp_of_negative(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x > 0, large, small), tl.where(x > 0, small, large), log1p(e)


@triton.jit
def _bce(x, t, positive, p, q, log):
    """-positive log p - (1 - t) log q, and its derivative by x; positive is t times its weight."""
    u = 1.0 - t
    return log * (u + positive) + tl.abs(x) * tl.where(x > 0, u, positive), u * p - positive * q


@triton.jit
def _at(Pointer, i, sizes, strides, DIMS: tl.constexpr):
    """The address of element i of a walk whose last dimension runs fastest."""
    offs = i * 0
    for k in tl.static_range(DIMS - 1):
        offs += i % sizes[DIMS - 1 - k] * strides[DIMS - 1 - k]
        i = i // sizes[DIMS - 1 - k]
    return Pointer + offs + i * strides[0]


@triton.jit
def _kept(Mask, i, inside, sizes, strides, DIMS: tl.constexpr):
    if Mask is None:
        return inside
    else:
        return inside & (tl.load(_at(Mask, i, sizes, strides, DIMS), mask=inside, other=0) != 0)


@kernel
def _pointwise_kernel(
    X, Target, Weight, PosWeight, Mask, DLoss, Scale,  # all but Scale, which is one number, walked alike; or None
    Loss, Sums, Grad,  # of each element; of each program; of each element; or None
    n, sizes, x_strides, target_strides, weight_strides, pos_weight_strides, mask_strides, dloss_strides, loss_strides, grad_strides,
    alpha, gamma,
    FOCAL: tl.constexpr, GAMMA: tl.constexpr,  # FOCAL: alpha counts; GAMMA 3: any other than 0, 1, 2
    CHECK: tl.constexpr, INDEX: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    keep = _kept(Mask, i, inside, sizes, mask_strides, DIMS)
    x = tl.load(_at(X, i, sizes, x_strides, DIMS), mask=keep, other=0.0).to(tl.float32)
    t = tl.load(_at(Target, i, sizes, target_strides, DIMS), mask=keep, other=0)
    if CHECK:
        tl.device_assert((t == 0) | (t == 1), "an integer target must be 0 or 1")
    t = t.to(tl.float32)
    positive = t
    if PosWeight is not None:
        positive *= tl.load(_at(PosWeight, i, sizes, pos_weight_strides, DIMS), mask=keep, other=0.0).to(tl.float32)
    p, q, log = _sigmoid(x)
    loss, d = _bce(x, t, positive, p, q, log)
    if GAMMA > 0:
        u = 1.0 - t
        miss, slope = p * u + q * t, p * q * (u - t)  # 1 - p_t, where p_t itself would round to 1
        if GAMMA == 1:
            d = slope * loss + miss * d
            loss = miss * loss
        elif GAMMA == 2:
            d = miss * (2.0 * slope * loss + miss * d)
            loss = miss * miss * loss
        else:
            some = miss > 0
            by = tl.where(some, tl.exp2(gamma * tl.log2(tl.where(some, miss, 1.0))), 0.0)
            d = by * (gamma * tl.where(some, slope / tl.where(some, miss, 1.0), 0.0) * loss + d)
            loss = by * loss
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if FOCAL:
        factor = alpha * t + (1.0 - alpha) * (1.0 - t)
    if Weight is not None:
        factor *= tl.load(_at(Weight, i, sizes, weight_strides, DIMS), mask=keep, other=0.0).to(tl.float32)
    loss = tl.where(keep, loss * factor, 0.0)
    if Loss is not None:
        tl.store(_at(Loss, i, sizes, loss_strides, DIMS), loss, mask=inside)
    if Sums is not None:
        tl.store(Sums + tl.program_id(0), tl.sum(loss, 0))
    if Grad is not None:
        d = d * factor * tl.load(Scale)
        if DLoss is not None:
            d *= tl.load(_at(DLoss, i, sizes, dloss_strides, DIMS), mask=keep, other=0.0).to(tl.float32)
        tl.store(_at(Grad, i, sizes, grad_strides, DIMS), tl.where(keep, d, 0.0).to(Grad.dtype.element_ty), mask=inside)


@triton.jit
def _dice_load(
    X, Target, Mask, map, n, c, i, inside, sizes, x_strides, target_strides, mask_strides, x_outer, target_outer, mask_outer, C,
    CLASS_MAP: tl.constexpr, CHECK: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Logits and targets of image n, class c, and which of them count; map: the block of the class map."""
    keep = inside if Mask is None else _kept(Mask + n * mask_outer[0] + c * mask_outer[1], i, inside, sizes, mask_strides, DIMS)
    x = tl.load(_at(X + n * x_outer[0] + c * x_outer[1], i, sizes, x_strides, DIMS), mask=keep, other=0.0).to(tl.float32)
    if CLASS_MAP:
        if CHECK:
            tl.device_assert(((map >= 0) & (map < C)) | (keep == 0), "target out of range")
        t = (map == c) & keep
    else:
        t = tl.load(_at(Target + n * target_outer[0] + c * target_outer[1], i, sizes, target_strides, DIMS), mask=keep, other=0)
        if CHECK:
            tl.device_assert((t == 0) | (t == 1), "an integer target must be 0 or 1")
    return x, t.to(tl.float32), keep


@kernel
def _dice_sums_kernel(
    X, Target, Mask, PosWeight,  # (N, C, *spatial); the same or the class map (N, *spatial); as X or None; (C,) or None
    Sums,  # (N, C, blocks, 4): BCE, p t, p + t or their squares, elements that count
    n_pixels, C, sizes, x_strides, target_strides, mask_strides, x_outer, target_outer, mask_outer, pos_weight_stride,
    CLASS_MAP: tl.constexpr, SQUARED: tl.constexpr, CHECK: tl.constexpr, INDEX: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK pixels of one image, in every class."""
    n, block = image_and_block(n_pixels, BLOCK)
    i = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_pixels
    map = 0
    if CLASS_MAP:
        map = tl.load(_at(Target + n * target_outer[0], i, sizes, target_strides, DIMS), mask=inside, other=0)
    for k in range(C):
        c = n * 0 + k  # int64
        x, t, keep = _dice_load(
            X, Target, Mask, map, n, c, i, inside, sizes, x_strides, target_strides, mask_strides,
            x_outer, target_outer, mask_outer, C, CLASS_MAP, CHECK, DIMS,
        )  # fmt: skip
        p, q, log = _sigmoid(x)
        positive = t
        if PosWeight is not None:
            positive = t * tl.load(PosWeight + c * pos_weight_stride).to(tl.float32)
        loss, _ = _bce(x, t, positive, p, q, log)
        sizes_of = p * p + t * t if SQUARED else p + t
        to = Sums + ((n * C + c) * blocks_of(n_pixels, BLOCK) + block) * 4
        tl.store(to, tl.sum(tl.where(keep, loss, 0.0), 0))
        tl.store(to + 1, tl.sum(tl.where(keep, p * t, 0.0), 0))
        tl.store(to + 2, tl.sum(tl.where(keep, sizes_of, 0.0), 0))
        tl.store(to + 3, tl.sum(keep.to(tl.float32), 0))


@kernel
def _dice_finish_kernel(
    Sums, Loss, Factors,  # (E, 4); (E,) or a scalar; (E, 3)
    E, bce_weight, dice_weight, smooth,
    SQUARED: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all entries."""
    bces, dices, owns = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    elements, present = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        bce, above, below, count = _entry(Sums, e, E, smooth)
        dice = 1.0 - above / below
        own = tl.where(count > 0, bce_weight * (bce / count) + dice_weight * dice, 0.0)
        if REDUCTION == "none":
            tl.store(Loss + e, own, mask=e < E)
        bces, dices, owns = bces + bce, dices + tl.where(count > 0, dice, 0.0), owns + own
        elements, present = elements + count, present + (count > 0).to(tl.float32)
    total, entries = tl.sum(elements, 0), tl.sum(present, 0)
    if REDUCTION == "mean":
        tl.store(Loss, bce_weight * (tl.sum(bces, 0) / total) + dice_weight * (tl.sum(dices, 0) / entries))
    if REDUCTION == "sum":
        tl.store(Loss, tl.sum(owns, 0))
    for start in range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        _, above, below, count = _entry(Sums, e, E, smooth)
        of_bce, of_dice = bce_weight / count, dice_weight
        if REDUCTION == "mean":
            of_bce, of_dice = tl.where(count > 0, bce_weight / total, 0.0), dice_weight / entries
        of_p = of_dice * above / below / below
        if SQUARED:
            of_p *= 2.0
        tl.store(Factors + e * 3, tl.where(count > 0, of_bce, 0.0), mask=e < E)
        tl.store(Factors + e * 3 + 1, tl.where(count > 0, -2.0 * of_dice / below, 0.0), mask=e < E)
        tl.store(Factors + e * 3 + 2, tl.where(count > 0, of_p, 0.0), mask=e < E)


@triton.jit
def _entry(Sums, e, E, smooth):
    bce = tl.load(Sums + e * 4, mask=e < E, other=0.0)
    both, sizes = tl.load(Sums + e * 4 + 1, mask=e < E, other=0.0), tl.load(Sums + e * 4 + 2, mask=e < E, other=0.0)
    return bce, 2.0 * both + smooth, sizes + smooth, tl.load(Sums + e * 4 + 3, mask=e < E, other=0.0)


@kernel
def _dice_grad_kernel(
    X, Target, Mask, PosWeight, Factors, Grad,
    n_pixels, C, sizes, x_strides, target_strides, mask_strides, grad_strides, x_outer, target_outer, mask_outer, grad_outer,
    factors_outer, pos_weight_stride,
    CLASS_MAP: tl.constexpr, SQUARED: tl.constexpr, INDEX: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK pixels of one image, in every class."""
    n, block = image_and_block(n_pixels, BLOCK)
    i = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_pixels
    map = 0
    if CLASS_MAP:
        map = tl.load(_at(Target + n * target_outer[0], i, sizes, target_strides, DIMS), mask=inside, other=0)
    for k in range(C):
        c = n * 0 + k  # int64
        x, t, keep = _dice_load(
            X, Target, Mask, map, n, c, i, inside, sizes, x_strides, target_strides, mask_strides,
            x_outer, target_outer, mask_outer, C, CLASS_MAP, False, DIMS,
        )  # fmt: skip
        p, q, log = _sigmoid(x)
        positive = t
        if PosWeight is not None:
            positive = t * tl.load(PosWeight + c * pos_weight_stride).to(tl.float32)
        _, d = _bce(x, t, positive, p, q, log)
        factors = Factors + n * factors_outer[0] + c * factors_outer[1]
        of_bce, of_target = tl.load(factors), tl.load(factors + factors_outer[2])
        of_p = tl.load(factors + 2 * factors_outer[2])
        d = d * of_bce + p * q * (t * of_target + (p * of_p if SQUARED else of_p))
        to = _at(Grad + n * grad_outer[0] + c * grad_outer[1], i, sizes, grad_strides, DIMS)
        tl.store(to, tl.where(keep, d, 0.0).to(Grad.dtype.element_ty), mask=inside)


def _walk(shape, *tensors):
    """Sizes, and strides of each tensor (zeros for None), of as few dimensions as visit all of them in the order of the first one's
    memory: those of size 1 are left out, and neighbours become one where every tensor lets them. Then the integer type of offsets."""
    return _walk_of(tuple(shape), *((0,) * len(shape) if t is None else t.stride()[t.dim() - len(shape) :] for t in tensors))


@functools.lru_cache(4096)
def _walk_of(shape, *all_strides):
    sizes, strides = [], [[] for _ in all_strides]
    for d in sorted(range(len(shape)), key=lambda d: -all_strides[0][d]):
        if shape[d] == 1:
            continue
        if sizes and all(own[-1] == of[d] * shape[d] for own, of in zip(strides, all_strides, strict=True)):
            sizes[-1] *= shape[d]
            for own, of in zip(strides, all_strides, strict=True):
                own[-1] = of[d]
        else:
            sizes.append(shape[d])
            for own, of in zip(strides, all_strides, strict=True):
                own.append(of[d])
    furthest = max(sum((n - 1) * stride for n, stride in zip(sizes, own, strict=True)) for own in strides)
    index = tl.int64 if max(furthest, math.prod(shape)) + BLOCK >= 2**31 else tl.int32
    return tuple(sizes or [1]), [tuple(own or [0]) for own in strides], index


def _integer(t):
    return not t.is_floating_point() and t.dtype != torch.bool


def _pointwise(input, target, weight, pos_weight, mask, dloss, scale, loss, sums, grad, alpha, gamma):
    n = input.numel()
    sizes, strides, INDEX = _walk(input.shape, input, target, weight, pos_weight, mask, dloss, loss, grad)
    CHECK = _integer(target) and sums is not None
    with torch.cuda.device_of(input):
        _pointwise_kernel[(cdiv(n, BLOCK),)](
            input, target, weight, pos_weight, mask, dloss, scale, loss, sums, grad, n, sizes, *strides, alpha, gamma,
            FOCAL=alpha >= 0, GAMMA=int(gamma) if gamma in (0, 1, 2) else 3, CHECK=CHECK, INDEX=INDEX, DIMS=len(sizes), BLOCK=BLOCK,
            num_warps=4, **FUSED, **ASSERT if CHECK else {},
        )  # fmt: skip


def sigmoid_loss_fwd(input, target, weight, pos_weight, mask, alpha, gamma, reduction, with_grad):
    loss, scale, grad = sigmoid_loss_outputs(input, reduction, with_grad)
    count = input.numel() if mask is None else mask.sum()
    if reduction != "mean":
        scale.fill_(1.0)
    elif mask is None:
        scale.fill_(1.0 / max(count, 1))
    else:
        scale.copy_(count).reciprocal_().nan_to_num_(posinf=0.0)
    sums = scale.new_empty(cdiv(input.numel(), BLOCK))
    if input.numel():
        each = loss if reduction == "none" else None
        _pointwise(input, target, weight, pos_weight, mask, None, scale, each, sums, grad if with_grad else None, alpha, gamma)
    if reduction != "none":
        loss = sums.sum() / count if reduction == "mean" else sums.sum()
    return loss, scale, grad


def sigmoid_loss_bwd(dloss, input, target, weight, pos_weight, mask, scale, alpha, gamma):
    grad = torch.empty_like(input)
    if input.numel():
        _pointwise(input, target, weight, pos_weight, mask, dloss.expand(input.shape), scale, None, None, grad, alpha, gamma)
    return grad


def _outer(t, like):
    """Strides from image to image and from class to class."""
    return (0, 0) if t is None else (t.stride(0), t.stride(1) if t.dim() == like.dim() else 0)


def bce_dice_fwd(input, target, pos_weight, mask, bce_weight, dice_weight, smooth, squared, per_image, reduction):
    loss, factors = bce_dice_outputs(input, per_image, reduction)
    N, C, *spatial = input.shape
    pixels = math.prod(spatial)
    block = min(BLOCK, next_power_of_2(max(pixels, 1)))
    blocks = cdiv(pixels, block)
    sums = factors.new_empty((N, C, blocks, 4))
    sizes, strides, INDEX = _walk(spatial, input, target, mask)
    CHECK = _integer(target)
    with torch.cuda.device_of(input):
        if sums.numel():
            _dice_sums_kernel[(N * blocks,)](
                input, target, mask, pos_weight, sums, pixels, C, sizes, *strides, *(_outer(t, input) for t in (input, target, mask)),
                0 if pos_weight is None else pos_weight.stride(0), CLASS_MAP=target.dim() < input.dim(), SQUARED=squared, CHECK=CHECK,
                INDEX=INDEX, DIMS=len(sizes), BLOCK=block, num_warps=max(1, min(4, block // 32)), **FUSED, **ASSERT if CHECK else {},
            )  # fmt: skip
        sums = sums.sum(2 if per_image else (0, 2))
        entries = sums.numel() // 4
        _dice_finish_kernel[(1,)](
            sums, loss, factors, entries, bce_weight, dice_weight, smooth, SQUARED=squared, REDUCTION=reduction,
            BLOCK=min(BLOCK, next_power_of_2(max(entries, 1))), num_warps=4, **FUSED,
        )  # fmt: skip
    return loss, factors


def bce_dice_bwd(input, target, pos_weight, mask, factors, squared):
    grad = torch.empty_like(input)
    N, C, *spatial = input.shape
    pixels = math.prod(spatial)
    block = min(BLOCK, next_power_of_2(max(pixels, 1)))
    sizes, strides, INDEX = _walk(spatial, input, target, mask, grad)
    factors_outer = factors.stride() if factors.dim() == 3 else (0, *factors.stride())
    if grad.numel():
        with torch.cuda.device_of(input):
            _dice_grad_kernel[(N * cdiv(pixels, block),)](
                input, target, mask, pos_weight, factors, grad, pixels, C, sizes, *strides,
                *(_outer(t, input) for t in (input, target, mask, grad)), factors_outer,
                0 if pos_weight is None else pos_weight.stride(0), CLASS_MAP=target.dim() < input.dim(), SQUARED=squared,
                INDEX=INDEX, DIMS=len(sizes), BLOCK=block, num_warps=max(1, min(8, block // 32)), **FUSED,
            )  # fmt: skip
    return grad

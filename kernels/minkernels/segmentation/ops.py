"""Fused losses on logits for segmentation and detection: BCE, BCE + Dice, focal. What they promise."""

import torch
from torch import Tensor

from minkernels._checks import (
    FLOATS,
    NARROW,
    REDUCTIONS,
    check_constant,
    check_floats,
    check_number,
    check_reduction,
    check_tensor,
    is_dense,
    on_one_device,
)
from minkernels._library import apply, define, needs_grad, no_gradient, once_differentiable, traceable
from minkernels.cross_entropy.ops import grad_early, kept_by_graph, scale, take_early
from minkernels.segmentation import reference
from minkernels.segmentation._outputs import bce_dice_outputs, sigmoid_loss_outputs

INTEGERS = torch.uint8, torch.int32, torch.int64


def bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy of sigmoid(input), as F.binary_cross_entropy_with_logits:
    weight (pos_weight target softplus(-input) + (1 - target) softplus(input)).

    Args:
        input: logits in nats, of any shape: float16, bfloat16, float32, or float64 (CPU only); any strides. Never changed.
        target: of the shape of input. Any float dtype (soft targets too), bool, or uint8, int32, int64, which must be 0 or 1 wherever
            they count. Has no gradient.
        weight: any float dtype, broadcast to input without a copy; default 1. Has no gradient.
        pos_weight: as weight, of the positive part alone.
        mask: bool, broadcast to input without a copy; default: every element counts. Where it is False the loss is 0, the gradient is
            exactly 0 whatever the other tensors hold there, and the element is out of the mean.
        reduction: "none", "mean" (over the elements that count; NaN if none does, and the gradient 0) or "sum".
    Returns: the loss in nats, of input's shape for "none", else a scalar; float32 for 16-bit logits, else the dtype of the input.
    Raises: ValueError for shapes or values that do not fit, and for a target, weight or pos_weight that requires a gradient;
        TypeError for unsupported dtypes and mixed devices; IndexError on the CPU for an integer target that counts and is
        neither 0 nor 1, naming its position and value (on a GPU, a device assert).
    A loss of 1e-30 is as exact as one of 1: nothing is subtracted that would cancel. -inf with a target above 0 costs inf, where
    PyTorch gives NaN; with the other infinities both give the same. A scalar loss whose gradient is wanted computes the
    gradient in the same pass over the logits, except in float16 and in compiled graphs.
    Source: PyTorch, torch.nn.BCEWithLogitsLoss.
    """
    if mask is None:
        loss = usual_bce(input, target, weight, reduction, pos_weight)
        if loss is not None:
            return loss
    _check_input(input, 0)
    _check_target(input, target)
    check_reduction(reduction)
    weight, pos_weight = _weights(input, "weight", weight), _weights(input, "pos_weight", pos_weight)
    return _sigmoid_loss(input, target, weight, pos_weight, _mask(input, mask), -1.0, 0.0, reduction)


def usual_bce(input, target, weight, reduction, pos_weight) -> Tensor | None:
    """bce_with_logits of 16 or 32-bit logits and a constant target of their dtype and shape, in two thirds of the time that it takes to
    look for all that may be wrong with a call; None for every other call."""
    if not (type(input) is type(target) is Tensor and is_dense(input) and is_dense(target)):
        return None
    if target.dtype != input.dtype or input.dtype not in NARROW or target.shape != input.shape or not on_one_device(input, target):
        return None
    if target.requires_grad or reduction not in REDUCTIONS:
        return None
    if weight is not None:
        weight = _usual_weights(input, weight)
        if weight is None:
            return None
    if pos_weight is not None:
        pos_weight = _usual_weights(input, pos_weight)
        if pos_weight is None:
            return None
    return _sigmoid_loss(input, target, weight, pos_weight, None, -1.0, 0.0, reduction)


def _usual_weights(input, t) -> Tensor | None:
    """Of the shape of input's last dimensions."""
    if type(t) is not Tensor or not is_dense(t) or t.dtype != input.dtype or t.requires_grad or not on_one_device(input, t):
        return None
    missing = input.dim() - t.dim()
    return t.expand(input.shape) if missing >= 0 and t.shape == input.shape[missing:] else None


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    mask: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """alpha_t (1 - p_t) ** gamma BCE(input, target), as torchvision.ops.sigmoid_focal_loss, with p = sigmoid(input),
    p_t = p target + (1 - p) (1 - target), and alpha_t = alpha target + (1 - alpha) (1 - target).

    Args:
        input, target, mask: as bce_with_logits takes them.
        alpha: weight of the positive class, up to 1; negative: alpha_t = 1.
        gamma: at least 0; 0, 1 and 2 need no power function.
        reduction: "none", "mean" (over the elements that count) or "sum". For RetinaNet, divide the sum by the number of positives.
    Returns, Raises: as bce_with_logits.
    1 - p_t is computed as what it is, not as 1 minus a rounded p_t: losses of confident, right answers are exact too.
    Source: Focal Loss for Dense Object Detection, Lin et al. 2017, arXiv:1708.02002, equation 5.
    """
    _check_input(input, 0)
    _check_target(input, target)
    check_reduction(reduction)
    check_number("alpha", alpha)
    check_number("gamma", gamma)
    if alpha > 1:
        raise ValueError(f"alpha must be at most 1 (negative: no weighting), got {alpha}")
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    return _sigmoid_loss(input, target, None, None, _mask(input, mask), float(alpha), float(gamma), reduction)


def bce_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    bce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1.0,
    squared: bool = False,
    per: str = "image",
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """bce_weight BCE + dice_weight Dice, from one read of logits and targets; the backward reads them once more.

    Dice = 1 - (2 I + smooth) / (P + T + smooth), with p = sigmoid(input), I = sum p target, P = sum p and T = sum target, or
    P = sum p**2 and T = sum target**2 if squared. An entry is an image and class (per="image") or a class over the whole batch
    (per="batch"); its Dice is over its elements that count, and its BCE is their mean.

    Shapes: N images, C classes, any number of spatial dimensions, also none.
    Args:
        input: (N, C, *spatial) logits in nats: float16, bfloat16, float32, or float64 (CPU only); any strides. Never changed.
        target: by its shape. Of input's shape: one target for each element, as bce_with_logits takes it. (N, *spatial), where C > 1:
            a class map, uint8, int32 or int64, of 0 to C - 1 wherever it counts; each class against all others, and no one-hot
            tensor is made. Has no gradient.
        bce_weight, dice_weight: finite numbers. smooth: a finite number, at least 0. With 0, an entry whose P and T are 0 is 0 / 0: NaN.
        pos_weight: (C,), any float dtype: of the positive part of the BCE. Has no gradient.
        mask: bool, (N, C, *spatial) or broadcast to it, or (N, *spatial): where it is False, the element is out of every sum, and its
            gradient is exactly 0 whatever is there. An entry without any element that counts is 0, and out of the mean.
        reduction: "none": bce_weight BCE + dice_weight Dice of each entry. "sum": their sum. "mean": bce_weight times the BCE's mean over
            all elements that count, plus dice_weight times the mean of Dice over the entries, which without a mask is the mean of "none";
            NaN if no element counts, and the gradient 0.
    Returns: a scalar, or for "none" (N, C) or, for per="batch", (C,); float32 for 16-bit logits, else the dtype of the input.
    Raises: as bce_with_logits; IndexError on the CPU also for a class out of range.
    Memory: three numbers for each entry, and four for each 16384 elements (1024 on a GPU), are kept or used on top of the gradient.
    Source: V-Net, Milletari et al. 2016, arXiv:1606.04797 (squared); nnU-Net, Isensee et al. 2018, arXiv:1809.10486.
    """
    _check_input(input, 2)
    check_tensor("target", target)
    if target.dim() < input.dim() and target.shape == (input.shape[0], *input.shape[2:]):
        _check_class_map(input, target)
    else:
        _check_target(input, target)
    check_reduction(reduction)
    if per not in ("image", "batch"):
        raise ValueError(f"per must be image or batch, got {per!r}")
    numbers = bce_weight, dice_weight, smooth
    for name, number in zip(("bce_weight", "dice_weight", "smooth"), numbers, strict=True):
        check_number(name, number)
    if smooth < 0:
        raise ValueError(f"smooth must be at least 0, got {smooth}")
    if not isinstance(squared, bool):
        raise TypeError(f"squared must be a bool, got {squared!r}")
    if pos_weight is not None:
        _check_weights(input, "pos_weight", pos_weight)
        if pos_weight.shape != input.shape[1:2]:
            raise ValueError(f"pos_weight must be (C={input.shape[1]},), got {tuple(pos_weight.shape)}")
    if isinstance(mask, Tensor) and is_dense(mask) and mask.dim() < input.dim() and mask.shape == (input.shape[0], *input.shape[2:]):
        mask = mask.unsqueeze(1)
    args = traceable(input, target, pos_weight, _mask(input, mask), *map(float, numbers), squared, per == "image", reduction)
    return (apply(_BCEDice, *args) if needs_grad(args[0]) else _bce_dice_fwd(*args))[0]


def _sigmoid_loss(input, *options):
    (input,) = traceable(input)
    if not needs_grad(input):
        return _sigmoid_loss_fwd(input, *options, False)[0]
    return apply(_SigmoidLoss, kept_by_graph(input), *options, options[-1] != "none" and grad_early(input))[0]


def _check_input(input, least):
    check_floats("input", input)
    if input.dim() < least:
        raise ValueError(f"input must be (N, C, *spatial), got shape {tuple(input.shape)}")


def _check_target(input, target):
    check_tensor("target", target)
    if target.dtype not in (*FLOATS, torch.bool, *INTEGERS):
        raise TypeError(f"target must be a float, bool, uint8, int32 or int64 tensor, got {target.dtype}")
    if target.shape != input.shape:
        raise ValueError(f"target must have the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}")
    check_constant("target", target, "input", input)


def _check_class_map(input, target):
    shape = tuple(target.shape)
    if target.dtype not in INTEGERS:
        raise TypeError(f"target of shape {shape} is a class map, which must be uint8, int32 or int64, got {target.dtype}")
    if input.shape[1] == 1:
        raise ValueError(f"target of shape {shape} is a class map, but input has one class: give target[:, None], of input's shape")
    check_constant("target", target, "input", input)


def _check_weights(input, name, t):
    check_floats(name, t, converted=True)
    check_constant(name, t, "input", input)


def _weights(input, name, t):
    if t is None:
        return None
    _check_weights(input, name, t)
    return _expand(input, name, t)


def _mask(input, mask):
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    check_constant("mask", mask, "input", input)
    return _expand(input, "mask", mask)


def _expand(input, name, t):
    missing = input.dim() - t.dim()
    for i, n in enumerate(t.shape):
        if missing < 0 or (n != 1 and n != input.shape[missing + i]):
            raise ValueError(f"{name} must broadcast to input {tuple(input.shape)}, got {tuple(t.shape)}")
    return t.expand(input.shape)


# Of both operators, weight, pos_weight and mask are given in the shape of input, by strides of 0. BCE is the focal loss with alpha -1 and
# gamma 0. scale: what the gradient of each element is multiplied by (1 / elements that count). grad: as if the upstream gradient were 1;
# empty if nobody asked for it.
_sigmoid_loss_fwd = define(
    "sigmoid_loss_fwd",
    "(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? mask, float alpha, float gamma, str reduction, "
    "bool with_grad) -> (Tensor loss, Tensor scale, Tensor grad)",
    fake=lambda input, *rest: sigmoid_loss_outputs(input, *rest[-2:]),
    reference=reference.sigmoid_loss_fwd,
    cpu=None,
    cuda="minkernels.segmentation._triton:sigmoid_loss_fwd",
)
_sigmoid_loss_bwd = once_differentiable(
    define(
        "sigmoid_loss_bwd",
        "(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? mask, Tensor scale, float alpha, "
        "float gamma) -> Tensor",
        fake=lambda dloss, input, *_: torch.empty_like(input),
        reference=reference.sigmoid_loss_bwd,
        cpu=None,
        cuda="minkernels.segmentation._triton:sigmoid_loss_bwd",
    )
)


class _SigmoidLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _sigmoid_loss_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.alpha, ctx.gamma, _, with_grad = inputs
        _, scale, grad = output
        ctx.save_for_backward(*tensors, scale)
        ctx.early = grad if with_grad else None
        ctx.mark_non_differentiable(scale, grad)
        ctx.set_materialize_grads(False)  # else zeros as large as the logits, for the outputs that have no gradient

    @staticmethod
    def backward(ctx, dloss, _dscale, _dgrad):
        if dloss is None:
            return (None,) * 9
        no_gradient(ctx, target=1, weight=2, pos_weight=3)
        grad = take_early(ctx, dloss)
        if grad is None:
            grad = _sigmoid_loss_bwd(dloss, *ctx.saved_tensors, ctx.alpha, ctx.gamma)
        else:
            scale(grad.as_strided((1, grad.numel()), (grad.numel(), 1)), dloss)  # dense, whatever its order
        return grad, *(None,) * 8


# mask in the shape of input. factors, (N, C, 3) or (C, 3): the gradient is their products with the BCE's derivative, with p (1 - p) target,
# and with p (1 - p), or p**2 (1 - p) if squared; the backward is given them times the upstream gradient.
_bce_dice_fwd = define(
    "bce_dice_fwd",
    "(Tensor input, Tensor target, Tensor? pos_weight, Tensor? mask, float bce_weight, float dice_weight, float smooth, bool squared, "
    "bool per_image, str reduction) -> (Tensor loss, Tensor factors)",
    fake=lambda input, *rest: bce_dice_outputs(input, *rest[-2:]),
    reference=reference.bce_dice_fwd,
    cpu=None,
    cuda="minkernels.segmentation._triton:bce_dice_fwd",
)
_bce_dice_bwd = once_differentiable(
    define(
        "bce_dice_bwd",
        "(Tensor input, Tensor target, Tensor? pos_weight, Tensor? mask, Tensor factors, bool squared) -> Tensor",
        fake=lambda input, *_: torch.empty_like(input),
        reference=reference.bce_dice_bwd,
        cpu=None,
        cuda="minkernels.segmentation._triton:bce_dice_bwd",
    )
)


class _BCEDice(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _bce_dice_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, pos_weight, mask, *_, ctx.squared, _, _ = inputs
        ctx.save_for_backward(input, target, pos_weight, mask, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, _dfactors):
        if dloss is None:
            return (None,) * 10
        no_gradient(ctx, target=1, pos_weight=2)
        *tensors, factors = ctx.saved_tensors
        return _bce_dice_bwd(*tensors, factors * dloss[..., None], ctx.squared), *(None,) * 9

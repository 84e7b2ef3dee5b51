"""The IoU family: pairwise overlaps, the best match without their matrix, and the losses of aligned pairs. What they promise."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minkernels._checks import FLOATS, INTEGER_NAMES, INTEGERS, check_floats, check_number, check_reduction, check_tensor
from minkernels._library import apply, define, needs_grad, once_differentiable, traceable
from minkernels.boxes import reference
from minkernels.boxes._outputs import grads, loss_output, match_outputs, pair_output

KINDS = "iou", "giou", "diou", "ciou"
FORMATS = "xyxy", "xywh", "cxcywh"


class IoUMatch(NamedTuple):
    best_iou: Tensor  # (..., N), of each box; 0 where it has no match
    best_gt: Tensor  # (..., N) int64; -1 where there is none
    gt_best_iou: Tensor  # (..., G), of each ground truth
    gt_best_box: Tensor  # (..., G) int64


def box_iou(boxes1: Tensor, boxes2: Tensor, *, fmt: str = "xyxy") -> Tensor:
    """Intersection over union of every box of boxes1 with every box of boxes2, as torchvision.ops.box_iou, in one pass that writes
    the result and nothing else.

    Shapes: N and M boxes, leading dimensions "..." that broadcast.
    Args:
        boxes1: (..., N, 4), boxes2: (..., M, 4): float16, bfloat16, float32, float64 (CPU only), int64, int32, int16, int8 or uint8;
            any unit, any strides, both of one dtype and on one device. Never changed.
        fmt: "xyxy" (two corners), "xywh" (corner, width, height) or "cxcywh" (centre, width, height). Boxes of the last two are
            turned into corners first, and all else follows from these.
    Returns: (..., N, M), contiguous; float64 for float64 boxes, else float32, as in torchvision: a 16-bit IoU could not be compared with a
        threshold, and integers divide to floats.
    Raises: ValueError for shapes that do not fit or an unknown fmt; TypeError for unsupported or mixed dtypes and mixed devices.
    For float32 and float64 corners the bits are those of torchvision's formula: IEEE operations in its order, none contracted. Other
    boxes are widened to float32 before the first operation, where torchvision subtracts float16 in float16 and integers as such
    (int32 and int64 beyond 2**24 are rounded).
    Two boxes of area 0 have an IoU of 0, where torchvision gives NaN. A NaN coordinate makes the IoU of its own pairs NaN and no
    other. An inverted box (x2 < x1 or y2 < y1) intersects nothing, but the product of its sides, which may be negative, counts as its
    area, as in torchvision: its IoUs are 0, or -0.
    Differentiable on both sides. Where two edges meet exactly, each has half of the gradient of their maximum or minimum, as in
    PyTorch. A pair whose upstream gradient is 0 adds nothing to any gradient, whatever it holds. Second derivatives raise. On a
    CPU the backward sums in float64 and keeps up to 16 such sums for each coordinate of each box; on a GPU in float32.
    Source: torchvision.ops.box_iou.
    """
    return _pairs(boxes1, boxes2, "iou", fmt, 0.0)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, *, fmt: str = "xyxy") -> Tensor:
    """IoU - (hull - union) / hull, with the area of the smallest box around both: -1 to 1.

    Args, Returns, Raises: as box_iou. Where hull is 0 (two equal points, say), the quotient is 0, where torchvision gives NaN.
    Source: Generalized Intersection over Union, Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1.
    """
    return _pairs(boxes1, boxes2, "giou", fmt, 0.0)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, *, fmt: str = "xyxy", eps: float = 1e-7) -> Tensor:
    """IoU - d2 / (c2 + eps): d2 is the squared distance of the centres, c2 the squared diagonal of the smallest box around both.

    Args: as box_iou. eps: at least 0, in squared units of the boxes; with 0, a quotient of 0 / 0 is 0.
    Returns, Raises: as box_iou; ValueError for a negative eps.
    Source: Distance-IoU Loss, Zheng et al. 2020, arXiv:1911.08287, equation 7.
    """
    _check_eps(eps)
    return _pairs(boxes1, boxes2, "diou", fmt, float(eps))


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, *, fmt: str = "xyxy", eps: float = 1e-7) -> Tensor:
    """DIoU - alpha v, with v = 4 / pi**2 (atan(w1 / h1) - atan(w2 / h2))**2 and alpha = v / (1 - IoU + v + eps).

    Args, Returns, Raises: as distance_box_iou. alpha has no gradient, as in the paper and in torchvision. A side ratio of 0 / 0 is 0.
    Source: Distance-IoU Loss, Zheng et al. 2020, arXiv:1911.08287, equations 8 to 11.
    """
    _check_eps(eps)
    return _pairs(boxes1, boxes2, "ciou", fmt, float(eps))


def iou_match(boxes: Tensor, gts: Tensor, *, fmt: str = "xyxy") -> IoUMatch:
    """The best ground truth of each box and the best box of each ground truth, by IoU; what a max over both sides of
    box_iou(boxes, gts) gives, without that matrix.

    Args:
        boxes: (..., N, 4), gts: (..., G, 4), and fmt: as box_iou takes them. Leading dimensions broadcast.
    Returns: IoUMatch(best_iou (..., N), best_gt (..., N) int64, gt_best_iou (..., G), gt_best_box (..., G) int64). Of equal IoUs the lowest
        index wins. A pair whose IoU is NaN is no match. What has no match (the other side is empty, or all its pairs are NaN) has IoU
        0 and index -1; an IoU of 0 with something that is there is a match, as in argmax. The values are those of box_iou, bit for bit.
    Raises: as box_iou.
    Has no gradient: gather by the indices and use iou_loss. Extra memory: O(N + G), on a CPU up to 64 partial results of each ground
    truth.
    Source: the assigners of Faster R-CNN, Ren et al. 2015, arXiv:1506.01497, section 3.1.2.
    """
    boxes, gts = _two_sets("boxes", boxes, "gts", gts, fmt)
    return IoUMatch(*_iou_match(boxes.detach(), gts.detach(), fmt))


def iou_loss(
    input: Tensor, target: Tensor, *, kind: str = "iou", fmt: str = "xyxy", reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """1 - IoU, GIoU, DIoU or CIoU of aligned pairs, as torchvision.ops.generalized_box_iou_loss, distance_box_iou_loss and
    complete_box_iou_loss: one kernel forward, one backward, nothing that depends on the data, no boolean indexing.

    Args:
        input, target: (..., 4), of one shape, dtype and device: float16, bfloat16, float32, or float64 (CPU only); any strides (where
            the leading dimensions are not one stride apart, a copy is made). Never changed. Both have a gradient.
        kind: "iou", "giou", "diou" or "ciou". fmt: as in box_iou.
        reduction: "none", "mean" (0 where there is no pair, as in torchvision) or "sum".
        eps: at least 0; added to the union, the area of the hull, the squared diagonal, and the denominator of alpha (where torchvision's
            complete_box_iou_loss takes 1e-7 whatever eps is). With 0, a quotient of 0 / 0 is 0.
    Returns: (...,) for "none", else a scalar; float64 for float64 boxes, else float32. Gradients have the dtype of the boxes and are
        contiguous; sums of losses are float64 inside, on a GPU float32.
    Raises: ValueError for shapes, values or names that do not fit; TypeError for unsupported or mixed dtypes and mixed devices.
    alpha of CIoU has no gradient. Inverted boxes: their signed area counts, and they intersect nothing. A NaN makes the loss and the
    gradient of its own pair NaN; a pair whose upstream gradient is 0 has gradient 0, whatever it holds. Second derivatives raise.
    Source: as the pairwise functions.
    """
    check_floats("input", input)
    check_floats("target", target)
    if input.dim() < 1 or input.shape[-1] != 4:
        raise ValueError(f"input must be (..., 4), got {tuple(input.shape)}")
    if target.shape != input.shape:
        raise ValueError(f"target must have the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}")
    _check_alike("input", input, "target", target)
    _check_name("kind", kind, KINDS)
    _check_name("fmt", fmt, FORMATS)
    check_reduction(reduction)
    _check_eps(eps)
    args = traceable(input, target, kind, fmt, float(eps), reduction)
    return apply(_Loss, *args) if needs_grad(*args[:2]) else _iou_loss_fwd(*args)


def _pairs(boxes1, boxes2, kind, fmt, eps):
    boxes1, boxes2 = _two_sets("boxes1", boxes1, "boxes2", boxes2, fmt)
    args = traceable(boxes1, boxes2, kind, fmt, eps)
    return apply(_Pairs, *args) if needs_grad(*args[:2]) else _box_pairs_fwd(*args)


def _two_sets(name1, boxes1, name2, boxes2, fmt):
    """Both in the dtype of the arithmetic, with the same leading dimensions."""
    for name, t in ((name1, boxes1), (name2, boxes2)):
        check_tensor(name, t)
        if t.dtype not in INTEGERS:
            if t.dtype not in FLOATS:
                raise TypeError(f"{name} must be float16, bfloat16, float32, float64, {INTEGER_NAMES}, got {t.dtype}")
            check_floats(name, t)
        if t.dim() < 2 or t.shape[-1] != 4:
            raise ValueError(f"{name} must be (..., number of boxes, 4), got {tuple(t.shape)}")
    _check_alike(name1, boxes1, name2, boxes2)
    _check_name("fmt", fmt, FORMATS)
    if boxes1.dtype != torch.float64:
        boxes1, boxes2 = boxes1.float(), boxes2.float()
    lead1, lead2 = boxes1.shape[:-2], boxes2.shape[:-2]
    if lead1 != lead2:
        n = min(len(lead1), len(lead2))
        if any(a != b and a != 1 and b != 1 for a, b in zip(lead1[len(lead1) - n :], lead2[len(lead2) - n :], strict=True)):
            shapes = f"{tuple(boxes1.shape)} and {tuple(boxes2.shape)}"
            raise ValueError(f"the leading dimensions of {name1} and {name2} must broadcast, got {shapes}")
        lead = torch.broadcast_shapes(lead1, lead2)
        boxes1, boxes2 = boxes1.expand(*lead, -1, -1), boxes2.expand(*lead, -1, -1)
    return boxes1, boxes2


def _check_alike(name1, t1, name2, t2):
    if t1.dtype != t2.dtype:
        raise TypeError(f"{name1} and {name2} must have one dtype, got {t1.dtype} and {t2.dtype}")
    if t1.device != t2.device:
        raise TypeError(f"{name1} and {name2} must be on one device, got {t1.device} and {t2.device}")


def _check_name(what, name, names):
    if name not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}, got {name!r}")


def _check_eps(eps):
    check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


# Boxes (..., N, 4) and (..., M, 4) with the same leading dimensions, float32 or float64.
_box_pairs_fwd = define(
    "box_pairs_fwd",
    "(Tensor boxes1, Tensor boxes2, str kind, str fmt, float eps) -> Tensor",
    fake=lambda boxes1, boxes2, *_: pair_output(boxes1, boxes2),
    reference=reference.pairs_fwd,
    cpu="minkernels.boxes._cpu:pairs_fwd",
    cuda="minkernels.boxes._triton:pairs_fwd",
)
# need1, need2: which gradients are wanted; the other is empty.
_box_pairs_bwd = once_differentiable(
    define(
        "box_pairs_bwd",
        "(Tensor dout, Tensor boxes1, Tensor boxes2, str kind, str fmt, float eps, bool need1, bool need2) -> (Tensor, Tensor)",
        fake=lambda dout, boxes1, boxes2, kind, fmt, eps, *need: grads(boxes1, boxes2, *need),
        reference=reference.pairs_bwd,
        cpu="minkernels.boxes._cpu:pairs_bwd",
        cuda="minkernels.boxes._triton:pairs_bwd",
    )
)
_iou_match = define(
    "iou_match",
    "(Tensor boxes, Tensor gts, str fmt) -> (Tensor best_iou, Tensor best_gt, Tensor gt_best_iou, Tensor gt_best_box)",
    fake=lambda boxes, gts, fmt: match_outputs(boxes, gts),
    reference=reference.match,
    cpu="minkernels.boxes._cpu:match",
    cuda="minkernels.boxes._triton:match",
)
_iou_loss_fwd = define(
    "iou_loss_fwd",
    "(Tensor input, Tensor target, str kind, str fmt, float eps, str reduction) -> Tensor",
    fake=lambda input, target, kind, fmt, eps, reduction: loss_output(input, reduction),
    reference=reference.loss_fwd,
    cpu="minkernels.boxes._cpu:loss_fwd",
    cuda="minkernels.boxes._triton:loss_fwd",
)
_iou_loss_bwd = once_differentiable(
    define(
        "iou_loss_bwd",
        "(Tensor dloss, Tensor input, Tensor target, str kind, str fmt, float eps, bool need_input, bool need_target) "
        "-> (Tensor, Tensor)",
        fake=lambda dloss, input, target, kind, fmt, eps, *need: grads(input, target, *need),
        reference=reference.loss_bwd,
        cpu="minkernels.boxes._cpu:loss_bwd",
        cuda="minkernels.boxes._triton:loss_bwd",
    )
)


class _Pairs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _box_pairs_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *boxes, ctx.kind, ctx.fmt, ctx.eps = inputs
        ctx.save_for_backward(*boxes)

    @staticmethod
    def backward(ctx, dout):
        need = ctx.needs_input_grad[:2]
        d1, d2 = _box_pairs_bwd(dout, *ctx.saved_tensors, ctx.kind, ctx.fmt, ctx.eps, *need)
        return d1 if need[0] else None, d2 if need[1] else None, None, None, None


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _iou_loss_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *boxes, ctx.kind, ctx.fmt, ctx.eps, ctx.reduction = inputs
        ctx.save_for_backward(*boxes)

    @staticmethod
    def backward(ctx, dloss):
        input, target = ctx.saved_tensors
        need, lead = ctx.needs_input_grad[:2], input.shape[:-1]
        if ctx.reduction == "mean":
            dloss = dloss / max(math.prod(lead), 1)
        d1, d2 = _iou_loss_bwd(dloss.expand(lead), input, target, ctx.kind, ctx.fmt, ctx.eps, *need)
        return d1 if need[0] else None, d2 if need[1] else None, None, None, None, None

"""Detections from a YOLO head's raw output, and the loss that trains the first of them: what they promise."""

import torch
from torch import Tensor

from minkernels._checks import as_int, check_constant, check_floats, check_number, check_reduction, check_tensor, check_unit
from minkernels._library import apply, define, needs_grad, once_differentiable, traceable
from minkernels.yolo import reference
from minkernels.yolo._options import SCHEMA, Detections, Options, arithmetic, loss_output, outputs

HEADS = "v1", "v1-planar", "v8", "v8-probs"


def yolo_detect(
    pred: Tensor,
    *,
    head: str,
    boxes_per_cell: int = 2,
    num_classes: int,
    image_size: int | float | tuple | list | None = None,
    sqrt_wh: bool = True,
    score_threshold: float,
    iou_threshold: float,
    max_output: int,
    class_agnostic: bool = False,
    multi_label: bool = False,
    max_candidates: int = 30000,
) -> Detections:
    """The detections of every image of a batch, from a YOLO head's raw output: filter, decode and NMS for each class, with no loop over
    images and, on a GPU, no host synchronisation.

    Shapes: B images, C = num_classes, K = max_output; S x S cells with Bx = boxes_per_cell boxes each; A anchors.
    Args:
        pred: float16, bfloat16, float32, or float64 (CPU only); any strides; never changed. By head:
            "v1": (B, S, S, 5 Bx + C), row, column: in a cell Bx times (x, y, w, h, confidence), then the C class probabilities.
            "v1-planar": (B, S S (5 Bx + C)) or with more dimensions after B, as darknet has it: the class probabilities of all cells
                (S S, C), then the confidences (S S, Bx), then the boxes (S S, Bx, 4) as x, y, w, h.
                Of both: x and y are the centre's place in its cell, 0 to 1; w and h are parts of the image, or their square roots. The
                score of a class is confidence * probability.
            "v8": (B, 4 + C, A), a box as cx, cy, w, h in pixels, then C class logits.
            "v8-probs": the same with class probabilities, as the heads that Ultralytics exports give them.
        boxes_per_cell, image_size, sqrt_wh: of the v1 heads. image_size: pixels, one number or (height, width); the v8 heads, whose boxes
            are in pixels, do without. sqrt_wh: w and h are square roots.
        score_threshold: 0 to 1; a class passes if its score is above. Logits are compared with the threshold's logit: a sigmoid is computed
            for what is returned alone.
        iou_threshold: 0 to 1; a box goes when its IoU with a kept one (of its class) is above.
        max_output: K, at least 1: detections of an image, over all classes.
        class_agnostic: boxes suppress each other whatever their classes.
        multi_label: every class of a box that passes is a candidate, not only its best one (of equal ones the first).
        max_candidates: at least 1; of an image's candidates only so many of the highest scores (of equal ones the first, in the order of
            cells or anchors, then boxes, then classes) are decoded. It bounds the memory of multi_label.
    Returns: Detections(boxes (B, K, 4) as x1, y1, x2, y2 in pixels, not clipped to the image; scores (B, K); classes (B, K) int64; counts
        (B,) int64) by descending score; behind the last one boxes and scores are 0, classes -1. float32, or float64 for float64. No
        gradient: an input that requires one is detached. A class whose score is NaN does not pass; a box with a NaN is dropped. Which
        boxes are returned, and their coordinates, has the same bits on every device; a sigmoid is rounded once from float64.
    Raises: ValueError for shapes or values that do not fit; TypeError for unsupported dtypes.
    Source: You Only Look Once, Redmon et al. 2016, arXiv:1506.02640, section 2; darknet's detection_layer.c for the planar layout.
    """
    check_floats("pred", pred)
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    boxes_per_cell, num_classes = as_int("boxes_per_cell", boxes_per_cell, 1), as_int("num_classes", num_classes, 1)
    max_candidates, max_output = as_int("max_candidates", max_candidates, 1), as_int("max_output", max_output, 1)
    check_unit("score_threshold", score_threshold)
    check_unit("iou_threshold", iou_threshold)
    for name, flag in (("sqrt_wh", sqrt_wh), ("class_agnostic", class_agnostic), ("multi_label", multi_label)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    height, width = _image_size(image_size, head)
    pred = _check_shape(pred.detach(), head, boxes_per_cell, num_classes)
    thresholds = float(score_threshold), float(iou_threshold)
    options = height, width, sqrt_wh, *thresholds, max_output, class_agnostic, multi_label, max_candidates
    return Detections(*_detect(pred, head, boxes_per_cell, num_classes, *options))


def yolo_loss(
    pred: Tensor,
    boxes: Tensor,
    classes: Tensor,
    *,
    boxes_per_cell: int = 2,
    coord: float = 5.0,
    noobj: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """The loss of YOLO v1, squared errors in three parts, in one kernel, and its gradient in another:

    coord ((x - x')**2 + (y - y')**2 + (sqrt w - sqrt w')**2 + (sqrt h - sqrt h')**2) of the responsible box of each cell with an object,
    where x' y' w' h' are its truth; (confidence - IoU)**2 of that box and noobj confidence**2 of all others; (p_c - [c is the class])**2
    over the classes of each cell with an object. Of a cell's boxes the one with the highest IoU with the truth is responsible, of equal
    ones the first.

    Shapes: N images of K x K cells, Bx = boxes_per_cell boxes a cell, C classes.
    Args:
        pred: (N, K, K, 5 Bx + C), row, column, as head "v1" of yolo_detect takes it with sqrt_wh: in a cell Bx times (x, y, sqrt w, sqrt h,
            confidence), then the C class probabilities. float16, bfloat16, float32, or float64 (CPU only); any strides; never changed.
        boxes: (N, K, K, 4), any of these dtypes: x and y of the centre in its cell, 0 to 1, w and h as parts of the image. It counts where
            there is an object, and may hold anything elsewhere. Has no gradient.
        classes: (N, K, K) int32 or int64: 0 to C - 1, or -1 where the cell has no object.
        coord, noobj: at least 0.
        reduction: "mean" over the images (NaN of none), "sum", or "none": of each image.
    Returns: a scalar, or (N,) for "none"; float64 for float64, else float32.
    Raises: ValueError for shapes or values that do not fit, and for boxes that require a gradient; TypeError for unsupported dtypes and
        mixed devices; IndexError on the CPU for a class out of range, naming its place and value (on a GPU, a device assert).
    The IoU is a constant, as in darknet: it has no gradient. Of a cell with an object, the first box with a NaN in x, y, w or h is
    responsible, so the loss NaN. Which box is responsible is the same on every device.
    Source: You Only Look Once, Redmon et al. 2016, arXiv:1506.02640, equation 3.
    """
    check_floats("pred", pred)
    boxes_per_cell = as_int("boxes_per_cell", boxes_per_cell, 1)
    if pred.dim() != 4 or pred.shape[1] != pred.shape[2] or pred.shape[3] <= 5 * boxes_per_cell:
        least = 5 * boxes_per_cell + 1
        raise ValueError(f"pred must be (N, K, K, 5 * boxes_per_cell + C), the last at least {least}, got {tuple(pred.shape)}")
    check_floats("boxes", boxes)
    check_tensor("classes", classes)
    if classes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"classes must be int32 or int64, got {classes.dtype}")
    for name, t, shape in (("boxes", boxes, (*pred.shape[:3], 4)), ("classes", classes, tuple(pred.shape[:3]))):
        if t.shape != shape:
            raise ValueError(f"{name} must be {shape}, as pred {tuple(pred.shape)} has cells, got {tuple(t.shape)}")
        check_constant(name, t, "pred", pred)
    for name, x in (("coord", coord), ("noobj", noobj)):
        check_number(name, x)
        if not 0 <= x <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name} must be at least 0 and a float32, got {x}")
    check_reduction(reduction)
    args = traceable(pred, boxes.to(arithmetic(pred)), classes, boxes_per_cell, float(coord), float(noobj), reduction)
    return apply(_Loss, *args) if needs_grad(args[0]) else _loss_fwd(*args)


def _image_size(image_size, head):
    if image_size is None:
        if head.startswith("v1"):
            raise ValueError(f"image_size must be given for head {head!r}: its boxes are parts of the image")
        return 1.0, 1.0
    both = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(both) != 2:
        raise ValueError(f"image_size must be a number or (height, width), got {image_size!r}")
    for n in both:
        check_number("image_size", n)
        if n <= 0:
            raise ValueError(f"image_size must be positive, got {image_size!r}")
    return float(both[0]), float(both[1])


def _check_shape(pred, head, boxes_per_cell, num_classes):
    """As the operator takes it: (B, S, S, 5 Bx + C), (B, S S (5 Bx + C)) or (B, 4 + C, A)."""
    shape, cell = tuple(pred.shape), 5 * boxes_per_cell + num_classes
    of_cell = f"5 * boxes_per_cell + num_classes = {cell} values"
    if head == "v1":
        if pred.dim() != 4 or pred.shape[1] != pred.shape[2] or pred.shape[3] != cell:
            raise ValueError(f"pred of head 'v1' must be (B, S, S, {cell}): {of_cell} a cell, got {shape}")
        return pred
    if head == "v1-planar":
        if pred.dim() > 2:
            pred = pred.flatten(1)
        if pred.dim() != 2 or pred.shape[1] != round((pred.shape[1] // cell) ** 0.5) ** 2 * cell:  # isqrt() cannot be traced
            raise ValueError(f"pred of head 'v1-planar' must be (B, S * S * {cell}): {of_cell} a cell, got {shape}")
        return pred
    if pred.dim() != 3 or pred.shape[1] != 4 + num_classes:
        raise ValueError(f"pred of head {head!r} must be (B, {4 + num_classes}, A): 4 + num_classes channels, got {shape}")
    return pred


_detect = define(
    "yolo_detect",
    f"(Tensor pred, {SCHEMA}) -> (Tensor boxes, Tensor scores, Tensor classes, Tensor counts)",
    fake=lambda pred, *options: outputs(pred, Options(*options).max_output),
    reference=reference.detect,
    cpu="minkernels.yolo._cpu:detect",
    cuda="minkernels.yolo._triton:detect",
)
# boxes in the dtype of the arithmetic.
_loss_fwd = define(
    "yolo_loss_fwd",
    "(Tensor pred, Tensor boxes, Tensor classes, int boxes_per_cell, float coord, float noobj, str reduction) -> Tensor",
    fake=lambda pred, *rest: loss_output(pred, rest[-1]),
    reference=reference.loss_fwd,
    cpu="minkernels.yolo._cpu:loss_fwd",
    cuda="minkernels.yolo._triton_loss:loss_fwd",
)
_loss_bwd = once_differentiable(
    define(
        "yolo_loss_bwd",
        "(Tensor dloss, Tensor pred, Tensor boxes, Tensor classes, int boxes_per_cell, float coord, float noobj, str reduction) -> Tensor",
        fake=lambda dloss, pred, *_: torch.empty_like(pred),
        reference=reference.loss_bwd,
        cpu="minkernels.yolo._cpu:loss_bwd",
        cuda="minkernels.yolo._triton_loss:loss_bwd",
    )
)


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _loss_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx, dloss):
        return _loss_bwd(dloss, *ctx.saved_tensors, *ctx.options), *(None,) * 6

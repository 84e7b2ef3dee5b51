"""What the tests of the IoU family share: torchvision's formulas, and how boxes are drawn."""

import math

import pytest
import torch

import minkernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["iou", "giou", "diou", "ciou"]
FORMATS = ["xyxy", "xywh", "cxcywh"]
REDUCTIONS = ["none", "mean", "sum"]
LAYOUTS = ["contiguous", "permuted", "slice", "expanded"]
PAIRWISE = {
    "iou": minkernels.box_iou,
    "giou": minkernels.generalized_box_iou,
    "diou": minkernels.distance_box_iou,
    "ciou": minkernels.complete_box_iou,
}
kinds = pytest.mark.parametrize("kind", KINDS)
formats = pytest.mark.parametrize("fmt", FORMATS)


def corners(boxes, fmt):
    a, b, c, d = boxes.unbind(-1)
    if fmt == "xywh":
        return torch.stack([a, b, a + c, b + d], -1)
    if fmt == "cxcywh":
        return torch.stack([a - 0.5 * c, b - 0.5 * d, a + 0.5 * c, b + 0.5 * d], -1)
    return boxes


def box_area(boxes):
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise(boxes1, boxes2, kind, fmt="xyxy", eps=1e-7):
    """torchvision.ops.box_iou, generalized_box_iou, distance_box_iou and complete_box_iou, with leading dimensions."""
    a, b = corners(boxes1, fmt)[..., :, None, :], corners(boxes2, fmt)[..., None, :, :]
    lt, rb = torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:])
    wh = (rb - lt).clamp(min=0)
    inter = wh[..., 0] * wh[..., 1]
    union = box_area(a) + box_area(b) - inter
    iou = inter / union
    if kind == "iou":
        return iou
    whi = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).clamp(min=0)
    if kind == "giou":
        areai = whi[..., 0] * whi[..., 1]
        return iou - (areai - union) / areai
    diagonal = whi[..., 0] ** 2 + whi[..., 1] ** 2 + eps
    x_p, y_p = (a[..., 0] + a[..., 2]) / 2, (a[..., 1] + a[..., 3]) / 2
    x_g, y_g = (b[..., 0] + b[..., 2]) / 2, (b[..., 1] + b[..., 3]) / 2
    diou = iou - ((x_p - x_g) ** 2 + (y_p - y_g) ** 2) / diagonal
    return diou if kind == "diou" else diou - _alpha_v(a, b, iou, eps)


def _alpha_v(a, b, iou, eps):
    w_p, h_p, w_g, h_g = a[..., 2] - a[..., 0], a[..., 3] - a[..., 1], b[..., 2] - b[..., 0], b[..., 3] - b[..., 1]
    v = (4 / math.pi**2) * torch.pow(torch.atan(w_p / h_p) - torch.atan(w_g / h_g), 2)
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return alpha * v


def loss(input, target, kind, fmt="xyxy", reduction="none", eps=1e-7):
    """torchvision.ops.generalized_box_iou_loss, distance_box_iou_loss and complete_box_iou_loss, whose eps the last one passes on."""
    a, b = corners(input, fmt), corners(target, fmt)
    (x1, y1, x2, y2), (x1g, y1g, x2g, y2g) = a.unbind(-1), b.unbind(-1)
    xk1, yk1, xk2, yk2 = torch.max(x1, x1g), torch.max(y1, y1g), torch.min(x2, x2g), torch.min(y2, y2g)
    inter = torch.zeros_like(x1)
    mask = (yk2 > yk1) & (xk2 > xk1)
    inter[mask] = (xk2[mask] - xk1[mask]) * (yk2[mask] - yk1[mask])
    union = (x2 - x1) * (y2 - y1) + (x2g - x1g) * (y2g - y1g) - inter
    iou = inter / (union + eps)
    xc1, yc1, xc2, yc2 = torch.min(x1, x1g), torch.min(y1, y1g), torch.max(x2, x2g), torch.max(y2, y2g)
    if kind == "iou":
        loss = 1 - iou
    elif kind == "giou":
        area_c = (xc2 - xc1) * (yc2 - yc1)
        loss = 1 - (iou - (area_c - union) / (area_c + eps))
    else:
        diagonal = (xc2 - xc1) ** 2 + (yc2 - yc1) ** 2 + eps
        distance = ((x2 + x1) / 2 - (x2g + x1g) / 2) ** 2 + ((y2 + y1) / 2 - (y2g + y1g) / 2) ** 2
        loss = 1 - iou + distance / diagonal
        if kind == "ciou":
            loss = loss + _alpha_v(a, b, iou, eps)
    if reduction == "mean":
        return loss.mean() if loss.numel() > 0 else 0.0 * loss.sum()
    return loss.sum() if reduction == "sum" else loss


def make_boxes(*shape, dtype=torch.float32, fmt="xyxy", grid=None):
    """Boxes of 2 to 50 in an image of 100; with a grid, all numbers are multiples of it, so that edges meet and boxes are equal."""
    xy, wh = 100 * torch.rand(*shape, 2, dtype=torch.float64), 2 + 48 * torch.rand(*shape, 2, dtype=torch.float64)
    if grid:
        xy, wh = (xy / grid).round() * grid, (wh / grid).ceil() * grid
    first, second = {"xyxy": (xy, xy + wh), "xywh": (xy, wh), "cxcywh": (xy + wh / 2, wh)}[fmt]
    return torch.cat([first, second], -1).to(dtype)


def grads_of(function, tensors, upstream):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors), tensors, upstream)


def lay_out(t, layout):
    """t with the same values in another layout; "expanded" repeats its first entry."""
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.shape[0] else t
    if layout == "permuted":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "slice":
        wide = torch.full((*t.shape[:-1], 11), math.nan if t.is_floating_point() else 1, dtype=t.dtype)
        return wide[..., 2:10:2].copy_(t)
    return t.contiguous()

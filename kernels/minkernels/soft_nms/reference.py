"""What Soft-NMS and Matrix NMS mean, in plain PyTorch: each operation rounds once, so that every road gives the same bits."""

import math

import torch

from minkernels.soft_nms._options import arithmetic, below, outputs

INF = float("inf")


def soft_nms(boxes, scores, class_ids, method, iou_threshold, sigma, min_score, max_output):
    boxes, s, class_ids, least = _prepare(boxes, scores, class_ids, min_score)
    indices, out, counts = outputs(boxes, s, max_output)
    indices.fill_(-1), out.zero_()
    for k in range(min(max_output, s.shape[1])):
        top, i = s.max(1, keepdim=True)  # the first of equal ones
        indices[:, k : k + 1], out[:, k : k + 1] = torch.where(top > -INF, i, -1), torch.where(top > -INF, top, 0.0)
        overlap = iou(boxes.gather(1, i[..., None].expand(-1, -1, 4)), boxes)[:, 0]
        if method == "linear":
            weight = torch.where(overlap > below(iou_threshold, s.dtype), 1 - overlap, 1.0)
        else:
            weight = exp_of_minus(overlap * overlap * (1 / sigma))
        s = torch.where(class_ids == class_ids.gather(1, i), s * weight, s).scatter(1, i, -INF)
        s = torch.where(s > least, s, -INF)
    return indices, out, counts.copy_((indices >= 0).sum(1))


def matrix_nms(boxes, scores, class_ids, method, sigma, min_score, max_output):
    boxes, s, class_ids, least = _prepare(boxes, scores, class_ids, min_score)
    indices, out, counts = outputs(boxes, s, max_output)
    indices.fill_(-1), out.zero_()
    if s.shape[1]:
        s, order = s.sort(dim=1, descending=True, stable=True)
        boxes, class_ids = boxes.gather(1, order[..., None].expand(-1, -1, 4)), class_ids.gather(1, order)
        above = (class_ids[:, :, None] == class_ids[:, None]) & (s > -INF)[:, :, None]
        overlap = torch.where(above, iou(boxes, boxes), 0.0).triu(1)  # [i, j]: i is above j
        c = overlap.amax(1)[:, :, None]
        if method == "linear":
            ratio = (1 - overlap) / (1 - c)
            weight = torch.where(c < 1, ratio, 1.0).amin(1).clamp(max=1)  # for i that is not above j the ratio is 1 or more
        else:
            weight = exp_of_minus((overlap * overlap - c * c).amax(1).clamp(min=0) * sigma)
        s = s * weight
        s = torch.full_like(s, -INF).scatter(1, order, torch.where(s > least, s, -INF))
        s, order = s.sort(dim=1, descending=True, stable=True)
        K = min(max_output, s.shape[1])
        found = s[:, :K] > -INF
        indices[:, :K], out[:, :K] = torch.where(found, order[:, :K], -1), torch.where(found, s[:, :K], 0.0)
    return indices, out, counts.copy_((indices >= 0).sum(1))


def _prepare(boxes, scores, class_ids, min_score):
    """In the dtype of the arithmetic; scores -inf where a box is out; the threshold."""
    dtype = arithmetic(boxes, scores)
    boxes, s, least = boxes.to(dtype), scores.to(dtype), below(min_score, dtype)
    s = torch.where((s > least) & ~boxes.isnan().any(-1), s, -INF)
    return boxes, s, torch.zeros_like(s, dtype=torch.int64) if class_ids is None else class_ids, least


def iou(a, b):
    """(B, N, 4), (B, M, 4) -> (B, N, M), at most 1; 0 where it is 0 / 0 or inf / inf."""
    a, b = a[:, :, None], b[:, None]
    sizes = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    areas = [(t[..., 2] - t[..., 0]) * (t[..., 3] - t[..., 1]) for t in (a, b)]
    both = sizes[..., 0] * sizes[..., 1]
    ratio = both / (areas[0] + areas[1] - both)
    return torch.where(ratio.isnan(), 0.0, ratio).clamp(max=1)


def exp_of_minus(u):
    """exp(-u) for u >= 0, by operations that round alike everywhere, which torch.exp() does not promise: 2**-n times a Taylor polynomial
    of r = n ln 2 - u, where n = round(u / ln 2). Within 2 roundings; 0 where it would be subnormal."""
    wide = u.dtype == torch.float64
    # ln 2 as a sum: n times the first part is exact
    high, low = (0.6931471803691238, 1.9082149292705877e-10) if wide else (0.693359375, -2.12194440e-4)
    degree, most, mantissa, bias, integer = (13, 708.0, 52, 1023, torch.int64) if wide else (7, 87.0, 23, 127, torch.int32)
    v = u.clamp(max=most)
    n = (v * math.log2(math.e) + 0.5).to(integer)  # rounds towards 0
    r = (n.to(u.dtype) * high - v) + n.to(u.dtype) * low
    p = torch.full_like(u, 1 / math.factorial(degree))
    for k in reversed(range(degree)):
        p = p * r + 1 / math.factorial(k)
    return torch.where(u > most, 0.0, p * ((bias - n) << mantissa).view(u.dtype))


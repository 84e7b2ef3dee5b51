"""Boxes for the tests and the bench of NMS, and the oracle: torchvision's greedy loop, written plainly, for each image and class."""

import math

import torch

from bench import plain_nms

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf


def clusters(N, classes=1):
    """What a detector gives: about 60 boxes an object, of one class, the worse placed the lower their score. xyxy in pixels."""
    side, objects = 640 if N <= 20_000 else 1600, max(1, N // 60)
    sides = 8 * (196 / 8) ** torch.rand(objects, 2)  # log-uniform
    centres, kinds, of = torch.rand(objects, 2) * side, torch.randint(classes, (objects,)), torch.randint(objects, (N,))
    scores = torch.rand(N)
    spread = 0.12 * sides[of] * (1.5 - scores[:, None])
    centre = centres[of] + spread * torch.randn(N, 2)
    half = 0.5 * sides[of] * (1 + 0.12 * (1.5 - scores[:, None]) * torch.randn(N, 2)).clamp(min=0.1)
    return torch.cat([centre - half, centre + half], 1), scores, kinds[of]


def uniform(N, classes=1):
    """As torchvision's own tests draw them."""
    corner = torch.rand(N, 2) * 100
    return torch.cat([corner, corner + torch.rand(N, 2) * 100], 1), torch.rand(N), torch.randint(classes, (N,))


def sparse(N, classes=1):
    """Small objects in a large picture: most boxes are kept."""
    corner = torch.rand(N, 2) * 20_000
    return torch.cat([corner, corner + 16 + 56 * torch.rand(N, 2)], 1), torch.rand(N), torch.randint(classes, (N,))


DATA = {"clusters": clusters, "uniform": uniform, "sparse": sparse}


def fuzz(B, N, dtype=torch.float32, seed=0):
    """(B, N) small cases that meet everything: integer coordinates with IoUs on the threshold, ties, NaN, inf, zero and negative sides,
    subnormal areas, one class or three. Returns boxes, scores, class_ids."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=g)

    kind = torch.randint(4, (B, 1, 1), generator=g)  # of an image: a small grid, halves, a plane, tiny numbers
    corner = torch.where(kind == 0, (draw(B, N, 2) * 4).floor(), draw(B, N, 2) * 4)
    corner = torch.where(kind == 1, (corner * 2).floor() / 2, corner) - 1
    sides = torch.where(kind <= 1, (draw(B, N, 2) * 5).floor(), draw(B, N, 2) * 4 - 0.2)
    boxes = torch.cat([corner, corner + sides], -1)
    scale = torch.where(kind == 3, 10.0 ** (-22 * draw(B, 1, 1)), torch.ones(1))  # areas down to subnormal ones
    boxes *= scale
    odd = draw(B, N, 4) < 0.01
    boxes = torch.where(odd, torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])[torch.randint(4, (B, N, 4), generator=g)], boxes)
    scores = torch.where(draw(B, 1) < 0.5, (draw(B, N) * 4).floor() - 1, torch.randn(B, N, generator=g))
    scores = torch.where(draw(B, N) < 0.1, scores * 0 * torch.randn(B, N, generator=g).sign(), scores)  # 0 and -0
    odd = draw(B, N) < 0.02
    scores = torch.where(odd, torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, (B, N), generator=g)], scores)
    class_ids = torch.randint(3, (B, N), generator=g) * torch.randint(2, (B, 1), generator=g)
    return boxes.to(dtype), scores.to(dtype), class_ids


THRESHOLDS = [0.5, 1 / 3, 0.2, 0.7, 0.0, 1.0, 0.25, 0.1]  # 0.2, 0.7 and 0.1 are not floats: an IoU may lie between both


def oracle(boxes, scores, class_ids, iou_threshold, score_threshold=None, max_output=None, drop=True):
    """Kept indices of one image; drop: nms_padded's rule for NaN and scores, else torchvision's."""
    acc = torch.promote_types(boxes.dtype, torch.float32)
    keep = ~(boxes.isnan().any(-1) | scores.isnan()) if drop else torch.ones_like(scores, dtype=torch.bool)
    if score_threshold is not None:
        keep &= scores.double() > score_threshold
    own = keep.nonzero()[:, 0]
    classes = torch.zeros_like(own) if class_ids is None else class_ids[own]
    kept = own[plain_nms.nms_per_class(boxes[own].to(acc), scores[own], classes, iou_threshold)]
    return kept[:max_output]


def check_suppressor(result, boxes, scores, class_ids, iou_threshold, score_threshold=None):
    """Of one image, against the definition, one box after the other."""
    indices, count, suppressor = result
    kept = indices[:count]
    out = boxes.isnan().any(-1) | scores.isnan()
    if score_threshold is not None:
        out |= ~(scores.double() > score_threshold)
    expected = torch.full_like(suppressor, -2)
    full, boxes = count == len(indices), boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    order = [i for i in scores.sort(descending=True, stable=True).indices.tolist() if not out[i]]
    places = {i: r for r, i in enumerate(order)}
    for i in order:
        if full and places[i] > places[int(kept[-1])]:
            expected[i] = -3
        elif (kept == i).any():
            expected[i] = -1
        else:
            for k in kept.tolist():
                left = plain_nms.nms(boxes[[k, i]], torch.tensor([2.0, 1.0]), iou_threshold)
                if len(left) == 1 and (class_ids is None or class_ids[k] == class_ids[i]):
                    expected[i] = k
                    break
    assert torch.equal(suppressor, expected)

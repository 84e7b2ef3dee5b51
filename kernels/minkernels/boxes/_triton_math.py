"""What the Triton kernels of the IoU family compute with: boxes as tuples x1, y1, x2, y2. All formulas are symmetric in a and b.

Products and sums must not be contracted, nor divisions approximated, where a decision may hang on the IoU: launch with
enable_fp_fusion=False.
"""

import triton
import triton.language as tl

PI = tl.constexpr(3.14159265358979324)


@triton.jit
def corners(Boxes, i, inside, strides, FORMAT: tl.constexpr):
    """Boxes i of (n, 4) as fp32 corners; zeros outside."""
    at, step = Boxes + i * strides[0], tl.cast(strides[1], tl.int64)
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y1 = tl.load(at + step, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + 2 * step, mask=inside, other=0.0).to(tl.float32)
    y2 = tl.load(at + 3 * step, mask=inside, other=0.0).to(tl.float32)
    if FORMAT == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    if FORMAT == "cxcywh":
        w, h = 0.5 * x2, 0.5 * y2
        x2, y2, x1, y1 = x1 + w, y1 + h, x1 - w, y1 - h
    return x1, y1, x2, y2


@triton.jit
def to_format(x1, y1, x2, y2, FORMAT: tl.constexpr):
    """The gradient by what the format holds, from that by the corners."""
    a, b, c, d = x1, y1, x2, y2
    if FORMAT != "xyxy":
        a, b = x1 + x2, y1 + y2
    if FORMAT == "cxcywh":
        c, d = 0.5 * (x2 - x1), 0.5 * (y2 - y1)
    return a, b, c, d


@triton.jit
def ratio(x, y):
    """x / y by IEEE division, and 0 / 0 = 0."""
    zero = (x == 0) & (y == 0)
    return tl.where(zero, 0.0, tl.div_rn(x, tl.where(zero, 1.0, y)))


@triton.jit
def inverse(x):
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def _area(a):
    return (a[2] - a[0]) * (a[3] - a[1])


@triton.jit
def _angle(a):
    """atan(w / h), with 0 / 0 = 0: of the smaller side over the larger, by a minimax polynomial (Remez, relative error 2.6e-9)."""
    x, y = a[2] - a[0], a[3] - a[1]
    p, q = tl.abs(x), tl.abs(y)
    t = ratio(tl.minimum(p, q), tl.maximum(p, q))
    u = t * t
    s = -1.793604012e-3 * u + 1.091452438e-2
    s = s * u - 3.117768948e-2
    s = s * u + 5.795743086e-2
    s = s * u - 8.403440406e-2
    s = s * u + 1.095218219e-1
    s = s * u - 1.426424095e-1
    s = s * u + 1.999854821e-1
    s = s * u - 3.333329909e-1
    s = s * u * t + t
    s = tl.where(p > q, 0.5 * PI - s, s)
    return tl.where((x < 0) != (y < 0), -s, s)


@triton.jit
def _meeting(a, b):
    """Width and height of the intersection, at most 0 where the boxes do not meet."""
    return tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0]), tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1])


@triton.jit
def _overlap(a, b):
    """Intersection and union. A NaN reaches the union through the areas, whatever minimum and maximum made of it."""
    w, h = _meeting(a, b)
    inter = tl.maximum(w, 0.0) * tl.maximum(h, 0.0)
    return inter, _area(a) + _area(b) - inter


@triton.jit
def _hull(a, b, ALIGNED: tl.constexpr):
    w, h = tl.maximum(a[2], b[2]) - tl.minimum(a[0], b[0]), tl.maximum(a[3], b[3]) - tl.minimum(a[1], b[1])
    if not ALIGNED:
        w, h = tl.maximum(w, 0.0), tl.maximum(h, 0.0)
    return w, h


@triton.jit
def _distance(a, b):
    return (a[0] + a[2]) * 0.5 - (b[0] + b[2]) * 0.5, (a[1] + a[3]) * 0.5 - (b[1] + b[3]) * 0.5


@triton.jit
def value(a, b, eps, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """A loss (ALIGNED) adds eps to every denominator, a pairwise function clamps the sides of the hull."""
    inter, union = _overlap(a, b)
    result = ratio(inter, union + eps if ALIGNED else union)
    if KIND == "giou":
        w, h = _hull(a, b, ALIGNED)
        both = w * h
        result -= ratio(both - union, both + eps if ALIGNED else both)
    if KIND == "diou" or KIND == "ciou":
        w, h = _hull(a, b, ALIGNED)
        ex, ey = _distance(a, b)
        iou = result
        result -= ratio(ex * ex + ey * ey, w * w + h * h + eps)
        if KIND == "ciou":
            angle = _angle(a) - _angle(b)
            v = 4.0 / (PI * PI) * angle * angle
            result -= ratio(v, 1.0 - iou + v + eps) * v
    return result


@triton.jit
def _share(x, y):
    """How much of the gradient of max(x, y) is x's."""
    return tl.where(x > y, 1.0, tl.where(x == y, 0.5, 0.0))


@triton.jit
def derivative(a, b, eps, g, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The derivatives of the value by the corners of a, times g; exactly 0 where g is 0."""
    w, h = _meeting(a, b)
    inter, union = _overlap(a, b)
    if ALIGNED:
        union += eps
    inv = inverse(union)
    iou = inter * inv
    by_inter, by_area = (1.0 + iou) * inv, -iou * inv
    hull_w, hull_h = _hull(a, b, ALIGNED)
    by_hull_w, by_hull_h, away_x, away_y = 0.0 * iou, 0.0 * iou, 0.0 * iou, 0.0 * iou
    if KIND == "giou":
        inv = inverse(hull_w * hull_h + eps if ALIGNED else hull_w * hull_h)
        by_inter, by_area = by_inter - inv, by_area + inv
        by_hull = -union * inv * inv
        by_hull_w, by_hull_h = by_hull * hull_h, by_hull * hull_w
    if KIND == "diou" or KIND == "ciou":
        ex, ey = _distance(a, b)
        inv = inverse(hull_w * hull_w + hull_h * hull_h + eps)
        spread = 2.0 * (ex * ex + ey * ey) * inv * inv
        by_hull_w, by_hull_h = spread * hull_w, spread * hull_h
        away_x, away_y = ex * inv, ey * inv
    # A minimum or maximum hands half to each where they are equal; clamp(w, 0) hands on what it is given from 0 on, a loss only above.
    closed_w, closed_h = w < 0, h < 0
    if ALIGNED:
        closed_w, closed_h = w <= 0, h <= 0
    by_w = tl.where(closed_w, 0.0, by_inter * tl.maximum(h, 0.0))
    by_h = tl.where(closed_h, 0.0, by_inter * tl.maximum(w, 0.0))
    width, height = a[2] - a[0], a[3] - a[1]
    of_w, of_h = by_area * height, by_area * width
    if KIND == "ciou":
        angle = _angle(a) - _angle(b)
        v = 4.0 / (PI * PI) * angle * angle
        turn = -8.0 / (PI * PI) * ratio(v, 1.0 - iou + v + eps) * angle * inverse(width * width + height * height)
        of_w, of_h = of_w + turn * height, of_h - turn * width
    left, top, right, bottom = _share(a[0], b[0]), _share(a[1], b[1]), _share(b[2], a[2]), _share(b[3], a[3])
    x1 = -left * by_w - (1.0 - left) * by_hull_w - of_w - away_x
    y1 = -top * by_h - (1.0 - top) * by_hull_h - of_h - away_y
    x2 = right * by_w + (1.0 - right) * by_hull_w + of_w - away_x
    y2 = bottom * by_h + (1.0 - bottom) * by_hull_h + of_h - away_y
    none = g == 0
    return tl.where(none, 0.0, g * x1), tl.where(none, 0.0, g * y1), tl.where(none, 0.0, g * x2), tl.where(none, 0.0, g * y2)

// The IoU family on one level: a box is a vector of boxes, one in each lane. KIND is a Kind; ALIGNED tells the losses from the pairwise
// functions, as torchvision's formulas differ: a loss adds eps to every denominator, a pairwise function clamps the sides of the hull.
// Sources: arXiv:1902.09630 (GIoU), arXiv:1911.08287 (DIoU, CIoU).

namespace {  // the templates too: another family may have a Boxes or an Overlap of its own

#include "iou.h"

template <class A>
struct Box {
  Corners<A> at;
  vec<A> area, angle;  // angle: atan(w / h), of CIoU alone
};

template <class V>
INLINE V ratio(V x, V y) {  // x / y, and 0 / 0 = 0
  return x == V{} ? (y == V{} ? V{} : x / y) : x / y;
}

// atan(x / y), with 0 / 0 = 0: of the smaller side over the larger, and the rest by symmetry. Absolute error under 2e-7.
INLINE f32 angle_of(f32 x, f32 y) {
  f32 p = x < 0 ? -x : x, q = y < 0 ? -y : y;
  f32 t = ratio(min(q, p), max(q, p)), u = t * t;
  f32 s = splat(-1.793604012e-3f);  // minimax (Remez) of atan(t) / t with the first coefficient 1: relative error 2.6e-9
  s = s * u + splat(1.091452438e-2f);
  s = s * u + splat(-3.117768948e-2f);
  s = s * u + splat(5.795743086e-2f);
  s = s * u + splat(-8.403440406e-2f);
  s = s * u + splat(1.095218219e-1f);
  s = s * u + splat(-1.426424095e-1f);
  s = s * u + splat(1.999854821e-1f);
  s = s * u + splat(-3.333329909e-1f);
  s = s * u * t + t;
  s = p > q ? splat(1.57079633f) - s : s;
  return (f32)((i32)s ^ (((i32)x ^ (i32)y) & (int32_t)0x80000000));
}
INLINE f64 angle_of(f64 x, f64 y) {
  f64 slope = ratio(x, y), s;
  for (int i = 0; i < vector<double>::lanes; i++) s[i] = __builtin_atan(slope[i]);
  return s;
}

template <int KIND, class A>
INLINE Box<A> box_of(const Corners<A>& at) {
  Box<A> box;
  box.at = at, box.area = area(at), box.angle = vec<A>{};
  if (Kind(KIND) == Kind::ciou) box.angle = angle_of(at.x2 - at.x1, at.y2 - at.y1);
  return box;
}

constexpr double PI = 3.14159265358979324;

// The smallest box around both.
template <bool ALIGNED, class A>
INLINE void hull(const Corners<A>& a, const Corners<A>& b, vec<A>& w, vec<A>& h) {
  w = max(a.x2, b.x2) - min(a.x1, b.x1), h = max(a.y2, b.y2) - min(a.y1, b.y1);
  if (!ALIGNED) w = max(w, vec<A>{}), h = max(h, vec<A>{});
}

template <int KIND, bool ALIGNED, class A>
INLINE vec<A> value(const Box<A>& a, const Box<A>& b, vec<A> eps) {
  Overlap<A> o = overlap(meeting(a.at, b.at), a.area, b.area), more = o;
  if (ALIGNED) more.total += eps;
  vec<A> result = iou(more), w, h;
  if (Kind(KIND) == Kind::iou) return result;
  hull<ALIGNED>(a.at, b.at, w, h);
  if (Kind(KIND) == Kind::giou) {
    vec<A> both = rounded(w * h);
    return result - ratio(both - o.total, ALIGNED ? both + eps : both);
  }
  const vec<A> half = splat(A(0.5));
  vec<A> ex = (a.at.x1 + a.at.x2) * half - (b.at.x1 + b.at.x2) * half, ey = (a.at.y1 + a.at.y2) * half - (b.at.y1 + b.at.y2) * half;
  vec<A> diou = result - ratio(ex * ex + ey * ey, w * w + h * h + eps);
  if (Kind(KIND) == Kind::diou) return diou;
  vec<A> angle = a.angle - b.angle, v = angle * angle * splat(A(4 / (PI * PI)));
  return diou - v * ratio(v, splat(A(1)) - result + v + eps);
}

template <class V>
INLINE V inverse(V x) {
  return x == V{} ? V{} : 1 / x;
}

// How much of the gradient of max(x, y) is x's.
template <class V>
INLINE V share(V x, V y) {
  return x > y ? V{} + 1 : x == y ? V{} + decltype(x[0] + x[0])(0.5) : V{};
}

// The derivatives of the value by the corners of a and of b, times g; exactly 0 where g is 0.
template <int KIND, bool ALIGNED, class A>
INLINE void derivative(const Box<A>& a, const Box<A>& b, vec<A> eps, vec<A> g, Corners<A>& da, Corners<A>& db) {
  using V = vec<A>;
  const V zero{}, one = splat(A(1));
  Meeting<A> meet = meeting(a.at, b.at);
  Overlap<A> o = overlap(meet, a.area, b.area);
  V inv = inverse(ALIGNED ? o.total + eps : o.total), iou = o.inter * inv;
  V by_inter = (one + iou) * inv, by_area = -iou * inv, hull_w{}, hull_h{}, by_hull_w{}, by_hull_h{}, away_x{}, away_y{}, turn{};
  if (Kind(KIND) != Kind::iou) hull<ALIGNED>(a.at, b.at, hull_w, hull_h);
  if (Kind(KIND) == Kind::giou) {
    inv = inverse(ALIGNED ? hull_w * hull_h + eps : hull_w * hull_h);
    by_inter -= inv, by_area += inv;
    V by_hull = -(ALIGNED ? o.total + eps : o.total) * inv * inv;
    by_hull_w = by_hull * hull_h, by_hull_h = by_hull * hull_w;
  }
  if (Kind(KIND) >= Kind::diou) {
    const V half = splat(A(0.5));
    V ex = (a.at.x1 + a.at.x2) * half - (b.at.x1 + b.at.x2) * half, ey = (a.at.y1 + a.at.y2) * half - (b.at.y1 + b.at.y2) * half;
    inv = inverse(hull_w * hull_w + hull_h * hull_h + eps);
    V spread = (ex * ex + ey * ey) * inv * inv * splat(A(2));
    by_hull_w = spread * hull_w, by_hull_h = spread * hull_h;
    away_x = g * (ex * inv), away_y = g * (ey * inv);
  }
  if (Kind(KIND) == Kind::ciou) {
    V angle = a.angle - b.angle, v = angle * angle * splat(A(4 / (PI * PI)));
    turn = g * (splat(A(-8 / (PI * PI))) * ratio(v, one - iou + v + eps) * angle);
  }
  // A minimum or maximum hands half to each where they are equal; clamp(w, 0) hands on what it is given from 0 on, a loss only above.
  V by_w = g * (by_inter * max(meet.h, zero)), by_h = g * (by_inter * max(meet.w, zero));
  by_w = (ALIGNED ? meet.w <= zero : meet.w < zero) ? zero : by_w, by_h = (ALIGNED ? meet.h <= zero : meet.h < zero) ? zero : by_h;
  by_area = g * by_area, by_hull_w = g * by_hull_w, by_hull_h = g * by_hull_h;
  V left = share(a.at.x1, b.at.x1), top = share(a.at.y1, b.at.y1), right = share(b.at.x2, a.at.x2), bottom = share(b.at.y2, a.at.y2);
  const auto one_side = [&](const Box<A>& box, V left, V top, V right, V bottom, V away_x, V away_y, V turn, Corners<A>& d) {
    V w = box.at.x2 - box.at.x1, h = box.at.y2 - box.at.y1, of_w = by_area * h, of_h = by_area * w;
    if (Kind(KIND) == Kind::ciou) {
      V per = turn * inverse(w * w + h * h);
      of_w += per * h, of_h -= per * w;
    }
    d.x1 = -left * by_w - of_w, d.y1 = -top * by_h - of_h, d.x2 = right * by_w + of_w, d.y2 = bottom * by_h + of_h;
    if (Kind(KIND) != Kind::iou) {
      d.x1 -= (one - left) * by_hull_w + away_x, d.y1 -= (one - top) * by_hull_h + away_y;
      d.x2 += (one - right) * by_hull_w - away_x, d.y2 += (one - bottom) * by_hull_h - away_y;
    }
    d.x1 = g == zero ? zero : d.x1, d.y1 = g == zero ? zero : d.y1, d.x2 = g == zero ? zero : d.x2, d.y2 = g == zero ? zero : d.y2;
  };
  one_side(a, left, top, right, bottom, away_x, away_y, turn, da);
  one_side(b, one - left, one - top, one - right, one - bottom, -away_x, -away_y, -turn, db);
}

// Boxes in memory as corners: x1 of n boxes, then their y1, x2 and y2, each `apart` elements from the last.
template <class T, class A>
static void read_corners(const Boxes& of, int64_t set, int64_t first, int64_t n, Format format, A* to, int64_t apart) {
  const T* from = (const T*)of.data + set * of.set + first * of.box;
  A *x1 = to, *y1 = to + apart, *x2 = to + 2 * apart, *y2 = to + 3 * apart;
  if (of.coordinate == 1 && of.box == 4)
    for (int64_t i = 0; i < n; i++)
      x1[i] = widen(from[4 * i]), y1[i] = widen(from[4 * i + 1]), x2[i] = widen(from[4 * i + 2]), y2[i] = widen(from[4 * i + 3]);
  else
    for (int64_t k = 0; k < 4; k++)
      for (int64_t i = 0; i < n; i++) to[k * apart + i] = widen(from[i * of.box + k * of.coordinate]);
  if (format == Format::xywh)
    for (int64_t i = 0; i < n; i++) x2[i] = x1[i] + x2[i], y2[i] = y1[i] + y2[i];
  if (format == Format::cxcywh)
    for (int64_t i = 0; i < n; i++) {
      A x = x1[i], y = y1[i], w = x2[i] * A(0.5), h = y2[i] * A(0.5);
      x1[i] = x - w, y1[i] = y - h, x2[i] = x + w, y2[i] = y + h;
    }
}
// The gradient by what the format holds, from that by the corners.
template <class V>
INLINE void to_format(Format format, V& x1, V& y1, V& x2, V& y2) {
  if (format == Format::xyxy) return;
  V x = x1 + x2, y = y1 + y2;
  if (format == Format::cxcywh) x2 = (x2 - x1) / 2, y2 = (y2 - y1) / 2;
  x1 = x, y1 = y;
}

template <class A>
INLINE Corners<A> load_corners(const A* from, int64_t apart) {
  return {load(from), load(from + apart), load(from + 2 * apart), load(from + 3 * apart)};
}
template <class A>
INLINE Corners<A> splat_corners(const A* from, int64_t apart) {
  return {splat(from[0]), splat(from[apart]), splat(from[2 * apart]), splat(from[3 * apart])};
}

#include "boxes_pairs.h"
#include "boxes_match.h"
#include "boxes_loss.h"

}  // namespace

template <class T, int KIND>
static BoxKernels box_kernels() {
  if constexpr (sizeof(T) == 2)  // pairs and matches of 16-bit boxes are float's
    return {nullptr, nullptr, nullptr, nullptr, losses<KIND, T, float>, loss_grads<KIND, T, float>};
  else
    return {pairs<KIND, T>, pairs_grad<KIND, T>, match_part<T>, match_finish<T>, losses<KIND, T, T>, loss_grads<KIND, T, T>};
}

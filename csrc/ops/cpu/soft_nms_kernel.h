// Soft-NMS and Matrix NMS on one level. Every operation rounds once, in the order of reference.py: compiled without contraction.

template <class A>
struct Overlap {
  vec<A> w, h;
  uint32_t bits;  // of the lanes whose boxes share an area with the box; in the others the IoU is 0
};
template <class A>
INLINE Overlap<A> overlap(const SoftBoxes<A>& b, int64_t i, const SoftBox<A>& box) {
  Overlap<A> o;
  o.w = min(load(b.x2 + i), splat(box.x2)) - max(load(b.x1 + i), splat(box.x1));
  o.h = min(load(b.y2 + i), splat(box.y2)) - max(load(b.y1 + i), splat(box.y1));
  o.bits = bits_above(min(o.w, o.h), vec<A>{});
  return o;
}
// Of the lanes that overlap; of the others any number.
template <class A>
INLINE vec<A> iou(const Overlap<A>& o, const SoftBoxes<A>& b, int64_t i, const SoftBox<A>& box) {
  vec<A> both = o.w * o.h, ratio = both / (load(b.area + i) + box.area - both);
  ratio = ratio == ratio ? ratio : vec<A>{};
  return min(ratio, splat(A(1)));
}

// exp(-u): exp_of_minus() of reference.py.
template <class A>
INLINE vec<A> exp_of_minus(vec<A> u) {
  constexpr bool wide = sizeof(A) == 8;
  constexpr int degree = wide ? 13 : 7, mantissa = wide ? 52 : 23, bias = wide ? 1023 : 127;
  constexpr double high = wide ? 0.6931471803691238 : 0.693359375, low = wide ? 1.9082149292705877e-10 : -2.12194440e-4;
  constexpr double most = wide ? 708 : 87;
  constexpr double one_over_factorial[] = {1.,           1. / 1,        1. / 2,         1. / 6,          1. / 24,
                                           1. / 120,     1. / 720,      1. / 5040,      1. / 40320,      1. / 362880,
                                           1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
  vec<A> v = min(u, splat(A(most)));
  vec<lane_t<A>> n = __builtin_convertvector(v * A(LOG2E) + A(0.5), vec<lane_t<A>>);
  vec<A> k = __builtin_convertvector(n, vec<A>), r = (k * A(high) - v) + k * A(low), p = splat(A(one_over_factorial[degree]));
#pragma GCC unroll 13
  for (int i = degree - 1; i >= 0; i--) p = p * r + A(one_over_factorial[i]);
  return u > A(most) ? vec<A>{} : p * (vec<A>)((bias - n) << mantissa);
}

template <class A>
static A largest(const A* numbers, int64_t n) {
  constexpr int L = vector<A>::lanes;
  vec<A> m = splat(A(-__builtin_inf()));
  int64_t i = 0;
  for (; i + L <= n; i += L) m = max(load(numbers + i), m);
  A top = fold_max<A>(m);
  for (; i < n; i++) top = numbers[i] > top ? numbers[i] : top;
  return top;
}

template <class A>
static int64_t find(const A* numbers, int64_t n, int64_t i, A x) {
  constexpr int L = vector<A>::lanes;
  for (; i < n; i += L) {
    uint32_t bits = ~bits_above(splat(x), load(numbers + i)) & ((1u << L) - 1);
    if (bits) return min(n, i + __builtin_ctz(bits));
  }
  return n;
}

template <class A>
static A lower(const SoftBoxes<A>& boxes, A* scores, int64_t n, const SoftBox<A>* kept, int64_t n_kept, A least, const Decay<A>& d) {
  constexpr int L = vector<A>::lanes;
  const vec<A> gone = splat(A(-__builtin_inf()));
  vec<A> most = gone;
  for (int64_t i = 0; i < n; i += L) {
    vec<A> s = load(scores + i);
    for (int64_t k = 0; k < n_kept; k++) {
      Overlap<A> o = overlap(boxes, i, kept[k]);
      if (!o.bits) continue;
      vec<A> x = iou(o, boxes, i, kept[k]);
      auto lowers = min(o.w, o.h) > 0;
      vec<A> w;
      if (d.gaussian) {
        w = exp_of_minus<A>(x * x * d.factor);
      } else {
        lowers &= x > d.threshold;
        w = 1 - x;
      }
      s = lowers ? s * w : s;
    }
    s = s > least ? s : gone;
    store(scores + i, s);
    most = max(s, most);
  }
  return fold_max<A>(most);
}

// Row by row, and c of every box above is known: one pass over the pairs. Lanes from j on are no boxes above: c of them is such that
// they lower nothing.
template <class A>
static void matrix(const SoftBoxes<A>& b, int64_t n, A* scores, A* c, const Decay<A>& d) {
  constexpr int L = vector<A>::lanes;
  for (int64_t j = 0; j < n; j++) {
    SoftBox<A> box = b.at(j);
    vec<A> most = {}, m = d.gaussian ? vec<A>{} : splat(A(1));
    for (int64_t i = 0; i < j; i += L) {
      Overlap<A> o = overlap(b, i, box);
      if (!o.bits) continue;
      vec<A> x = iou(o, b, i, box), above = load(c + i);
      x = ((min(o.w, o.h) > 0) & (lane_numbers<A>() < lane_t<A>(min(j - i, L)))) ? x : vec<A>{};
      most = max(x, most);
      if (d.gaussian) {
        m = max(x * x - above, m);
      } else {
        vec<A> ratio = (1 - x) / above;
        m = ((above > 0) & (ratio < m)) ? ratio : m;
      }
    }
    A largest = fold_max<A>(most);
    c[j] = d.gaussian ? largest * largest : 1 - largest;
    scores[j] *= d.gaussian ? exp_of_minus<A>(splat(fold_max<A>(m) * d.factor))[0] : -fold_max<A>(-m);
  }
}

template <class A>
static SoftNMSKernels<A> soft_nms_kernels() {
  return {lower<A>, largest<A>, find<A>, matrix<A>};
}

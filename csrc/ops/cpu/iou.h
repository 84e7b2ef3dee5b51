// The IoU of boxes, a vector of them at a time: included at every level after vec.h, inside a namespace of the including file's own.
// Bit for bit torchvision's formula in the precision of A: IEEE operations in its order, of which none is contracted, because a decision
// (IoU > threshold) must come out alike at every level, on every backend. Only 0 / 0 is 0 here, and no NaN.

template <class A>
struct Corners {
  vec<A> x1, y1, x2, y2;
};

// x as it was rounded: the compiler may fuse this product into no sum, whatever -ffp-contract says where it is inlined.
template <class V>
INLINE V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// The second operand where one is a NaN, as the instructions do. The IoU is NaN then all the same: such a box has a NaN for its area.
#if LEVEL_BYTES == 64
INLINE f32 least(f32 a, f32 b) { return (f32)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE f64 least(f64 a, f64 b) { return (f64)_mm512_min_pd((__m512d)a, (__m512d)b); }
INLINE f32 greatest(f32 a, f32 b) { return (f32)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f64 greatest(f64 a, f64 b) { return (f64)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE bool any_above_0(f32 x) { return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ) != 0; }
INLINE bool any_above_0(f64 x) { return _mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_GT_OQ) != 0; }
#elif LEVEL_BYTES == 32
INLINE f32 least(f32 a, f32 b) { return (f32)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE f64 least(f64 a, f64 b) { return (f64)_mm256_min_pd((__m256d)a, (__m256d)b); }
INLINE f32 greatest(f32 a, f32 b) { return (f32)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE f64 greatest(f64 a, f64 b) { return (f64)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE bool any_above_0(f32 x) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_GT_OQ)) != 0; }
INLINE bool any_above_0(f64 x) { return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)x, _mm256_setzero_pd(), _CMP_GT_OQ)) != 0; }
#else
template <class V>
INLINE V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
INLINE V greatest(V a, V b) {
  return a > b ? a : b;
}
template <class V>
INLINE bool any_above_0(V x) {
  auto above = x > V{};
  auto found = above[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(x[0]); i++) found |= above[i];
  return found;
}
#endif

template <class A>
INLINE vec<A> area(const Corners<A>& a) {
  return rounded((a.x2 - a.x1) * (a.y2 - a.y1));
}

template <class A>
struct Meeting {
  vec<A> w, h;  // at most 0: the boxes do not meet
};
template <class A>
INLINE Meeting<A> meeting(const Corners<A>& a, const Corners<A>& b) {
  Meeting<A> m;
  m.w = least(a.x2, b.x2) - greatest(a.x1, b.x1), m.h = least(a.y2, b.y2) - greatest(a.y1, b.y1);
  return m;
}
template <class A>
struct Overlap {
  vec<A> inter, total;  // intersection and union
};
template <class A>
INLINE Overlap<A> overlap(const Meeting<A>& m, vec<A> area_a, vec<A> area_b) {
  Overlap<A> o;
  o.inter = rounded(greatest(m.w, vec<A>{}) * greatest(m.h, vec<A>{}));
  o.total = area_a + area_b - o.inter;
  return o;
}
template <class A>
INLINE vec<A> iou(const Overlap<A>& o) {  // boxes that meet have a union above 0
  return o.total == vec<A>{} ? vec<A>{} : o.inter / o.total;
}

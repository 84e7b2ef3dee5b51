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
  m.w = min(a.x2, b.x2) - max(a.x1, b.x1), m.h = min(a.y2, b.y2) - max(a.y1, b.y1);
  return m;
}
template <class A>
struct Overlap {
  vec<A> inter, total;  // intersection and union
};
template <class A>
INLINE Overlap<A> overlap(const Meeting<A>& m, vec<A> area_a, vec<A> area_b) {
  Overlap<A> o;
  o.inter = rounded(max(m.w, vec<A>{}) * max(m.h, vec<A>{}));
  o.total = area_a + area_b - o.inter;
  return o;
}
template <class A>
INLINE vec<A> iou(const Overlap<A>& o) {  // boxes that meet have a union above 0
  return o.total == vec<A>{} ? vec<A>{} : o.inter / o.total;
}

// The filter of yolo_detect on one level: the raw output is read once, along memory, and only what passes is looked at again.

template <class A>
struct Filter {
  const Yolo& a;
  A *best, *row;     // (n,), (C,), and pads
  int64_t* classes;  // (C,)
  Found* out;
  int64_t found = 0;

  void add(A score, int64_t place, int64_t c) { out[found++] = {double(score), place * a.C + c}; }
};

// The raw scores of one place lie in x.row.
template <class A>
static void find_in_row(Filter<A>& x, int64_t place) {
  constexpr int L = vector<A>::lanes;
  const A least = A(x.a.least), inf = __builtin_inf();
  store(x.row + x.a.C, splat(-inf));
  vec<A> m = splat(-inf);
  for (int64_t c = 0; c < x.a.C; c += L) m = max(load(x.row + c), m);  // in this order a NaN goes
  A top = fold_max<A>(m);
  if (!(top > least)) return;
  for (int64_t c = 0; c < x.a.C; c++) {
    if (x.a.multi_label ? !(x.row[c] > least) : x.row[c] != top) continue;
    x.add(x.row[c], place, c);
    if (!x.a.multi_label) return;
  }
}

template <class T>
static void find_rows(Filter<acc_t<T>>& x, int64_t image, int64_t first, int64_t n) {
  using A = acc_t<T>;
  const Yolo& a = x.a;
  const T* pred = (const T*)a.pred + image * a.image;
  for (int64_t place = first; place < first + n; place++) {
    if (a.head == Head::v8) {
      widen_row(x.row, pred + 4 * a.channel + place * a.anchor, a.channel, a.C);
    } else {
      int64_t cell = place / a.boxes_per_cell, box = place % a.boxes_per_cell, cells = a.S * a.S;
      const T *probs = pred + cell * a.C, *confidence = pred + cells * a.C + place;
      if (a.head == Head::v1) {
        const T* start = pred + cell * (5 * a.boxes_per_cell + a.C);
        probs = start + 5 * a.boxes_per_cell, confidence = start + 5 * box + 4;
      }
      widen_row(x.row, probs, 1, a.C);
      A factor = widen(*confidence);
      for (int64_t c = 0; c < a.C; c++) x.row[c] = factor * x.row[c];
    }
    find_in_row(x, place);
  }
}

INLINE uint32_t above_bits(f32 x, f32 y) {
#if LEVEL_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ);
#elif LEVEL_BYTES == 32
  return uint32_t(_mm256_movemask_ps((__m256)(x > y)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < vector<float>::lanes; i++) bits |= uint32_t(x[i] > y[i]) << i;
  return bits;
#endif
}
INLINE uint32_t above_bits(f64 x, f64 y) {
  uint32_t bits = 0;
  for (int i = 0; i < vector<double>::lanes; i++) bits |= uint32_t(x[i] > y[i]) << i;
  return bits;
}

template <class A, class T>
INLINE vec<A> widen_lanes(const T* p, int64_t n) {
  A x[vector<A>::lanes];
  if (n >= vector<A>::lanes) {
    for (int i = 0; i < vector<A>::lanes; i++) x[i] = widen(p[i]);
  } else {
    for (int i = 0; i < vector<A>::lanes; i++) x[i] = i < n ? widen(p[i]) : -__builtin_inf();
  }
  return load(x);
}

// Anchors side by side in memory: the best score of each first, four classes at a time.
template <class T>
static void find_columns(Filter<acc_t<T>>& x, int64_t image, int64_t first, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  const Yolo& a = x.a;
  const T* scores = (const T*)a.pred + image * a.image + 4 * a.channel + first;
  const vec<A> least = splat(A(a.least));
  for (int64_t i = 0; i < n + L; i++) x.best[i] = -__builtin_inf();
  int64_t c = 0;
  for (; c + 4 <= a.C; c += 4) {
    const T *p = scores + c * a.channel, *q = p + a.channel, *r = q + a.channel, *s = r + a.channel;
    for (int64_t i = 0; i < n; i++) {
      A b = x.best[i], v = widen(p[i]), w = widen(q[i]);
      b = v > b ? v : b, b = w > b ? w : b, v = widen(r[i]), w = widen(s[i]);
      b = v > b ? v : b, x.best[i] = w > b ? w : b;
    }
  }
  for (; c < a.C; c++) {
    const T* p = scores + c * a.channel;
    for (int64_t i = 0; i < n; i++) {
      A b = x.best[i], v = widen(p[i]);
      x.best[i] = v > b ? v : b;
    }
  }
  for (int64_t i = 0; i < n; i += L) {
    vec<A> best = load(x.best + i);
    uint32_t left = above_bits(best, least);
    if (!left) continue;
    int64_t lanes = min(n - i, L);
    if (a.multi_label) {
      int64_t some = 0;  // classes that pass anywhere here
      for (c = 0; c < a.C; c++)
        if (above_bits(widen_lanes<A>(scores + c * a.channel + i, lanes), least)) x.classes[some++] = c;
      for (; left; left &= left - 1) {
        int64_t lane = __builtin_ctz(left);
        for (int64_t k = 0; k < some; k++) {
          A v = widen(scores[x.classes[k] * a.channel + i + lane]);
          if (v > A(a.least)) x.add(v, first + i + lane, x.classes[k]);
        }
      }
    } else {
      int64_t of[L];
      uint32_t passes = left;
      for (c = 0; left; c++) {
        vec<A> v = widen_lanes<A>(scores + c * a.channel + i, lanes);
        uint32_t here = left & ~above_bits(best, v);
        if (!here) continue;
        for (; here; here &= here - 1) {
          int lane = __builtin_ctz(here);
          if (v[lane] == best[lane]) of[lane] = c, left &= ~(1u << lane);  // not a NaN
        }
      }
      for (; passes; passes &= passes - 1) {
        int lane = __builtin_ctz(passes);
        x.add(x.best[i + lane], first + i + lane, of[lane]);
      }
    }
  }
}

template <class T>
static int64_t find(const Yolo& a, int64_t image, int64_t first, int64_t n, char* scratch, Found* out) {
  using A = acc_t<T>;
  Filter<A> x{a, (A*)scratch, (A*)scratch + n + YOLO_PAD, nullptr, out};
  x.classes = (int64_t*)(x.row + a.C + YOLO_PAD + (a.C + n) % 2);
  if (a.head == Head::v8 && a.anchor == 1)
    find_columns<T>(x, image, first, n);
  else
    find_rows<T>(x, image, first, n);
  return x.found;
}

static YoloKernels yolo_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return {find<half>};
    case Dtype::bf16: return {find<bfloat16>};
    case Dtype::f32: return {find<float>};
    case Dtype::f64: return {find<double>};
  }
  return {};
}

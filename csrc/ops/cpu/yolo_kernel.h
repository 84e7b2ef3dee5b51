// The filter of yolo_detect on one level: the raw output is read once, along memory, and only what passes is looked at again.

template <class A>
struct Filter {
  const Yolo& a;
  A *best, *row;   // the same memory, used in one of three ways: (n,) or (C,) and pads
  uint16_t* bits;  // (n / lanes, C)
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

template <class T>
INLINE vec<acc_t<T>> load_some(const T* p, int64_t n) {  // n of them, and -inf
  acc_t<T> x[vector<acc_t<T>>::lanes];
  for (int i = 0; i < vector<acc_t<T>>::lanes; i++) x[i] = i < n ? widen(p[i]) : -__builtin_inf();
  return load(x);
}

// Anchors side by side in memory. The best score of each first, four classes at a time; then the class of those that pass.
template <class T>
static void find_best(Filter<acc_t<T>>& x, const T* scores, int64_t first, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  const int64_t C = x.a.C, step = x.a.channel, whole = n / L * L;
  const vec<A> least = splat(A(x.a.least)), none = splat(A(-__builtin_inf()));
  A* best = x.best;
  for (int64_t i = 0; i < n; i += L) store(best + i, none);
  int64_t c = 0;
  for (; c + 4 <= C; c += 4) {
    const T *p = scores + c * step, *q = p + step, *r = q + step, *s = r + step;
    for (int64_t i = 0; i < whole; i += L)
      store(best + i, max(load_wide(s + i), max(load_wide(r + i), max(load_wide(q + i), max(load_wide(p + i), load(best + i))))));
  }
  for (; c < C; c++)
    for (int64_t i = 0; i < whole; i += L) store(best + i, max(load_wide(scores + c * step + i), load(best + i)));
  for (c = 0; c < C && whole < n; c++) store(best + whole, max(load_some(scores + c * step + whole, n - whole), load(best + whole)));

  for (int64_t i = 0; i < n; i += L) {
    vec<A> top = load(best + i);
    uint32_t passes = bits_above(top, least), left = passes;
    int64_t of[L];
    for (c = 0; left; c++) {
      const T* p = scores + c * step + i;
      vec<A> v = i < whole ? load_wide(p) : load_some(p, n - i);
      for (uint32_t here = left & ~bits_above(top, v); here; here &= here - 1) {
        int lane = __builtin_ctz(here);
        if (v[lane] == top[lane]) of[lane] = c, left &= ~(1u << lane);  // not a NaN
      }
    }
    for (; passes; passes &= passes - 1) {
      int lane = __builtin_ctz(passes);
      x.add(best[i + lane], first + i + lane, of[lane]);
    }
  }
}

// Every class that passes: a bit for each anchor and class first, then in the order of anchors.
template <class T>
static void find_all(Filter<acc_t<T>>& x, const T* scores, int64_t first, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  const int64_t C = x.a.C, step = x.a.channel, whole = n / L * L;
  const vec<A> least = splat(A(x.a.least));
  for (int64_t c = 0; c < C; c++) {
    const T* p = scores + c * step;
    uint16_t* bits = x.bits + c;
    for (int64_t i = 0; i < whole; i += L, bits += C) *bits = uint16_t(bits_above(load_wide(p + i), least));
    if (whole < n) *bits = uint16_t(bits_above(load_some(p + whole, n - whole), least));
  }
  for (int64_t i = 0; i < n; i += L) {
    const uint16_t* bits = x.bits + i / L * C;
    int64_t at[L] = {}, sum = x.found;
    for (int64_t c = 0; c < C; c++)
      for (uint32_t b = bits[c]; b; b &= b - 1) at[__builtin_ctz(b)]++;
    for (int lane = 0; lane < L; lane++) {
      int64_t own = at[lane];
      at[lane] = sum, sum += own;
    }
    if (sum == x.found) continue;
    for (int64_t c = 0; c < C; c++)
      for (uint32_t b = bits[c]; b; b &= b - 1) {
        int lane = __builtin_ctz(b);
        x.out[at[lane]++] = {double(widen(scores[c * step + i + lane])), (first + i + lane) * C + c};
      }
    x.found = sum;
  }
}

template <class T>
static int64_t find(const Yolo& a, int64_t image, int64_t first, int64_t n, char* scratch, Found* out) {
  using A = acc_t<T>;
  Filter<A> x{a, (A*)scratch, (A*)scratch, (uint16_t*)scratch, out};
  const T* scores = (const T*)a.pred + image * a.image + 4 * a.channel + first;
  if (a.head != Head::v8 || a.anchor != 1)
    find_rows<T>(x, image, first, n);
  else if (a.multi_label)
    find_all(x, scores, first, n);
  else
    find_best(x, scores, first, n);
  return x.found;
}

template <class T>
constexpr YoloKernels yolo_kernels{find<T>};

// NMS on one level: boxes sorted by class and score, then each held against the list of those kept before it. Compiled without contraction:
// the IoU that decides has the same bits everywhere.

// Sorting

// By bits 32 to 32 + bits - 1, stable; from and to are of n. Returns where the result is. A digit that all share is skipped.
template <int DIGIT>
static uint64_t* radix_sort(uint64_t* from, uint64_t* to, int64_t n, int bits) {
  constexpr int buckets = 1 << DIGIT;
  for (int shift = 32; shift < 32 + bits; shift += DIGIT) {
    uint32_t at[buckets] = {};
    for (int64_t i = 0; i < n; i++) at[from[i] >> shift & (buckets - 1)]++;
    if (at[from[0] >> shift & (buckets - 1)] == n) continue;
    uint32_t sum = 0;
    for (int b = 0; b < buckets; b++) {
      uint32_t count = at[b];
      at[b] = sum, sum += count;
    }
    for (int64_t i = 0; i < n; i++) to[at[from[i] >> shift & (buckets - 1)]++] = from[i];
    uint64_t* t = from;
    from = to, to = t;
  }
  return from;
}

// Leaves the result in x.pairs. Indices in the low halves that ascend where keys are equal stay so.
static void sort(Image& x, int64_t n, int bits) {
  if (n <= 32) {
    for (int64_t i = 1; i < n; i++) {
      uint64_t pair = x.pairs[i];
      int64_t j = i;
      for (; j > 0 && x.pairs[j - 1] >> 32 > pair >> 32; j--) x.pairs[j] = x.pairs[j - 1];
      x.pairs[j] = pair;
    }
    return;
  }
  uint64_t* sorted = n < 4096 ? radix_sort<8>(x.pairs, x.spare, n, bits) : radix_sort<11>(x.pairs, x.spare, n, bits);
  if (sorted != x.pairs) x.spare = x.pairs, x.pairs = sorted;
}

// Keys that ascend as scores descend; NaN first, and -0 is 0.
INLINE uint32_t sort_key(float score) {
  uint32_t bits = bits_as<uint32_t>(score == 0 ? 0.0f : score);
  return score != score ? 0 : ~(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u));
}
INLINE uint64_t sort_key(double score) {
  uint64_t bits = bits_as<uint64_t>(score == 0 ? 0.0 : score);
  return score != score ? 0 : ~(bits ^ (bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63));
}

template <class T>
static void find_whole(const Nms& a, const T* box, uint8_t* whole) {  // boxes without a NaN
  for (int64_t i = 0; i < a.N; i++, box += a.box) {
    bool ok = true;
    for (int c = 0; c < 4; c++) {
      auto x = widen(box[c * a.coordinate]);
      ok &= x == x;
    }
    whole[i] = ok;
  }
}

template <class S>
static void rank_boxes(const Nms& a, const S* scores, const uint8_t* whole, Image& x) {
  constexpr bool wide = sizeof(S) == 8;
  int64_t n = 0;
  for (int64_t i = 0; i < a.N; i++) {
    auto score = widen(scores[i * a.score]);
    auto key = sort_key(score);
    x.pairs[n] = uint64_t(uint32_t(key)) << 32 | uint64_t(i);
    bool in = !a.drop || (whole[i] && (a.above ? double(score) > a.score_threshold : score == score));
    n += in;
  }
  x.n = n;
  if (n == 0) return;
  sort(x, n, 32);
  if constexpr (wide) {
    for (int64_t r = 0; r < n; r++) {
      uint32_t i = uint32_t(x.pairs[r]);
      x.pairs[r] = (sort_key(scores[i * a.score]) >> 32) << 32 | i;
    }
    sort(x, n, 32);
  }
  for (int64_t r = 0; r < n; r++) x.order[r] = uint32_t(x.pairs[r]);
}

// Ranks by class, in x.pairs; above each the low half of its class's number, whose high half is 0 unless `wide`. The smallest is returned.
static int64_t sort_by_class(const Nms& a, const int64_t* classes, Image& x, bool& wide) {
  int64_t least = classes[0], most = least;
  for (int64_t i = 1; i < a.N; i++) {
    int64_t id = classes[i * a.class_];
    least = id < least ? id : least, most = id > most ? id : most;
  }
  uint64_t range = uint64_t(most) - uint64_t(least);
  wide = range >> 32;
  for (int64_t r = 0; r < x.n; r++) x.pairs[r] = (uint64_t(classes[x.order[r] * a.class_]) - uint64_t(least)) << 32 | uint64_t(r);
  int bits = wide ? 32 : 64 - __builtin_clzll(range | 1);
  sort(x, x.n, bits);
  if (wide) {
    for (int64_t p = 0; p < x.n; p++) {
      uint32_t r = uint32_t(x.pairs[p]);
      x.pairs[p] = (uint64_t(classes[x.order[r] * a.class_]) - uint64_t(least)) >> 32 << 32 | r;
    }
    sort(x, x.n, 32);
  }
  return least;
}

template <class T>
static void place_box(const Nms& a, const T* boxes, uint32_t index, int64_t place, Image& x) {
  using C = acc_t<T>;
  constexpr C small = sizeof(C) == 8 ? C(0x1p-500) : C(0x1p-60), inf = __builtin_inf();
  const T* box = boxes + index * a.box;
  C x1 = widen(box[0]), y1 = widen(box[a.coordinate]), x2 = widen(box[2 * a.coordinate]), y2 = widen(box[3 * a.coordinate]);
  C w = x2 - x1, area = w * (y2 - y1);
  bool active = w > 0 && area > 0 && area < inf;
  ((C*)x.x1)[place] = x1, ((C*)x.y1)[place] = y1, ((C*)x.x2)[place] = x2, ((C*)x.y2)[place] = y2;
  ((C*)x.area)[place] = active ? area : 0;
  x.small_areas |= active && area < small;
}

template <class T>
static void place_boxes(const Nms& a, const T* boxes, const int64_t* classes, Image& x) {
  x.small_areas = false, x.n_segments = x.n_tasks = 0;
  bool wide = false;
  int64_t least = 0;
  if (classes && x.n > 0) least = sort_by_class(a, classes, x, wide);
  int64_t place = 0, of_task = 0;
  uint64_t before = 0;
  for (int64_t p = 0; p < x.n; p++) {
    uint32_t r = classes ? uint32_t(x.pairs[p]) : uint32_t(p), index = x.order[r];
    uint64_t id = !classes ? 0 : wide ? uint64_t(classes[index * a.class_]) - uint64_t(least) : x.pairs[p] >> 32;
    if (p == 0 || id != before) {
      if (p > 0) x.segments[x.n_segments++].end = uint32_t(place);
      if (p == 0 || of_task >= TASK_BOXES) {
        place = (place + LINE - 1) / LINE * LINE, of_task = 0;  // no line of one task is another's
        x.tasks[x.n_tasks++] = uint32_t(x.n_segments);
      }
      x.segments[x.n_segments] = {uint32_t(place), uint32_t(place), 0, 0};
      before = id;
    }
    place_box(a, boxes, index, place, x);
    x.rank[place] = r;
    place++, of_task++;
  }
  if (x.n > 0) x.segments[x.n_segments++].end = uint32_t(place);
  x.tasks[x.n_tasks] = uint32_t(x.n_segments);
}

static void prepare(const Nms& a, int64_t image, Image& x) {
  const int64_t* classes = a.classes ? a.classes + image * a.class_image : nullptr;
  int64_t box = image * a.box_image, score = image * a.score_image;
  uint8_t* whole = x.keep;  // not yet of use
  if (a.drop) switch (a.box_type) {
      case Dtype::f16: find_whole(a, (const half*)a.boxes + box, whole); break;
      case Dtype::bf16: find_whole(a, (const bfloat16*)a.boxes + box, whole); break;
      case Dtype::f32: find_whole(a, (const float*)a.boxes + box, whole); break;
      case Dtype::f64: find_whole(a, (const double*)a.boxes + box, whole); break;
    }
  switch (a.score_type) {
    case Dtype::f16: rank_boxes(a, (const half*)a.scores + score, whole, x); break;
    case Dtype::bf16: rank_boxes(a, (const bfloat16*)a.scores + score, whole, x); break;
    case Dtype::f32: rank_boxes(a, (const float*)a.scores + score, whole, x); break;
    case Dtype::f64: rank_boxes(a, (const double*)a.scores + score, whole, x); break;
  }
  switch (a.box_type) {
    case Dtype::f16: place_boxes(a, (const half*)a.boxes + box, classes, x); break;
    case Dtype::bf16: place_boxes(a, (const bfloat16*)a.boxes + box, classes, x); break;
    case Dtype::f32: place_boxes(a, (const float*)a.boxes + box, classes, x); break;
    case Dtype::f64: place_boxes(a, (const double*)a.boxes + box, classes, x); break;
  }
}

// Deciding

#if LEVEL_BYTES == 64
INLINE f32 smaller(f32 a, f32 b) { return (f32)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE f64 smaller(f64 a, f64 b) { return (f64)_mm512_min_pd((__m512d)a, (__m512d)b); }
INLINE f64 larger(f64 a, f64 b) { return (f64)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE uint32_t above(f32 a, f32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
INLINE uint32_t above(f64 a, f64 b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
#elif LEVEL_BYTES == 32
INLINE f32 smaller(f32 a, f32 b) { return (f32)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE f64 smaller(f64 a, f64 b) { return (f64)_mm256_min_pd((__m256d)a, (__m256d)b); }
INLINE f64 larger(f64 a, f64 b) { return (f64)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE uint32_t above(f32 a, f32 b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ))); }
INLINE uint32_t above(f64 a, f64 b) { return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ))); }
#else
INLINE f32 smaller(f32 a, f32 b) { return a < b ? a : b; }
INLINE f64 smaller(f64 a, f64 b) { return a < b ? a : b; }
INLINE f64 larger(f64 a, f64 b) { return a > b ? a : b; }
template <class V>
INLINE uint32_t above(V a, V b) {
  auto yes = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < int(sizeof(V) / sizeof(a[0])); i++) bits |= uint32_t(yes[i] & 1) << i;
  return bits;
}
#endif
INLINE f32 larger(f32 a, f32 b) { return max(a, b); }

template <class C>
struct Places {
  C *x1, *y1, *x2, *y2, *area;
  explicit Places(const Image& x) : x1((C*)x.x1), y1((C*)x.y1), x2((C*)x.x2), y2((C*)x.y2), area((C*)x.area) {}
};

template <class C>
struct Candidate {
  vec<C> x1, y1, x2, y2, area;
  Candidate(const Places<C>& p, int64_t at)
      : x1(splat(p.x1[at])), y1(splat(p.y1[at])), x2(splat(p.x2[at])), y2(splat(p.y2[at])), area(splat(p.area[at])) {}
};

template <class C>
struct Limits {
  vec<C> threshold, reject;  // an intersection of at most reject * union is no IoU above the threshold, whatever is rounded
  explicit Limits(const Nms& a, bool small_areas) {
    constexpr C tiny = sizeof(C) == 8 ? C(0x1p-500) : C(0x1p-60), most = sizeof(C) == 8 ? C(1 - 0x1p-48) : C(1 - 0x1p-20);
    C t = C(a.threshold);
    threshold = splat(t), reject = splat(small_areas || t < tiny ? C(0) : t * most);
  }
};

// Which of a register's boxes suppress b, as bits; areas are positive and finite, all lanes beyond the list give anything.
template <class C>
INLINE uint32_t overlaps(const Places<C>& p, int64_t at, const Candidate<C>& b, const Limits<C>& limits) {
  vec<C> w = smaller(load(p.x2 + at), b.x2) - larger(load(p.x1 + at), b.x1);
  vec<C> h = smaller(load(p.y2 + at), b.y2) - larger(load(p.y1 + at), b.y1);
  vec<C> inter = larger(w, vec<C>{}) * h;  // where h is negative, it is not above 0 and no candidate
  vec<C> whole = load(p.area + at) + b.area - inter;
  uint32_t maybe = above(inter, limits.reject * whole);
  return __builtin_expect(maybe != 0, 0) ? maybe & above(inter / whole, limits.threshold) : 0;
}

template <class C>
static void suppress_segment(const Nms& a, const Image& x, Segment& s, const Limits<C>& limits, int64_t ranks) {
  constexpr int L = vector<C>::lanes;
  const Places<C> p(x);
  uint32_t at = s.next, kept = s.kept;
  for (; at < s.end; at++) {
    uint32_t r = x.rank[at];
    if (r >= ranks) break;
    x.keep[r] = 1;
    if (!(p.area[at] > 0)) continue;  // neither suppresses nor is suppressed
    const Candidate<C> b(p, at);
    uint32_t bits = 0, k = 0;
    for (; k < kept; k += L) {
      bits = overlaps(p, s.begin + k, b, limits);
      if (kept - k < uint32_t(L)) bits &= (1u << (kept - k)) - 1;
      if (bits) break;
    }
    if (bits) {
      x.keep[r] = 0;
      if (a.want_suppressor) x.suppressor[r] = x.rank[s.begin + k + __builtin_ctz(bits)];
      continue;
    }
    uint32_t to = s.begin + kept++;  // not beyond `at`: the list grows over boxes that are decided
    p.x1[to] = p.x1[at], p.y1[to] = p.y1[at], p.x2[to] = p.x2[at], p.y2[to] = p.y2[at], p.area[to] = p.area[at];
    x.rank[to] = r;
  }
  s.next = at, s.kept = kept;
}

template <class C>
static void suppress_task(const Nms& a, const Image& x, int64_t task, int64_t ranks) {
  const Limits<C> limits(a, x.small_areas);
  for (int64_t s = x.tasks[task]; s < x.tasks[task + 1]; s++) suppress_segment(a, x, x.segments[s], limits, ranks);
}
static void suppress(const Nms& a, const Image& x, int64_t task, int64_t ranks) {
  a.box_type == Dtype::f64 ? suppress_task<double>(a, x, task, ranks) : suppress_task<float>(a, x, task, ranks);
}

static constexpr NmsKernels nms_kernels = {prepare, suppress};

// The boxes of an image in their order, on one level: who takes part, by score, by class, and as arrays side by side.

// By bits 32 to 32 + bits - 1, stable; from and to are of n. Returns where the result is. A digit that all share is skipped.
template <int DIGIT>
static uint64_t* radix_sort(uint64_t* from, uint64_t* to, int64_t n, int bits) {
  constexpr int buckets = 1 << DIGIT, most = (31 + DIGIT) / DIGIT;
  int digits = (bits + DIGIT - 1) / DIGIT;
  uint32_t counts[most][buckets];
  for (int d = 0; d < digits; d++) __builtin_memset(counts[d], 0, sizeof counts[d]);
  for (int64_t i = 0; i < n; i++)
    for (int d = 0; d < digits; d++) counts[d][from[i] >> (32 + d * DIGIT) & (buckets - 1)]++;
  for (int d = 0; d < digits; d++) {
    uint32_t *at = counts[d], sum = 0;
    int shift = 32 + d * DIGIT;
    if (at[from[0] >> shift & (buckets - 1)] == n) continue;
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
  uint64_t* sorted = n < 16384 ? radix_sort<8>(x.pairs, x.spare, n, bits) : radix_sort<11>(x.pairs, x.spare, n, bits);
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
        place = p == 0 ? 0 : (place + LINE - 1) / LINE * LINE + LINE, of_task = 0;  // what one task loads, no other writes
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

// What the sort and the boxes' order then read and write here and there, fetched in the order of memory, which is several times as fast.
INLINE void fetch_all(const void* p, int64_t bytes) {
  if (bytes >= 1 << 13 && bytes <= 1 << 20)  // what is shorter is there as soon
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

static void prepare(const Nms& a, int64_t image, Image& x) {
  const int64_t* classes = a.classes ? a.classes + image * a.class_image : nullptr;
  int64_t box = image * a.box_image, score = image * a.score_image;
  int64_t item = bytes_of(a.box_type);
  fetch_all(x.pairs, a.N * 8), fetch_all(x.spare, a.N * 8);
  if (classes) fetch_all(classes, a.N * a.class_ * 8);
  fetch_all(a.boxes + box * item, a.N * a.box * item);
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

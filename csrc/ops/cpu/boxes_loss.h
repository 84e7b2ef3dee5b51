// Losses of aligned pairs. T: what boxes are stored as; A: the arithmetic. Included by boxes_kernel.h.

template <int KIND, class A>
INLINE Box<A> block_box(const A* corners, int64_t i) {
  return box_of<KIND>(load_corners(corners + i, LOSS_BLOCK));
}

// In float64, in an order that is the same at every level.
template <class A>
static double sum_of(const A* x, int64_t n) {
  double lanes[8] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; k++) lanes[k] += x[i + k];
  for (; i < n; i++) sum += x[i];
  for (double lane : lanes) sum += lane;
  return sum;
}

template <int KIND, class T, class A>
static double losses(const Loss& x, int64_t task) {
  constexpr int64_t L = vector<A>::lanes;
  alignas(64) A a[4 * LOSS_BLOCK], b[4 * LOSS_BLOCK], loss[LOSS_BLOCK];
  const vec<A> eps = splat(A(x.eps));
  double sum = 0;
  for (int64_t first = task * LOSS_TASK, end = min(first + LOSS_TASK, x.P); first < end; first += LOSS_BLOCK) {
    int64_t n = min(LOSS_BLOCK, end - first);
    read_corners<T>(x.a, 0, first, n, x.format, a, LOSS_BLOCK);
    read_corners<T>(x.b, 0, first, n, x.format, b, LOSS_BLOCK);
    for (int64_t i = 0; i < n; i += L) store(loss + i, splat(A(1)) - value<KIND, true>(block_box<KIND>(a, i), block_box<KIND>(b, i), eps));
    if (x.loss) __builtin_memcpy((A*)x.loss + first, loss, n * sizeof(A));
    sum += sum_of(loss, n);
  }
  return sum;
}

template <class T, class A>
static void write_grads(T* to, A* d, int64_t n, Format format) {
  A *x1 = d, *y1 = d + LOSS_BLOCK, *x2 = d + 2 * LOSS_BLOCK, *y2 = d + 3 * LOSS_BLOCK;
  if (format != Format::xyxy)
    for (int64_t i = 0; i < n; i++) to_format(format, x1[i], y1[i], x2[i], y2[i]);
  for (int64_t i = 0; i < n; i++)
    narrow(x1[i], to[4 * i]), narrow(y1[i], to[4 * i + 1]), narrow(x2[i], to[4 * i + 2]), narrow(y2[i], to[4 * i + 3]);
}
template <class A>
INLINE void store_corners(A* to, const Corners<A>& c) {
  store(to, c.x1), store(to + LOSS_BLOCK, c.y1), store(to + 2 * LOSS_BLOCK, c.x2), store(to + 3 * LOSS_BLOCK, c.y2);
}

template <int KIND, class T, class A>
static void loss_grads(const Loss& x, int64_t task) {
  constexpr int64_t L = vector<A>::lanes;
  alignas(64) A a[4 * LOSS_BLOCK], b[4 * LOSS_BLOCK], g[LOSS_BLOCK];
  const vec<A> eps = splat(A(x.eps));
  for (int64_t first = task * LOSS_TASK, end = min(first + LOSS_TASK, x.P); first < end; first += LOSS_BLOCK) {
    int64_t n = min(LOSS_BLOCK, end - first);
    read_corners<T>(x.a, 0, first, n, x.format, a, LOSS_BLOCK);
    read_corners<T>(x.b, 0, first, n, x.format, b, LOSS_BLOCK);
    const A* upstream = (const A*)x.dloss + first * x.dloss_stride;
    for (int64_t i = 0; i < n; i++) g[i] = -upstream[i * x.dloss_stride];
    for (int64_t i = 0; i < n; i += L) {
      Corners<A> da, db;
      derivative<KIND, true>(block_box<KIND>(a, i), block_box<KIND>(b, i), eps, load(g + i), da, db);
      store_corners(a + i, da), store_corners(b + i, db);
    }
    if (x.da) write_grads((T*)x.da + first * 4, a, n, x.format);
    if (x.db) write_grads((T*)x.db + first * 4, b, n, x.format);
  }
}

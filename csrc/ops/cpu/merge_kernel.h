// merge_attention on one level. Of two parts with weights w = softmax(lse), out = w1 out1 + w2 out2; what a part of weight 0 holds does not
// matter. Backwards, with s = dout . (out1 - out2): dout_i = w_i dout, dlse1 = w1 (dlse + w2 s), dlse2 = w2 (dlse - w1 s).

constexpr int64_t PIECE = 512;  // elements of a row that are worked on at a time

template <class A>
struct MergeWeights {
  alignas(64) A w[2][MERGE_ROWS], lse[MERGE_ROWS];
};

template <class A>
static void merge_weights(const Merge<A>& x, int64_t first, int64_t n, MergeWeights<A>& to) {
  alignas(64) A a[MERGE_ROWS] = {}, b[MERGE_ROWS] = {};
  __builtin_memcpy(a, x.lse[0] + first, n * sizeof(A)), __builtin_memcpy(b, x.lse[1] + first, n * sizeof(A));
  const vec<A> none = splat(A(-__builtin_inf())), zero{};
  for (int64_t i = 0; i < n; i += vector<A>::lanes) {
    vec<A> p = load(a + i), q = load(b + i), apart = p - q, top = p > q ? p : q;
    vec<A> e = exp2((apart > 0 ? -apart : apart) * A(LOG2E)), large = 1 / (1 + e), small = e * large;
    store(to.w[0] + i, top == none ? zero : (p >= q ? large : small));
    store(to.w[1] + i, top == none ? zero : (p >= q ? small : large));
    store(to.lse + i, top == none ? none : top + log1p(e));
  }
}

struct RowAt {  // its place in each of the leading dimensions
  int64_t b, h, m;
};
template <class A>
static RowAt row_at(const Merge<A>& x, int64_t row) {
  return {row / x.M / x.H, row / x.M % x.H, row % x.M};
}
template <class A>
INLINE void next_row(const Merge<A>& x, RowAt& r) {
  if (++r.m < x.M) return;
  r.m = 0, r.h++;
  if (r.h == x.H) r.h = 0, r.b++;
}
INLINE int64_t place(const Rows& t, const RowAt& r, int64_t at) {
  return r.b * t.stride[0] + r.h * t.stride[1] + r.m * t.stride[2] + at * t.stride[3];
}

// n elements of a row from `at` on: where they are, or, widened, in the buffer.
template <class A>
static const A* read_row(const Rows& t, const RowAt& r, int64_t at, int64_t n, A* buffer) {
  const int64_t from = place(t, r, at), stride = t.stride[3];
  switch (t.type) {
    case Dtype::f16: widen_row(buffer, (const half*)t.data + from, stride, n); break;
    case Dtype::bf16: widen_row(buffer, (const bfloat16*)t.data + from, stride, n); break;
    case Dtype::f32:
      if (sizeof(A) == 4 && stride == 1) return (const A*)t.data + from;
      widen_row(buffer, (const float*)t.data + from, stride, n);
      break;
    default:
      if (sizeof(A) == 8 && stride == 1) return (const A*)t.data + from;
      widen_row(buffer, (const double*)t.data + from, stride, n);
  }
  return buffer;
}
template <class A>
static void write_row(const Rows& t, const RowAt& r, int64_t at, int64_t n, const A* from, A factor) {
  const int64_t to = place(t, r, at), stride = t.stride[3];
  switch (t.type) {
    case Dtype::f16: return narrow_row((half*)t.data + to, stride, from, n, factor);
    case Dtype::bf16: return narrow_row((bfloat16*)t.data + to, stride, from, n, factor);
    case Dtype::f32: return narrow_row((float*)t.data + to, stride, from, n, factor);
    default: return narrow_row((double*)t.data + to, stride, from, n, factor);
  }
}

template <class A>
static void merge_forward(const Merge<A>& x, int64_t task) {
  const int64_t first = task * MERGE_ROWS, n = min(MERGE_ROWS, x.rows() - first);
  MergeWeights<A> weights;
  merge_weights(x, first, n, weights);
  __builtin_memcpy(x.merged_lse + first, weights.lse, n * sizeof(A));
  alignas(64) A buffers[2][PIECE], sum[PIECE];
  RowAt r = row_at(x, first);
  for (int64_t i = 0; i < n; i++, next_row(x, r)) {
    const A w = weights.w[0][i], v = weights.w[1][i];
    for (int64_t at = 0; at < x.D; at += PIECE) {
      const int64_t k = min(PIECE, x.D - at);
      if (w != 0 && v != 0) {
        const A *p = read_row(x.out[0], r, at, k, buffers[0]), *q = read_row(x.out[1], r, at, k, buffers[1]);
        for (int64_t j = 0; j < k; j++) sum[j] = w * p[j] + v * q[j];
        write_row(x.merged, r, at, k, sum, A(1));
      } else if (w != 0 || v != 0) {
        write_row(x.merged, r, at, k, read_row(x.out[w == 0], r, at, k, buffers[0]), w != 0 ? w : v);
      } else {
        for (int64_t j = 0; j < k; j++) sum[j] = 0;
        write_row(x.merged, r, at, k, sum, A(1));
      }
    }
  }
}

template <class A>
static A dot_difference(const A* g, const A* p, const A* q, int64_t n) {
  constexpr int64_t L = vector<A>::lanes;
  vec<A> sum{}, other{};
  int64_t j = 0;
  for (; j + 2 * L <= n; j += 2 * L) {
    sum += load(g + j) * (load(p + j) - load(q + j));
    other += load(g + j + L) * (load(p + j + L) - load(q + j + L));
  }
  A total = lanes_sum(sum + other);
  for (; j < n; j++) total += g[j] * (p[j] - q[j]);
  return total;
}

template <class A>
static void merge_backward(const Merge<A>& x, int64_t task) {
  const int64_t first = task * MERGE_ROWS, n = min(MERGE_ROWS, x.rows() - first);
  MergeWeights<A> weights;
  merge_weights(x, first, n, weights);
  alignas(64) A buffers[3][PIECE];
  const A zeros[PIECE] = {};
  RowAt r = row_at(x, first);
  for (int64_t i = 0; i < n; i++, next_row(x, r)) {
    const A w[2] = {weights.w[0][i], weights.w[1][i]}, dlse = x.dmerged_lse ? x.dmerged_lse[first + i] : A(0);
    A s = 0;
    for (int64_t at = 0; at < x.D; at += PIECE) {
      const int64_t k = min(PIECE, x.D - at);
      const A* g = read_row(x.dmerged, r, at, k, buffers[0]);
      if (w[0] != 0 && w[1] != 0)
        s += dot_difference(g, read_row(x.out[0], r, at, k, buffers[1]), read_row(x.out[1], r, at, k, buffers[2]), k);
      for (int part = 0; part < 2; part++) write_row(x.dout[part], r, at, k, w[part] != 0 ? g : zeros, w[part]);
    }
    x.dlse[0][first + i] = w[0] != 0 ? w[0] * (dlse + w[1] * s) : A(0);
    x.dlse[1][first + i] = w[1] != 0 ? w[1] * (dlse - w[0] * s) : A(0);
  }
}

template <class A>
constexpr MergeKernels<A> merge_kernels{merge_forward<A>, merge_backward<A>};

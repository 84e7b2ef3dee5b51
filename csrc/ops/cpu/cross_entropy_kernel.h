// Cross-entropy on one level. A row is read once from memory, in blocks that give the maximum and the sum of exponentials; the gradient
// is a second sweep, out of the cache. exp(x - max) and not exp2(x * log2e - ...): two logits of 2**24 must stay equal.
// Source: Online normalizer calculation for softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.

template <class A>
struct Block {
  static constexpr int64_t columns = 2048;  // 8 kB of float, in L1
  static constexpr int step = 4 * vector<A>::lanes;
  A x[columns + step];
  int64_t n = 0;  // up to a whole number of steps, the rest -inf

  template <class T>
  void read(const T* from, int64_t stride, int64_t count) {
    widen_row(x, from, stride, count);
    for (int i = 0; i < step; i += vector<A>::lanes) store(x + count + i, splat(A(-__builtin_inf())));
    n = (count + step - 1) / step * step;
  }
};

template <class A>
INLINE vec<A> exp_below(vec<A> x, vec<A> max) {  // e**(x - max)
  return exp2((x - max) * splat(A(1.4426950408889634)));
}

// max and sum of exp(x - max) over a row, whose last block is left as exp(x - max). Where every logit so far is -inf or NaN, the shift is
// 0: it gives 0 or NaN, not inf - inf.
template <class T>
static void row_stats(const CrossEntropy& a, const T* row, Block<acc_t<T>>& block, acc_t<T>& max_out, acc_t<T>& sum_out) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  constexpr A inf = __builtin_inf();
  A top = -inf, sum = 0;
  for (int64_t j = 0; j < a.V; j += block.columns) {
    block.read(row + j * a.column, a.column, a.V - j < block.columns ? a.V - j : block.columns);
    vec<A> m[4] = {splat(top), splat(top), splat(top), splat(top)}, s[4] = {};
    for (int64_t i = 0; i < block.n; i += block.step)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) m[u] = max(load(block.x + i + u * L), m[u]);
    A new_top = lanes_max(max(max(m[0], m[1]), max(m[2], m[3])));
    vec<A> shift = splat(new_top > -inf ? new_top : A(0));
    for (int64_t i = 0; i < block.n; i += block.step)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        vec<A> e = exp_below<A>(load(block.x + i + u * L), shift);
        store(block.x + i + u * L, e), s[u] += e;
      }
    sum = sum * exp_below<A>(splat(top), shift)[0] + lanes_sum((s[0] + s[1]) + (s[2] + s[3]));
    top = new_top;
  }
  max_out = top, sum_out = sum;
}

// grad = factor (softmax - one hot); the label's own element is formed from its logit and stored once more, last. A row of one block
// that row_stats() has just left there is not read again.
template <class T>
static void row_grad(const CrossEntropy& a, const T* row, Block<acc_t<T>>& block, bool is_there, T* grad, int64_t label, acc_t<T> top,
                     acc_t<T> sum, acc_t<T> factor) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  vec<A> shift = splat(top), by = splat(factor / sum);
  if (is_there) narrow_row(grad, a.grad_column, block.x, a.V, factor / sum);
  for (int64_t j = is_there ? a.V : 0; j < a.V; j += block.columns) {
    int64_t n = a.V - j < block.columns ? a.V - j : block.columns;
    block.read(row + j * a.column, a.column, n);
    for (int64_t i = 0; i < block.n; i += block.step)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) store(block.x + i + u * L, exp_below<A>(load(block.x + i + u * L), shift) * by);
    narrow_row(grad + j * a.grad_column, a.grad_column, block.x, n, A(1));
  }
  A p = exp_below<A>(splat(widen(row[label * a.column])), shift)[0] / sum;
  narrow((p - 1) * factor, grad[label * a.grad_column]);
}

template <class T>
static void zero_grad(const CrossEntropy& a, T* grad) {
  for (int64_t j = 0; j < a.V; j++) grad[j * a.grad_column] = T{};
}

template <class T>
static void forward_rows(const CrossEntropy& a, int64_t first, int64_t last) {
  using A = acc_t<T>;
  Block<A> block;
  for (int64_t i = first; i < last; i++) {
    const T* row = (const T*)a.logits + i * a.row;
    T* grad = (T*)a.grad + i * a.grad_row;
    A *stats = (A*)a.stats + 2 * i, *loss = (A*)a.loss + i;
    int64_t label = a.label(i);
    if (label == a.ignore_index) {
      stats[0] = 0, stats[1] = 1, *loss = 0;
      if (a.grad) zero_grad(a, grad);
      continue;
    }
    row_stats(a, row, block, stats[0], stats[1]);
    *loss = A(__builtin_log(double(stats[1])) - (double(widen(row[label * a.column])) - double(stats[0])));
    if (a.grad) row_grad(a, row, block, a.V <= block.columns, grad, label, stats[0], stats[1], A(a.factor));
  }
}

template <class T>
static void backward_rows(const CrossEntropy& a, int64_t first, int64_t last) {
  using A = acc_t<T>;
  Block<A> block;
  for (int64_t i = first; i < last; i++) {
    const A* stats = (const A*)a.stats + 2 * i;
    T* grad = (T*)a.grad + i * a.grad_row;
    if (a.label(i) == a.ignore_index)
      zero_grad(a, grad);
    else
      row_grad(a, (const T*)a.logits + i * a.row, block, false, grad, a.label(i), stats[0], stats[1],
               A(((const A*)a.dloss)[i * a.dloss_stride] * a.factor));
  }
}

template <class T>
constexpr CrossEntropyKernels row_kernels{forward_rows<T>, backward_rows<T>};
static CrossEntropyKernels cross_entropy_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return row_kernels<half>;
    case Dtype::bf16: return row_kernels<bfloat16>;
    case Dtype::f32: return row_kernels<float>;
    case Dtype::f64: return row_kernels<double>;
  }
  return {};
}

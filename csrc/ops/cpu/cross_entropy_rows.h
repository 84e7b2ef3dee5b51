// One row at a time, its classes in the lanes. It is read once from memory, in blocks; the gradient is a second sweep, out of the cache,
// over the exponentials of the first where they fit beside the row, else over the logits again.

constexpr int64_t BLOCK = 2048;    // columns: 8 kB of float, in L1
constexpr int64_t KEPT = 1 << 17;  // columns of a row whose exponentials are kept: half a megabyte of float, in L2

template <class A>
struct RowScratch {
  A *kept = nullptr, *shifts;  // exp(z - shift of its block), a.V of them or none; the shifts
  A z[BLOCK + PAD], c[BLOCK + PAD], e[BLOCK + PAD];
};

// z of n columns from j on; then -inf up to whole steps of four registers. Returns how many that makes.
template <class T>
static int64_t read_z(const Softmax& a, const T* row, int64_t j, int64_t n, acc_t<T>* z) {
  using A = acc_t<T>;
  constexpr int step = 4 * vector<A>::lanes;
  widen_row(z, row + j * a.logits.column, a.logits.column, n);
  transform(a, z, n);
  for (int i = 0; i < step; i += vector<A>::lanes) store(z + n + i, splat(A(-__builtin_inf())));
  return (n + step - 1) / step * step;
}

template <class A>
static void read_c(const Softmax& a, int64_t b, int64_t s, int64_t j, int64_t n, A* c) {
  const A* weight = (const A*)a.weight;
  if (a.probs.data) {
    read_probs(a, b * a.probs.batch + j * a.probs.column + s * a.probs.position, a.probs.column, n, c);
    for (int64_t i = 0; weight && i < n; i++) c[i] *= weight[j + i];
  } else {
    for (int64_t i = 0; i < n; i++) c[i] = weight ? weight[j + i] : 1;
  }
}

// Adds a block of n to r, whose sums are relative to `shift` and were to `before`. Where every logit so far is -inf or NaN, the shift
// is 0: it gives 0 or NaN, not inf - inf.
template <class A>
static void weigh(const Softmax& a, int64_t b, int64_t s, int64_t j, int64_t n, A shift, A before, RowScratch<A>& x, Row<A>& r) {
  constexpr int L = vector<A>::lanes;
  read_c(a, b, s, j, n, x.c);
  for (int i = 0; i < L; i++) x.c[n + i] = 0, x.e[i] = 0;
  r.U += r.T * (shift - before);
  vec<A> U = {}, T = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) U += load(x.c + i) * (splat(shift) - load(x.z + i)), T += load(x.c + i);
  for (int64_t k = i; k < n; k++) x.e[k - i] = x.c[k] * (shift - x.z[k]);  // beyond n z is -inf
  r.U += lanes_sum(U + load(x.e)), r.T += lanes_sum(T + (i < n ? load(x.c + i) : vec<A>{}));
}

template <class T>
static Row<acc_t<T>> row_stats(const Softmax& a, const T* row, int64_t b, int64_t s, RowScratch<acc_t<T>>& x) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes, step = 4 * L;
  constexpr A inf = __builtin_inf();
  bool entropy = a.stats_columns > 5;
  Row<A> r;
  A before = 0;
  for (int64_t j = 0; j < a.V; j += BLOCK) {
    int64_t n = min(a.V - j, BLOCK), whole = read_z(a, row, j, n, x.z);
    vec<A> m[4] = {splat(r.m), splat(r.m), splat(r.m), splat(r.m)}, sum[4] = {}, E = {};
    for (int64_t i = 0; i < whole; i += step)
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) m[u] = max(load(x.z + i + u * L), m[u]);
    A top = lanes_max(max(max(m[0], m[1]), max(m[2], m[3]))), shift = top > -inf ? top : 0, factor = j > 0 ? exp_of<A>(r.m - shift) : 0;
    if (a.argmax && top > r.m)
      for (r.argmax = j; x.z[r.argmax - j] != top;) r.argmax++;
    if (weighs_all(a)) weigh(a, b, s, j, n, shift, before, x, r);
    A* e = x.kept ? x.kept + j : x.e;
    const char* next = (const char*)(row + j + BLOCK);  // or the next row, where rows are dense; else advice for nothing
    for (int64_t i = 0; i < whole; i += step) {
      for (int line = 0; line < step * int(sizeof(T)); line += 64) __builtin_prefetch(next + i * sizeof(T) + line);
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        vec<A> p = exp_of<A>(load(x.z + i + u * L) - shift);
        store(e + i + u * L, p), sum[u] += p;
      }
    }
    if (entropy) {
      vec<A> cap = splat(A(2000));  // exp(-2000) is 0, and 0 * inf is NaN
      for (int64_t i = 0; i < whole; i += L) {
        vec<A> below = splat(shift) - load(x.z + i);
        E += load(e + i) * (below > cap ? cap : below);
      }
      r.E = (factor > 0 ? (r.E + r.d * (shift - before)) * factor : 0) + lanes_sum(E);  // 0 * inf is NaN
    }
    r.d = r.d * factor + lanes_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    r.m = top, before = shift;
    if (x.kept) x.shifts[j / BLOCK] = shift;
  }
  return r;
}

// The label's own element is formed from its logit and stored once more, last. grad may be row itself.
template <class T>
static void row_grad(const Softmax& a, T* grad, const T* row, int64_t b, int64_t s, int64_t label, Coefficients<acc_t<T>> k,
                     RowScratch<acc_t<T>>& x) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  k.P *= A(a.scale), k.Q *= A(a.scale), k.H *= A(a.scale), k.S *= A(a.scale);
  A at_label = 0;
  if (label >= 0) {
    A z = transformed(a, widen(row[label * a.logits.column])), below = k.m - z;
    at_label = exp_of<A>(-below) * (k.P + k.Q * (below > 2000 ? 2000 : below)) - k.S * weight_of<A>(a, label) - k.H;
    if (a.softcap > 0) at_label *= slope<A>(a, splat(z))[0];
  }
  bool weighed = k.S != 0, simple = !weighed && k.Q == 0 && a.softcap <= 0;
  for (int64_t j = 0; j < a.V; j += BLOCK) {
    int64_t n = min(a.V - j, BLOCK);
    T* out = grad + j * a.grad.column;
    A factor = x.kept && a.V > BLOCK ? exp_of<A>(x.shifts[j / BLOCK] - k.m) : 1;
    if (simple && x.kept) {
      narrow_row(out, a.grad.column, x.kept + j, n, k.P * factor);
      continue;
    }
    int64_t whole = (n + L - 1) / L * L;
    if (!x.kept || a.softcap > 0 || k.Q != 0) whole = read_z(a, row, j, n, x.z);
    if (weighed) read_c(a, b, s, j, n, x.c);
    for (int64_t i = 0; i < whole; i += L) {
      vec<A> g = x.kept ? load(x.kept + j + i) * factor : exp_of<A>(load(x.z + i) - k.m);
      if (k.Q != 0) {
        vec<A> below = splat(k.m) - load(x.z + i), cap = splat(A(2000));
        g *= k.P + k.Q * (below > cap ? cap : below);
      } else {
        g *= k.P;
      }
      if (weighed) g -= k.S * load(x.c + i);
      if (a.softcap > 0) g *= slope<A>(a, load(x.z + i));
      store(x.e + i, g);
    }
    narrow_row(out, a.grad.column, x.e, n, A(1));
  }
  if (label >= 0) narrow(at_label, grad[label * a.grad.column]);
}

template <class T>
static double all_rows(const Softmax& a, int64_t first, int64_t last, char* memory) {
  using A = acc_t<T>;
  RowScratch<A>& x = *(RowScratch<A>*)memory;
  x.kept = nullptr;
  if (a.grad.data && !a.coefficients && a.V <= KEPT) x.shifts = (A*)(memory + sizeof x), x.kept = x.shifts + KEPT / BLOCK;
  double sum = 0;
  for (int64_t i = first; i < last; i++) {
    int64_t b = i / a.D, s = i % a.D, label = a.target ? a.label(b, s) : -1;
    const T* row = (const T*)a.logits.data + b * a.logits.batch + s * a.logits.position;
    T* grad = a.grad.data ? (T*)a.grad.data + b * a.grad.batch + s * a.grad.position : nullptr;
    if (a.ignored(label)) {
      Row<A> none;
      none.m = 0, none.argmax = -1;
      write_stats(a, i, none);
      if (a.loss) ((A*)a.loss)[i] = 0;
      for (int64_t j = 0; grad && j < a.V; j++) grad[j * a.grad.column] = T{};
      continue;
    }
    if (label < 0 || label >= a.V) label = -1;  // of another shard
    if (a.coefficients) {
      const A* k = (const A*)a.coefficients + i * COEFFICIENTS;
      row_grad(a, grad, row, b, s, label, {k[0], k[1], k[2], k[3], k[4]}, x);
      continue;
    }
    Row<A> r = row_stats(a, row, b, s, x);
    if (label >= 0) r.rel = r.m - transformed(a, widen(row[label * a.logits.column]));
    write_stats(a, i, r);
    A w = weight_of<A>(a, label < 0 ? 0 : label);
    double loss = row_loss(a, r, w);
    if (a.loss) ((A*)a.loss)[i] = A(loss);
    sum += loss;
    if (grad) row_grad(a, grad, row, b, s, label, row_coefficients(a, r, w), x);
  }
  return sum;
}

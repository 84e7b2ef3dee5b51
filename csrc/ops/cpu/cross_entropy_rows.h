// One row at a time, its classes in the lanes. It is read once from memory, in blocks; the gradient is a second sweep, out of the cache,
// over the exponentials of the first where they fit beside the row, else over the logits again.

constexpr int64_t BLOCK = 2048;    // columns: 8 kB of float, in L1
constexpr int SLACK = 16;          // a block whose largest logit is that much above those before it needs no pass for it, but their shift
constexpr int64_t KEPT = 1 << 17;  // columns of a row whose exponentials are kept: half a megabyte of float, in L2

template <class A>
struct RowScratch {
  A *kept = nullptr, *shifts;  // exp(z - shift of its block), a.V of them or none; the shifts
  bool raw;                    // whether z is read from the logits themselves: then kept is in the order of load_pair
  A z[BLOCK + PAD], c[BLOCK + PAD], e[BLOCK + PAD];
};

// Into memory; past: around the cache, where the lines of a result that no cache could keep would be read only to be written.
template <class V>
INLINE void store_bits(void* p, V v, bool past) {
#if LEVEL_BYTES >= 32
  if (past) {
    if constexpr (sizeof v == 64)
      _mm512_stream_si512((__m512i*)p, (__m512i)v);
    else if constexpr (sizeof v == 32)
      _mm256_stream_si256((__m256i*)p, (__m256i)v);
    else
      _mm_stream_si128((__m128i*)p, (__m128i)v);
    return;
  }
#else
  (void)past;
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

// Two registers of elements in the order that costs least: of bf16 those at even places, then those at odd ones, the halves of words.
template <class A>
struct Pair {
  vec<A> a, b;
};
template <class T, class A = acc_t<T>>
INLINE Pair<A> load_pair(const T* p) {
  return {load_wide(p), load_wide(p + vector<A>::lanes)};
}
template <class T, class A = acc_t<T>>
INLINE void store_pair(T* p, vec<A> a, vec<A> b, bool past = false) {
  store_bits(p, narrowed(a, p), past), store_bits(p + vector<A>::lanes, narrowed(b, p), past);
}
INLINE Pair<float> load_pair(const bfloat16* p) {
  u32 x = load((const uint32_t*)p);
  return {(f32)(x << 16), (f32)(x & 0xffff0000u)};
}
INLINE void store_pair(bfloat16* p, f32 a, f32 b, bool past = false) {
#if LEVEL_BF16_DOT
  constexpr uint16_t halves[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  store_bits(p, _mm512_permutexvar_epi16((__m512i)load((const uint32_t*)halves), both), past);
#else
  store_bits(p, rounded_bf16(a) >> 16 | (rounded_bf16(b) & 0xffff0000u), past);
#endif
}

// The last n elements of a block, in a copy that -inf fills up to a step of four registers.
template <class T, class A>
INLINE const T* raw_rest(const T* row, int64_t n, A* buffer) {
  T *copy = (T*)buffer, none;
  narrow(A(-__builtin_inf()), none);
  for (int64_t i = 0; i < 4 * vector<A>::lanes; i++) copy[i] = none;
  for (int64_t i = 0; i < n; i++) copy[i] = row[i];
  return copy;
}

template <class S, class A>
INLINE A block_max(const S* z, int64_t whole, A m) {
  constexpr int L = vector<A>::lanes;
  vec<A> top[4] = {splat(m), splat(m), splat(m), splat(m)};
  for (int64_t i = 0; i < whole; i += 4 * L)
#pragma GCC unroll 2
    for (int u = 0; u < 4; u += 2) {
      Pair<A> p = load_pair(z + i + u * L);
      top[u] = max(p.a, top[u]), top[u + 1] = max(p.b, top[u + 1]);
    }
  return lanes_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// What a block has: the largest logit, or an earlier one that is larger; the sums of e = exp(z - shift) and of e (shift - z).
template <class A>
struct Sums {
  A top, d = 0, E = 0;
};

// Adds a block to s, of which `top` is wanted or not. e is kept. Meanwhile what is read next, and what is written last, comes into the
// cache: a store to a line that is not there waits for memory as a load does.
template <bool TOP, bool ENTROPY, class T, class S, class A>
INLINE void add_block(const S* z, int64_t whole, A shift, A* e, const T* next, const T* grad, Sums<A>& s) {
  constexpr int L = vector<A>::lanes, line = 64 / sizeof(T);
  const vec<A> cap = splat(A(2000));  // exp(-2000) is 0, and 0 * inf is NaN
  vec<A> d[4] = {}, E[4] = {}, top[4] = {splat(s.top), splat(s.top), splat(s.top), splat(s.top)};
  for (int64_t i = 0; i < whole; i += 4 * L) {
    for (int k = 0; k < 4 * L; k += line) __builtin_prefetch(next + i + k);
    for (int k = 0; k < 4 * L && grad; k += line) __builtin_prefetch(grad + i + k, 1);
#pragma GCC unroll 2
    for (int u = 0; u < 4; u += 2) {
      Pair<A> p = load_pair(z + i + u * L);
      if (TOP) top[u] = max(p.a, top[u]), top[u + 1] = max(p.b, top[u + 1]);
      vec<A> first = exp_of<A>(p.a - shift), second = exp_of<A>(p.b - shift);
      store(e + i + u * L, first), store(e + i + (u + 1) * L, second);
      d[u] += first, d[u + 1] += second;
      if (ENTROPY) {
        vec<A> below = shift - p.a, lower = shift - p.b;
        E[u] += first * (below > cap ? cap : below), E[u + 1] += second * (lower > cap ? cap : lower);
      }
    }
  }
  s.d += lanes_sum((d[0] + d[1]) + (d[2] + d[3]));
  if (ENTROPY) s.E += lanes_sum((E[0] + E[1]) + (E[2] + E[3]));
  if (TOP) s.top = lanes_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// n elements times factor, from the order of load_pair.
template <class T, class A>
INLINE void narrow_pairs(T* to, const A* from, int64_t n, A factor, bool past) {
  constexpr int step = 2 * vector<A>::lanes;
  int64_t i = 0;
  for (; i + step <= n; i += step) store_pair(to + i, load(from + i) * factor, load(from + i + step / 2) * factor, past);
  T rest[step];
  store_pair(rest, load(from + i) * factor, load(from + i + step / 2) * factor);
  for (int64_t k = i; k < n; k++) to[k] = rest[k - i];
}

// The gradient of n logits as they lie, but for the label's part. to may be z itself.
template <bool ENTROPY, class T, class A>
INLINE void grad_pairs(T* to, const T* z, int64_t n, const Coefficients<A>& k, bool past) {
  constexpr int step = 2 * vector<A>::lanes, ahead = 1024 / sizeof(T);
  const vec<A> cap = splat(A(2000));
  const auto gradient = [&](vec<A> z) {
    if (!ENTROPY) return exp_of<A>(z - k.m) * k.P;
    vec<A> below = k.m - z;
    return exp_of<A>(-below) * (k.P + k.Q * (below > cap ? cap : below));
  };
  const auto pair = [&](const T* from, T* out, bool around) {
    Pair<A> p = load_pair(from);
    store_pair(out, gradient(p.a), gradient(p.b), around);
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    for (int j = 0; j < step && !past; j += 64 / sizeof(T)) __builtin_prefetch(to + i + ahead + j, 1);
    pair(z + i, to + i, past);
  }
  if (i == n) return;
  T rest[step] = {};
  for (int64_t j = i; j < n; j++) rest[j - i] = z[j];
  pair(rest, rest, false);
  for (int64_t j = i; j < n; j++) to[j] = rest[j - i];
}

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

template <bool ENTROPY, class T>
static Row<acc_t<T>> row_stats(const Softmax& a, const T* row, const T* grad, int64_t b, int64_t s, RowScratch<acc_t<T>>& x) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes, step = 4 * L;
  constexpr A inf = __builtin_inf();
  const A slack = ENTROPY ? 0 : SLACK;
  Row<A> r;
  A before = 0;
  for (int64_t j = 0; j < a.V; j += BLOCK) {
    int64_t n = min(a.V - j, BLOCK), body = n / step * step;
    A *e = x.kept ? x.kept + j : x.e, shift = before, factor = 1;
    Sums<A> sums{r.m};
    // rest: what is left behind the body, as a step of its own, or null
    const auto add = [&](auto top, const auto* z, int64_t body, const auto* rest) {
      const T *next = row + j + BLOCK, *to = grad ? grad + j : nullptr;  // the next row's, where rows are dense
      sums = {sums.top};
      add_block<top, ENTROPY>(z, body, shift, e, next, to, sums);
      if (rest) add_block<top, ENTROPY>(rest, step, shift, e + body, next + body, to ? to + body : to, sums);
    };
    const auto add_below_top = [&](const auto* z, int64_t body, const auto* rest) {
      sums.top = block_max(z, body, r.m);
      if (rest) sums.top = block_max(rest, step, sums.top);
      shift = sums.top > -inf ? sums.top : 0, factor = j > 0 ? exp_of<A>((r.m < before ? r.m : before) - shift) : 0;
      if (a.argmax && sums.top > r.m)
        for (r.argmax = j; widen(z[r.argmax - j]) != sums.top;) r.argmax++;
      if (weighs_all(a)) weigh(a, b, s, j, n, shift, before, x, r);
      add(std::false_type{}, z, body, rest);
    };
    if (x.raw) {
      const T* rest = n > body ? raw_rest(row + j + body, n - body, x.z) : nullptr;
      if (r.m > -inf) add(std::true_type{}, row + j, body, rest);
      if (!(r.m > -inf) || sums.top > shift + slack) add_below_top(row + j, body, rest);
    }
    if (!x.raw) body = read_z(a, row, j, n, x.z), add_below_top(x.z, body, (const A*)nullptr);
    if (ENTROPY) r.E = (factor > 0 ? (r.E + r.d * (shift - before)) * factor : 0) + sums.E;  // 0 * inf is NaN
    r.d = r.d * factor + sums.d;
    r.m = sums.top, before = shift;
    if (x.kept) x.shifts[j / BLOCK] = shift;
  }
  if (r.m > before) r.d /= exp_of<A>(r.m - before);  // as it stands in the sum: where one logit is all there is, d is exactly 1
  return r;
}

// The label's own element is formed from its logit and stored once more, last. grad may be row itself.
template <class T>
static void row_grad(const Softmax& a, T* grad, const T* row, int64_t b, int64_t s, int64_t label, Coefficients<acc_t<T>> k,
                     RowScratch<acc_t<T>>& x, bool past) {
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
    if (x.raw) {
      if (x.kept)
        narrow_pairs(out, x.kept + j, n, k.P * factor, past);
      else
        k.Q == 0 ? grad_pairs<false>(out, row + j, n, k, past) : grad_pairs<true>(out, row + j, n, k, past);
      continue;
    }
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
  x.raw = a.logits.column == 1 && (!a.grad.data || a.grad.column == 1) && a.softcap <= 0 && a.scale == 1 && !weighs_all(a);
  const bool around = a.stream && !a.fresh && x.raw && (x.kept || a.coefficients);
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
    const bool past = around && uintptr_t(grad) % 64 == 0;
    if (a.coefficients) {
      const A* k = (const A*)a.coefficients + i * COEFFICIENTS;
      row_grad(a, grad, row, b, s, label, {k[0], k[1], k[2], k[3], k[4]}, x, past);
      continue;
    }
    Row<A> r = (a.stats_columns > 5 ? row_stats<true, T> : row_stats<false, T>)(a, row, past ? nullptr : grad, b, s, x);
    if (label >= 0) r.rel = r.m - transformed(a, widen(row[label * a.logits.column]));
    write_stats(a, i, r);
    A w = weight_of<A>(a, label < 0 ? 0 : label);
    double loss = row_loss(a, r, w);
    if (a.loss) ((A*)a.loss)[i] = A(loss);
    sum += loss;
    if (grad) row_grad(a, grad, row, b, s, label, row_coefficients(a, r, w), x, past);
  }
#if LEVEL_BYTES >= 32
  if (around) _mm_sfence();  // else other threads might not see yet what went around the cache
#endif
  return sum;
}

// Attention on one level. Keys that no query may see are left out when the rest is packed, so each query's keys are a prefix of the
// packed ones, whatever the mask. Everything is computed with these operands (product.h), per key head or query head:
//   kt, vt: keys, values transposed, in panels of COLS keys: [panel][word of d][key]      kn, vn: as rows of a b operand: [word of key][d]
//   qt, dot: queries, do transposed, as natural rows: [d][word of query]
// Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
#include "product.h"

constexpr int64_t KEYS = 128;        // keys of a step of the forward, and of a packing task
constexpr int64_t QUERIES = 48;      // queries of a task of the forward: a tile of scores, 24 kB, stays in L1
constexpr int64_t BWD_KEYS = 64;     // keys of a task of the backward
constexpr int64_t BWD_QUERIES = 96;  // queries of a step of the backward
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// fp32 probabilities cannot be rebuilt from an fp32 lse: at lse = 8 its rounding alone is four of theirs.
template <class T>
struct lse_of {
  using type = float;
};
template <>
struct lse_of<float> {
  using type = double;
};
template <>
struct lse_of<double> {
  using type = double;
};
template <class T>
using lse_t = typename lse_of<T>::type;

template <class T>
INLINE T* row_of(const View& x, int64_t b, int64_t h, int64_t row) {
  return (T*)x.data + b * x.b + h * x.h + row * x.row;
}

// How many of the packed keys query i sees.
INLINE int64_t limit(const Attention& a, const int32_t* seen, int64_t i) {
  int64_t end = a.causal ? i + a.N - a.M + 1 : a.N;
  return seen[end < 0 ? 0 : min(end, a.N)];
}

template <class T>
struct Sizes {  // of the operands, in words or accumulators, for one head
  int64_t dw, dvw, dp, dvp, keys, mw, d6, dv6;
  Sizes(const Attention& a)
      : dw(words<T>(a.D)),
        dvw(words<T>(a.Dv)),
        dp(round_up(a.D, vector<acc_t<T>>::lanes)),
        dvp(round_up(a.Dv, vector<acc_t<T>>::lanes)),
        keys(round_up(a.N, KEYS)),
        mw(words<T>(round_up(a.M, ROWS))),
        d6(round_up(a.D, ROWS)),
        dv6(round_up(a.Dv, ROWS)) {}
};

// Scratch memory handed out piece by piece, each on a cache line of its own.
struct Pieces {
  char* next;
  template <class X>
  X* take(int64_t n) {
    char* p = next;
    next += round_up(n * sizeof(X), 64);
    return (X*)p;
  }
};
template <class T>
struct Forward {
  word_t<T>* q;
  acc_t<T>*s, *o, *m, *l, *top, *shift, *factor;  // the last five: one a row

  char* end;
  Forward(const Sizes<T>& z, char* scratch) {
    Pieces p{scratch};
    q = p.take<word_t<T>>(QUERIES * z.dw), s = p.take<acc_t<T>>(QUERIES * KEYS), o = p.take<acc_t<T>>(QUERIES * z.dvp);
    m = p.take<acc_t<T>>(QUERIES), l = p.take<acc_t<T>>(QUERIES), top = p.take<acc_t<T>>(QUERIES);
    shift = p.take<acc_t<T>>(QUERIES), factor = p.take<acc_t<T>>(QUERIES);
    end = p.next;
  }
};

// Natural rows of n elements each, from(i) telling where row i lies; rows up to a multiple of ROWS, or of `multiple`, become zero.
template <class T, class F>
INLINE void pack_rows(word_t<T>* to, int64_t to_row, F from, int64_t stride, int64_t n, int64_t rows, int64_t multiple) {
  for (int64_t i = 0; i < rows; i++) pack_row(to + i * to_row, from(i), stride, n);
  for (int64_t i = rows; i < round_up(rows, multiple); i++) __builtin_memset(to + i * to_row, 0, to_row * sizeof *to);
}

// Packs up to KEYS keys or values: transposed into panels, as rows of a b operand, or both.
template <class T>
static void pack_keys(const Attention& a, const View& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t d, word_t<T>* panels,
                      word_t<T>* rows, int64_t rows_width, char* scratch) {
  using W = word_t<T>;
  int64_t dw = words<T>(d);
  const int32_t* keys = a.keys_of(b) + first;
  W* natural = (W*)scratch;
  pack_rows<T>(natural, dw, [&](int64_t i) { return row_of<T>(x, b, h, keys[i]); }, x.d, d, n, COLS<acc_t<T>>);
  if (panels)
    for (int64_t j = 0; j < n; j += COLS<acc_t<T>>)
      transpose(natural + j * dw, dw, COLS<acc_t<T>>, dw, panels + (first + j) * dw, COLS<acc_t<T>>);
  if (rows) {
    rows += first / operand<T>::pack * rows_width;
    for (int64_t i = 0; i < words<T>(n); i++, rows += rows_width) {
#if LEVEL_BF16_DOT
      if constexpr (operand<T>::pack == 2)
        interleave(rows, natural + 2 * i * dw, natural + (2 * i + 1) * dw, d);
      else
#endif
        __builtin_memcpy(rows, natural + i * dw, d * sizeof(W));
      __builtin_memset(rows + d, 0, (rows_width - d) * sizeof(W));
    }
  }
}

template <class T>
static void forward_plan(Attention& a) {
  using W = word_t<T>;
  Sizes<T> z(a);
  int64_t heads = a.B * a.Hkv, chunks = (a.N + KEYS - 1) / KEYS;
  Pieces p{nullptr};
  a.kt = (int64_t)p.take<W>(heads * z.keys * z.dw);
  a.vn = (int64_t)p.take<W>(heads * words<T>(z.keys) * z.dvp);
  a.work_bytes = (int64_t)p.next;
  int64_t natural = KEYS * (z.dw > z.dvw ? z.dw : z.dvw) * sizeof(W), task = Forward<T>(z, nullptr).end - (char*)nullptr;
  a.scratch_bytes = natural > task ? natural : task;
  a.pack_tasks = heads * chunks;
  a.tasks = a.B * a.H * ((a.M + QUERIES - 1) / QUERIES);
}

template <class T>
static void forward_pack(const Attention& a, int64_t task, char* scratch) {
  using W = word_t<T>;
  Sizes<T> z(a);
  int64_t heads = a.B * a.Hkv, head = task % heads, b = head / a.Hkv, h = head % a.Hkv, first = task / heads * KEYS;
  int64_t n = min(a.seen_of(b)[a.N] - first, KEYS);
  if (n <= 0) return;
  pack_keys<T>(a, a.k, b, h, first, n, a.D, (W*)(a.work + a.kt) + head * z.keys * z.dw, nullptr, 0, scratch);
  pack_keys<T>(a, a.v, b, h, first, n, a.Dv, nullptr, (W*)(a.work + a.vn) + head * words<T>(z.keys) * z.dvp, z.dvp, scratch);
}

template <class A>
constexpr A lowest = -__FLT_MAX__;
template <>
constexpr double lowest<double> = -__DBL_MAX__;

// A tile of scores becomes probabilities, in place and as words, relative to the running maxima m (in log2 units), n columns a row, of
// which the first hi(i) count in row i. f.factor tells by what each row's earlier sums shrink. Three loops over the rows, not one: so the
// latencies of one row's maximum, factor and sum hide behind its neighbours.
template <class T, class F>
INLINE void softmax_rows(Forward<T>& f, int64_t rows, int64_t n, acc_t<T> scale, F hi) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes, PACK = operand<T>::pack;
  const A inf = __builtin_inf();
  for (int64_t i = 0; i < rows; i++) {
    A* s = f.s + i * KEYS;
    for (int64_t j = hi(i); j < n; j++) s[j] = -inf;
    vec<A> top = load(s);
    for (int64_t j = L; j < n; j += L) top = max(load(s + j), top);
    f.top[i] = lanes_max(top) * scale;
  }
  for (int64_t i = 0; i < rows; i += L) {
    vec<A> m = load(f.m + i), m_new = max(m, load(f.top + i));
    vec<A> shift = max(m_new, splat(lowest<A>));  // no score above -inf so far: avoid inf - inf
    store(f.factor + i, exp2(m - shift)), store(f.shift + i, shift), store(f.m + i, m_new);
  }
  vec<A> by = splat(scale);
  for (int64_t i = 0; i < rows; i++) {
    A* s = f.s + i * KEYS;
    vec<A> sum[PACK] = {}, shift = splat(f.shift[i]);
    for (int64_t j = 0; j < n; j += PACK * L) {
      vec<A> x[PACK];
#pragma GCC unroll 2
      for (int u = 0; u < PACK; u++) sum[u] += x[u] = exp2(load(s + j + u * L) * by - shift);
      pack_scores<T>((word_t<T>*)s, j, x);
    }
    f.l[i] = f.l[i] * f.factor[i] + lanes_sum(PACK == 2 ? sum[0] + sum[PACK - 1] : sum[0]);
  }
}

template <class T>
static void forward_task(const Attention& a, int64_t task, char* scratch) {
  using W = word_t<T>;
  using A = acc_t<T>;
  Sizes<T> z(a);
  Forward<T> f(z, scratch);
  int64_t heads = a.B * a.H, head = task % heads, b = head / a.H, h = head % a.H, kv_head = b * a.Hkv + h / (a.H / a.Hkv);
  int64_t i0 = ((a.M + QUERIES - 1) / QUERIES - 1 - task / heads) * QUERIES;  // the last queries first: they see the most keys
  int64_t rows = min(a.M - i0, QUERIES), padded = round_up(rows, ROWS);
  const int32_t* seen = a.seen_of(b);
  const W *kt = (W*)(a.work + a.kt) + kv_head * z.keys * z.dw, *vn = (W*)(a.work + a.vn) + kv_head * words<T>(z.keys) * z.dvp;

  pack_rows<T>(f.q, z.dw, [&](int64_t i) { return row_of<T>(a.q, b, h, i0 + i); }, a.q.d, a.D, rows, ROWS);
  A scale = A(a.scale * LOG2E);
  if (scale < 0) {  // the maximum of the scaled scores is the scaled maximum only for a positive scale
    for (int64_t i = 0; i < padded * z.dw; i++) f.q[i] = negate(f.q[i]);
    scale = -scale;
  } else if (scale == 0) {  // and 0 * -inf is NaN
    __builtin_memset(f.q, 0, padded * z.dw * sizeof(W));
    scale = 1;
  }
  for (int64_t i = 0; i < QUERIES; i++) f.m[i] = f.top[i] = -__builtin_inf(), f.l[i] = 0;

  int64_t end = limit(a, seen, i0 + rows - 1);
  for (int64_t j0 = 0; j0 < end; j0 += KEYS) {
    int64_t keys = min(end - j0, KEYS), n = round_up(keys, vector<A>::lanes * operand<T>::pack);
    exact_product(rows, keys, z.dw, f.q, z.dw, kt + j0 * z.dw, COLS<A>, COLS<A> * z.dw, f.s, KEYS);
    softmax_rows<T>(f, rows, n, scale, [&](int64_t i) {
      int64_t hi = min(limit(a, seen, i0 + i) - j0, keys);
      return hi < 0 ? 0 : hi;
    });
    const W *p = (W*)f.s, *v = vn + j0 / operand<T>::pack * z.dvp;
    if (j0 == 0)
      product<Start::zero>(rows, a.Dv, words<T>(keys), p, KEYS, v, z.dvp, COLS<A>, f.o, z.dvp);
    else
      product<Start::scale>(rows, a.Dv, words<T>(keys), p, KEYS, v, z.dvp, COLS<A>, f.o, z.dvp, f.factor);
  }
  if (end == 0) __builtin_memset(f.o, 0, rows * z.dvp * sizeof(A));

  lse_t<T>* lse = (lse_t<T>*)a.lse + (b * a.H + h) * a.M + i0;
  for (int64_t i = 0; i < rows; i++) {
    A l = f.l[i];  // 0: a query that sees no key gives zeros, and lse = -inf
    narrow_row(row_of<T>(a.o, b, h, i0 + i), a.o.d, f.o + i * z.dvp, a.Dv, l > 0 ? 1 / l : l == l ? A(0) : l);
    lse[i] = lse_t<T>(l > 0 ? (f.m[i] + __builtin_log2(double(l))) * LN2 : l == l ? -__builtin_inf() : l);
  }
}

#include "attention_backward.h"

template <class T>
constexpr AttentionKernels both_ways[2] = {{forward_plan<T>, forward_pack<T>, forward_task<T>},
                                           {backward_plan<T>, backward_pack<T>, backward_task<T>}};
static const AttentionKernels* attention_kernels(Dtype dtype) {  // forward, backward
  switch (dtype) {
    case Dtype::f16: return both_ways<half>;
    case Dtype::bf16: return both_ways<bfloat16>;
    case Dtype::f32: return both_ways<float>;
    case Dtype::f64: return both_ways<double>;
  }
  return nullptr;
}

// The two products of the forward for a few rows, with keys and values read where they lie: decoding is as fast as they can be read.

// A register of words of a natural row, from word w on; words beyond n elements are zero. Elements lie one after the other.
template <class T>
INLINE vec<word_t<T>> load_words(const T* row, int64_t w, int64_t n) {
  constexpr int COUNT = vector<word_t<T>>::lanes * operand<T>::pack;  // elements
  row += w * operand<T>::pack, n -= w * operand<T>::pack;
  if (n >= COUNT) return widen_words(row);
#if LEVEL_BYTES == 64
  T rest[COUNT];
  const uint64_t bytes = n > 0 ? (uint64_t(1) << n * sizeof(T)) - 1 : 0;
  if constexpr (sizeof rest == 64)
    _mm512_storeu_si512(rest, _mm512_maskz_loadu_epi8(bytes, row));
  else
    _mm256_storeu_si256((__m256i*)rest, _mm256_maskz_loadu_epi8(uint32_t(bytes), row));
#else
  T rest[COUNT] = {};
  if (n > 0) __builtin_memcpy(rest, row, n * sizeof(T));
#endif
  return widen_words(rest);
}

// Rows of keys or values, from one of the sequence on. Addresses are computed as they are needed: a table of them, just written, delays the
// loads of elements that lie as far behind the start of a page.
template <class T>
struct StreamedRows {
  const T* first;
  int64_t stride;
  const int32_t* keys;  // of those packed, else null
  StreamedRows(const View& x, const Sequence& s, int64_t kv_head, int64_t j0)
      : first(row_of<T>(x, s.b, kv_head, s.k0 + (s.keys ? 0 : j0))), stride(x.row), keys(s.keys ? s.keys + j0 : nullptr) {}
  const T* operator()(int64_t j) const { return first + (keys ? keys[j] : j) * stride; }
};

// Up to a register's lanes of products of one query: sums[l], to be summed up, of q k(j + l). q: words; W: registers of words to a row,
// 0 for any number of words. Keys are read one after the other, each load of the loop a row further than at its last turn: that the CPU
// foresees, sooner than any prefetching did. What the loop has beside loads takes room from those under way.
template <class T, int W>
INLINE void stream_keys(const StreamedRows<T>& k, int64_t j, int64_t n, int64_t D, const word_t<T>* q, vec<acc_t<T>>* sums) {
  constexpr int L = vector<word_t<T>>::lanes;
  vec<word_t<T>> query[W + 1];
#pragma GCC unroll 8
  for (int w = 0; w < W; w++) query[w] = load(q + w * L);
#pragma GCC unroll 1
  for (int64_t l = 0; l < n; l++) {
    const T* row = k(j + l);
    vec<acc_t<T>> sum = {};
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) sum = madd(sum, query[w], widen_words(row + w * L * operand<T>::pack));
    for (int64_t w = 0; W == 0 && w < words<T>(D); w += L) sum = madd(sum, load(q + w), load_words(row, w, D));
    sums[l] = sum;
  }
  for (int64_t l = n; l < vector<acc_t<T>>::lanes; l++) sums[l] = vec<acc_t<T>>{};
}

template <class T, int W>
static void stream_rows(const StreamedRows<T>& k, int64_t keys, int64_t D, const word_t<T>* q, int64_t q_row, int64_t rows,
                        acc_t<T>* scores) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  for (int64_t j = 0; j < keys; j += L)
    for (int64_t r = 0; r < rows; r++) {
      vec<A> sums[L];
      stream_keys<T, W>(k, j, min(keys - j, L), D, q + r * q_row, sums);
      fold_registers<A, L / 2>(sums);
      store(scores + r * STEP<T> + j, sums[0]);
    }
}

// s (rows x keys, STEP a row) = q k: q, natural rows of q_row words.
template <class T>
static void stream_scores(const Attention& a, const Sequence& s, int64_t kv_head, int64_t j0, int64_t keys, const word_t<T>* q,
                          int64_t q_row, int64_t rows, acc_t<T>* scores) {
  using W = word_t<T>;
  constexpr int64_t L = vector<W>::lanes, WIDE = L * operand<T>::pack;
  StreamedRows<T> k(a.k, s, kv_head, j0);
  if (a.D == 2 * WIDE) return stream_rows<T, 2>(k, keys, a.D, q, q_row, rows, scores);
  if (a.D == 4 * WIDE) return stream_rows<T, 4>(k, keys, a.D, q, q_row, rows, scores);
  if (a.D == 8 * WIDE) return stream_rows<T, 8>(k, keys, a.D, q, q_row, rows, scores);
  W wide_q[STREAM_ROWS][256 + L] = {};  // zeros beyond D
  for (int64_t r = 0; r < rows; r++) __builtin_memcpy(wide_q[r], q + r * q_row, q_row * sizeof(W));
  stream_rows<T, 0>(k, keys, a.D, wide_q[0], 256 + L, rows, scores);
}

// V registers of words of the values of one step of the reduction, which is pack keys. whole: all of their columns are there.
template <class T, int V, bool whole>
INLINE void load_values(const T* const (&rows)[operand<T>::pack], int64_t d, int64_t Dv, vec<word_t<T>>* to) {
  constexpr int L = vector<acc_t<T>>::lanes;
#if LEVEL_BF16_DOT
  if constexpr (operand<T>::pack == 2) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      u32 x = whole ? widen_words(rows[0] + d + v * L) : load_words(rows[0], (d + v * L) / 2, Dv);
      u32 y = whole ? widen_words(rows[1] + d + v * L) : load_words(rows[1], (d + v * L) / 2, Dv);
      asm("" : "+v"(x), "+v"(y));  // else GCC reads both lines for each half
      interleave(x, y, to[v], to[v + 1]);
    }
    return;
  } else
#endif
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) to[v] = whole ? widen_words(rows[0] + d + v * L) : load_words(rows[0], d + v * L, Dv);
}

template <class T, int R, int V, bool whole>
INLINE void stream_columns(const StreamedRows<T>& values, int64_t keys, int64_t d, int64_t Dv, const word_t<T>* p,
                           vec<acc_t<T>> (*acc)[V]) {
  static const T zeros[256 + 2 * COLS<acc_t<T>>] = {};  // the partner of an odd one
#pragma GCC unroll 1
  for (int64_t step = 0; step < words<T>(keys); step++) {
    vec<word_t<T>> column[V];
    const T* rows[operand<T>::pack] = {values(step * operand<T>::pack)};
    if constexpr (operand<T>::pack == 2) rows[1] = step * 2 + 1 < keys ? values(step * 2 + 1) : zeros;
    load_values<T, V, whole>(rows, d, Dv, column);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = madd(acc[r][v], splat(p[r * STEP<T> + step]), column[v]);
  }
}

template <class T, int R, int V>
__attribute__((noinline)) static void stream_tile(const StreamedRows<T>& values, int64_t keys, int64_t d, int64_t Dv, const word_t<T>* p,
                                                  acc_t<T>* o, int64_t o_row, const acc_t<T>* factor) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  vec<A> acc[R][V] = {};
  if (d + V * L <= Dv)
    stream_columns<T, R, V, true>(values, keys, d, Dv, p, acc);
  else
    stream_columns<T, R, V, false>(values, keys, d, Dv, p, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      A* to = o + r * o_row + d + v * L;
      if (d + v * L < Dv) store(to, factor ? acc[r][v] + load(to) * splat(factor[r]) : acc[r][v]);
    }
}

// o (rows x Dv) = [factor *] o + p v: p, words with STEP to a row.
template <class T>
static void stream_values(const Attention& a, const Sequence& s, int64_t kv_head, int64_t j0, int64_t keys, const word_t<T>* p,
                          int64_t rows, acc_t<T>* o, int64_t o_row, const acc_t<T>* factor) {
  StreamedRows<T> values(a.v, s, kv_head, j0);
  int64_t r = 0;
  while (r < rows) {
    const auto run = [&](auto tile, int64_t n, int64_t columns) {
      for (int64_t d = 0; d < a.Dv; d += columns)
        tile(values, keys, d, a.Dv, p + r * STEP<T>, o + r * o_row, o_row, factor ? factor + r : nullptr);
      r += n;
    };
    if (rows - r >= 4)
      run(stream_tile<T, 4, LEVEL_VECS>, 4, COLS<acc_t<T>>);
    else if (rows - r >= 2)
      run(stream_tile<T, 2, LEVEL_VECS>, 2, COLS<acc_t<T>>);
    else  // long pieces of rows: this is where memory is the limit
      run(stream_tile<T, 1, 2 * LEVEL_VECS>, 1, 2 * COLS<acc_t<T>>);
  }
}

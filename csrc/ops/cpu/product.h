#include "transpose.h"

// Matrix products in registers, and the operand layouts that they read. A word holds the consecutive elements of the reduction that one
// instruction multiplies: one float, one double, or, where the level has a bfloat16 dot product, two bfloat16.
//
// product() computes c (rows x cols) = [c *] + a b for
//   a: rows of words, the reduction along the row ("natural"), or, transposed, one row per step of the reduction;
//   b: one row of words per step of the reduction, the columns along the row.

template <class T>
struct operand {
  using word = typename accumulator<T>::type;
  static constexpr int pack = 1;
};
#if LEVEL_BF16_DOT
template <>
struct operand<bfloat16> {
  using word = uint32_t;
  static constexpr int pack = 2;
};
#endif
template <class T>
using word_t = typename operand<T>::word;

constexpr int ROWS = 6;  // of a register tile; its columns are LEVEL_VECS registers
template <class C>
constexpr int COLS = LEVEL_VECS * vector<C>::lanes;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T>
constexpr int64_t words(int64_t n) {
  return (n + operand<T>::pack - 1) / operand<T>::pack;
}

INLINE f32 madd(f32 acc, f32 a, f32 b) { return acc + a * b; }
INLINE f64 madd(f64 acc, f64 a, f64 b) { return acc + a * b; }
#if LEVEL_BF16_DOT
INLINE f32 madd(f32 acc, u32 a, u32 b) { return (f32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#endif

enum class Start { zero, add, scale };  // c = a b, c += a b, c = factor[row] c + a b

template <int R, int V, Start start, bool transposed, class W, class A>
static void tile(const W* a, int64_t a_row, const W* b, int64_t b_step, int64_t steps, A* c, int64_t c_row, const A* factor) {
  constexpr int L = vector<A>::lanes;
  vec<A> acc[R][V] = {};
  for (int64_t s = 0; s < steps; s++, b += b_step) {
    vec<W> column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) column[v] = load(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      vec<W> x = splat(transposed ? a[s * a_row + r] : a[r * a_row + s]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = madd(acc[r][v], x, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      A* to = c + r * c_row + v * L;
      if constexpr (start == Start::add) acc[r][v] += load(to);
      if constexpr (start == Start::scale) acc[r][v] += load(to) * splat(factor[r]);
      store(to, acc[r][v]);
    }
}

// Which rows of c are computed: all up to a multiple of ROWS, which a has, but for a single row; or none but those, and a transposed.
enum class Rows { padded, exact, transposed };

// One column of tiles, V registers wide.
template <int V, Start start, Rows kind, class W, class A>
static void tiles(int64_t rows, const W* a, int64_t a_row, const W* b, int64_t b_step, int64_t steps, A* c, int64_t c_row,
                  const A* factor) {
  constexpr bool transposed = kind == Rows::transposed;
  if constexpr (kind == Rows::padded) {
    if (rows == 1) return tile<1, V, start, false>(a, a_row, b, b_step, steps, c, c_row, factor);
    for (int64_t r = 0; r < rows; r += ROWS)
      tile<ROWS, V, start, false>(a + r * a_row, a_row, b, b_step, steps, c + r * c_row, c_row, factor ? factor + r : factor);
  } else {
    static_assert(start != Start::scale, "no factors for the last rows");
    int64_t a_tile = transposed ? 1 : a_row, r = 0;
    for (; r + ROWS <= rows; r += ROWS)
      tile<ROWS, V, start, transposed>(a + r * a_tile, a_row, b, b_step, steps, c + r * c_row, c_row, factor);
    if (rows - r >= 4) tile<4, V, start, transposed>(a + r * a_tile, a_row, b, b_step, steps, c + r * c_row, c_row, factor), r += 4;
    if (rows - r >= 2) tile<2, V, start, transposed>(a + r * a_tile, a_row, b, b_step, steps, c + r * c_row, c_row, factor), r += 2;
    if (r < rows) tile<1, V, start, transposed>(a + r * a_tile, a_row, b, b_step, steps, c + r * c_row, c_row, factor);
  }
}

// b_panel: the distance from one COLS wide panel of b to the next; cols is rounded up to whole registers, in b and in c.
template <Start start, Rows kind = Rows::padded, class W, class A>
static void product(int64_t rows, int64_t cols, int64_t steps, const W* a, int64_t a_row, const W* b, int64_t b_step, int64_t b_panel, A* c,
                    int64_t c_row, const A* factor = nullptr) {
  constexpr int L = vector<A>::lanes;
  for (int64_t j = 0; j < cols; j += COLS<A>, b += b_panel, c += COLS<A>) {
    int64_t registers = (cols - j + L - 1) / L;
    if (registers >= LEVEL_VECS)
      tiles<LEVEL_VECS, start, kind>(rows, a, a_row, b, b_step, steps, c, c_row, factor);
    else if (registers == 1)
      tiles<1, start, kind>(rows, a, a_row, b, b_step, steps, c, c_row, factor);
#if LEVEL_VECS == 4
    else if (registers == 2)
      tiles<2, start, kind>(rows, a, a_row, b, b_step, steps, c, c_row, factor);
    else
      tiles<3, start, kind>(rows, a, a_row, b, b_step, steps, c, c_row, factor);
#endif
  }
}

// The same from zero, for a sum whose rounding error is magnified afterwards (scores, by exp): in full precision it is added up from
// short parts, which halves the error for a few percent of the time.
template <Rows kind = Rows::padded, class W, class A>
static void exact_product(int64_t rows, int64_t cols, int64_t steps, const W* a, int64_t a_row, const W* b, int64_t b_step, int64_t b_panel,
                          A* c, int64_t c_row) {
  int64_t part = !std::is_same_v<W, A> ? steps : rows == 1 ? 16 : 32;
  product<Start::zero, kind>(rows, cols, steps < part ? steps : part, a, a_row, b, b_step, b_panel, c, c_row);
  for (int64_t s = part; s < steps; s += part)
    product<Start::add, kind>(rows, cols, steps - s < part ? steps - s : part, a + s, a_row, b + s * b_step, b_step, b_panel, c, c_row);
}

// Packing. A natural row of n elements: words(n) of them, the last one padded with zero.
template <class T>
INLINE void pack_row(word_t<T>* to, const T* from, int64_t stride, int64_t n) {
  if constexpr (operand<T>::pack == 1) {
    widen_row(to, from, stride, n);
  } else {
    uint16_t* bits = (uint16_t*)to;
    if (n & 1) bits[n] = 0;
    if (stride == 1)
      __builtin_memcpy(bits, from, n * sizeof(T));
    else
      for (int64_t i = 0; i < n; i++) bits[i] = from[i * stride].bits;
  }
}

INLINE float negate(float x) { return -x; }
INLINE double negate(double x) { return -x; }
INLINE uint32_t negate(uint32_t x) { return x ^ 0x80008000; }

// Accumulators as the elements of a natural row; n a multiple of pack registers.
template <class T>
INLINE void pack_scores(word_t<T>* to, int64_t i, const vec<acc_t<T>>* x) {
#if LEVEL_BF16_DOT
  if constexpr (operand<T>::pack == 2) {
    store(to + i / 2, (u32)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
    return;
  } else
#endif
    store(to + i, x[0]);
}

// A register of words of a natural row that lies in memory as it is, whole.
#if LEVEL_BF16_DOT
INLINE u32 widen_words(const bfloat16* p) { return load((const uint32_t*)p); }
#else
INLINE f32 widen_words(const bfloat16* p) { return load_wide(p); }
#endif
template <class T>
INLINE auto widen_words(const T* p) {
  return load_wide(p);
}

// Two natural rows as one row of a b operand: word j holds element j of both.
#if LEVEL_BF16_DOT
INLINE void interleave(uint32_t* to, const uint32_t* row0, const uint32_t* row1, int64_t n) {
  const uint16_t *x = (const uint16_t*)row0, *y = (const uint16_t*)row1;
  for (int64_t j = 0; j < n; j++) to[j] = uint32_t(x[j]) | uint32_t(y[j]) << 16;
}
INLINE void interleave(u32 row0, u32 row1, u32& left, u32& right) {  // the same for 32 elements of each
  constexpr uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  __m512i first = (__m512i)load(order);
  left = (u32)_mm512_permutex2var_epi16((__m512i)row0, first, (__m512i)row1);
  right = (u32)_mm512_permutex2var_epi16((__m512i)row0, _mm512_add_epi16(first, _mm512_set1_epi16(16)), (__m512i)row1);
}
INLINE u32 interleave(f32 row0, f32 row1) {  // the same for accumulators
  constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (u32)_mm512_permutexvar_epi16((__m512i)load(order), (__m512i)_mm512_cvtne2ps_pbh((__m512)row1, (__m512)row0));
}
#endif

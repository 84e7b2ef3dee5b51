// Transposes: blocks of lanes x lanes in registers, by swapping ever smaller off-diagonal blocks. The last block of a row or column
// overlaps the one before; less than a block goes word by word.
template <int K, class V, int... E>
INLINE void swap_blocks(V& x, V& y, indices<E...>) {
  constexpr int L = sizeof...(E);
  V lo = __builtin_shufflevector(x, y, (E & K ? E - K + L : E)...), hi = __builtin_shufflevector(x, y, (E & K ? E + L : E + K)...);
  x = lo, y = hi;
}
template <int K, class V, int L>
INLINE void transpose_registers(V (&x)[L]) {
#pragma GCC unroll 16
  for (int i = 0; i < L; i++)
    if (!(i & K)) swap_blocks<K>(x[i], x[i | K], typename make_indices<L>::type{});
  if constexpr (K > 1) transpose_registers<K / 2>(x);
}

// x[0][l] = the sum of the lanes of x[l], halves against halves. A step folds pairs of registers whose sums have 2 H lanes each; in the end
// within 16 bytes, which takes one instruction and no table.
template <int H, class V, int... E>
INLINE V fold_blocks(V x, V y, indices<E...>) {
  constexpr int L = sizeof...(E), PIECE = H * sizeof(x[0]) < 16 ? 16 / sizeof(x[0]) : L;  // lanes whose sums stay among each other
  constexpr auto from = [](int e) {
    return e / PIECE * PIECE + e % PIECE % (PIECE / 2) / H * 2 * H + e % H + (e % PIECE < PIECE / 2 ? 0 : L);
  };
  return __builtin_shufflevector(x, y, from(E)...) + __builtin_shufflevector(x, y, (from(E) + H)...);
}
template <class C, int H, class V, int L>
INLINE void fold_registers(V (&x)[L]) {
  constexpr int PIECE = 16 / sizeof(C), FIRST = H >= PIECE ? PIECE * (L / 2 / H) : PIECE / 2 / H, END = H >= PIECE ? L : PIECE;
#pragma GCC unroll 16
  for (int i = 0; i < END; i++)
    if (H >= PIECE ? i / PIECE % (2 * FIRST / PIECE) == 0 : i % (2 * FIRST) == 0)
      x[i] = fold_blocks<H>(x[i], x[i + FIRST], typename make_indices<L>::type{});
  if constexpr (H > 1) fold_registers<C, H / 2>(x);
}
template <class W>
static void transpose(const W* from, int64_t from_row, int64_t rows, int64_t cols, W* to, int64_t to_row) {
  constexpr int L = vector<W>::lanes;
  if (rows < L || cols < L) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) to[j * to_row + i] = from[i * from_row + j];
    return;
  }
  for (int64_t row = 0; row < rows; row += L)
    for (int64_t col = 0; col < cols; col += L) {
      int64_t i = min(row, rows - L), j = min(col, cols - L);
      vec<W> x[L];
      for (int l = 0; l < L; l++) x[l] = load(from + (i + l) * from_row + j);
      transpose_registers<L / 2>(x);
      for (int l = 0; l < L; l++) store(to + (j + l) * to_row + i, x[l]);
    }
}

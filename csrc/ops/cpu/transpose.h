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

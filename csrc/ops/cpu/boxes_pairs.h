// Pairwise: the lanes hold boxes of the second set. Included by boxes_kernel.h.

#if LEVEL_BYTES == 64
INLINE void store_some(float* p, f32 v, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1 << n) - 1), (__m512)v); }
INLINE void store_some(double* p, f64 v, int64_t n) { _mm512_mask_storeu_pd(p, (__mmask8)((1 << n) - 1), (__m512d)v); }
#else
template <class A, class V>
INLINE void store_some(A* p, V v, int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
}
#endif

// Up to COLUMNS boxes as corners, area and angle, COLUMNS elements apart.
template <int KIND, class A>
static void read_columns(const Boxes& of, int64_t set, int64_t first, int64_t n, Format format, A* to) {
  read_corners<A>(of, set, first, n, format, to, COLUMNS);
  for (int64_t i = 0; i < n; i += vector<A>::lanes) {
    Box<A> box = box_of<KIND>(load_corners(to + i, COLUMNS));
    store(to + 4 * COLUMNS + i, box.area);
    if (Kind(KIND) == Kind::ciou) store(to + 5 * COLUMNS + i, box.angle);
  }
}
template <int KIND, class A>
INLINE Box<A> load_box(const A* from) {
  Box<A> box;
  box.at = load_corners(from, COLUMNS), box.area = load(from + 4 * COLUMNS);
  box.angle = Kind(KIND) == Kind::ciou ? load(from + 5 * COLUMNS) : vec<A>{};
  return box;
}
template <int KIND, class A>
INLINE Box<A> row_box(const Boxes& of, int64_t set, int64_t i, Format format) {
  A at[4];
  read_corners<A>(of, set, i, 1, format, at, 1);
  return box_of<KIND>(splat_corners(at, 1));
}

template <int KIND, int ROWS, class A>
INLINE void pair_rows(const Pairs& p, int64_t set, int64_t i, int64_t first, int64_t n, const A* columns) {
  constexpr int64_t L = vector<A>::lanes;
  const vec<A> eps = splat(A(p.eps));
  A* out = (A*)p.out + (set * p.N + i) * p.M + first;
  Box<A> rows[ROWS];
  for (int r = 0; r < ROWS; r++) rows[r] = row_box<KIND, A>(p.a, set, i + r, p.format);
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    Box<A> column = load_box<KIND>(columns + j);
    for (int r = 0; r < ROWS; r++) store(out + r * p.M + j, value<KIND, false>(rows[r], column, eps));
  }
  if (j < n) {
    Box<A> column = load_box<KIND>(columns + j);
    for (int r = 0; r < ROWS; r++) store_some(out + r * p.M + j, value<KIND, false>(rows[r], column, eps), n - j);
  }
}

template <int KIND, class A>
static void pairs(const Pairs& p, int64_t task, char* scratch) {
  constexpr int ROWS = 4;  // at a time: columns are loaded once for all
  A* columns = (A*)scratch;
  int64_t across = (p.M + COLUMNS - 1) / COLUMNS, down = (p.N + p.rows - 1) / p.rows;
  int64_t first = task % across * COLUMNS, n = min(COLUMNS, p.M - first), set = task / across / down;
  int64_t i = task / across % down * p.rows, end = min(i + p.rows, p.N);
  read_columns<KIND>(p.b, set, first, n, p.format, columns);
  for (; i + ROWS <= end; i += ROWS) pair_rows<KIND, ROWS>(p, set, i, first, n, columns);
  for (; i < end; i++) pair_rows<KIND, 1>(p, set, i, first, n, columns);
}

// Upstream gradients of one row: where they lie, if they lie as the lanes want them, else a copy with zeros up to a whole register.
template <class A>
INLINE const A* read_upstream(const Pairs& p, int64_t set, int64_t i, int64_t first, int64_t n, A* buffer) {
  const A* from = (const A*)p.dout + set * p.dout_set + i * p.dout_row + first * p.dout_column;
  if (p.dout_column == 1 && n % vector<A>::lanes == 0) return from;
  for (int64_t j = 0; j < n; j++) buffer[j] = from[j * p.dout_column];
  for (int64_t j = n; j % vector<A>::lanes; j++) buffer[j] = 0;
  return buffer;
}

template <class A>
INLINE void add_to(A* sums, vec<A> x) {
  store(sums, load(sums) + x);
}

// One part of the rows against one part of the columns. Sums run in A over at most COLUMNS or CHUNK pairs, in double from there on.
template <int KIND, class A>
static void pairs_grad(const Pairs& p, int64_t task, char* scratch) {
  constexpr int64_t L = vector<A>::lanes, CHUNK = 64;
  A *columns = (A*)scratch, *sums = columns + 6 * COLUMNS, *buffer = sums + 4 * COLUMNS;
  int64_t column_part = task % p.column_parts, row_part = task / p.column_parts % p.row_parts, set = task / p.column_parts / p.row_parts;
  int64_t row = row_part * p.row_part, row_end = min(row + p.row_part, p.N);
  int64_t column = column_part * p.column_part, column_end = min(column + p.column_part, p.M);
  double* rows_of = p.sums_a ? p.sums_a + (set * p.column_parts + column_part) * p.N * 4 : nullptr;
  double* columns_of = p.sums_b ? p.sums_b + (set * p.row_parts + row_part) * p.M * 4 : nullptr;
  if (rows_of)
    for (int64_t i = row * 4; i < row_end * 4; i++) rows_of[i] = 0;
  if (columns_of)
    for (int64_t i = column * 4; i < column_end * 4; i++) columns_of[i] = 0;
  const vec<A> eps = splat(A(p.eps));
  for (int64_t first = column; first < column_end; first += COLUMNS) {
    int64_t n = min(COLUMNS, column_end - first);
    read_columns<KIND>(p.b, set, first, n, p.format, columns);
    for (int64_t chunk = row; chunk < row_end; chunk += CHUNK) {
      for (int64_t j = 0; j < 4 * COLUMNS; j += L) store(sums + j, vec<A>{});
      for (int64_t i = chunk; i < min(chunk + CHUNK, row_end); i++) {
        const A* upstream = read_upstream<A>(p, set, i, first, n, buffer);
        Box<A> a = row_box<KIND, A>(p.a, set, i, p.format);
        Corners<A> of_row{};
        bool some = false;
        for (int64_t j = 0; j < n; j += L) {
          vec<A> g = load(upstream + j);
          if (!bits_above(g == vec<A>{} ? vec<A>{} : splat(A(1)), vec<A>{})) continue;
          Corners<A> da, db;
          derivative<KIND, false>(a, load_box<KIND>(columns + j), eps, g, da, db);
          of_row.x1 += da.x1, of_row.y1 += da.y1, of_row.x2 += da.x2, of_row.y2 += da.y2;
          some = true;
          if (!columns_of) continue;
          add_to(sums + j, db.x1), add_to(sums + COLUMNS + j, db.y1), add_to(sums + 2 * COLUMNS + j, db.x2);
          add_to(sums + 3 * COLUMNS + j, db.y2);
        }
        if (!rows_of || !some) continue;
        double* to = rows_of + i * 4;
        to[0] += lanes_sum(of_row.x1), to[1] += lanes_sum(of_row.y1), to[2] += lanes_sum(of_row.x2), to[3] += lanes_sum(of_row.y2);
      }
      if (columns_of)
        for (int64_t j = 0; j < n; j++)
          for (int64_t k = 0; k < 4; k++) columns_of[(first + j) * 4 + k] += sums[k * COLUMNS + j];
    }
  }
}

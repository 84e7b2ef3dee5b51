// The backward of short sequences. A task has all keys of a head, so no turns are needed. It computes in the dtype of the arithmetic, where
// of the five products' operands only two, k and v, have to be transposed:
//   s = q kt, dp = do vt, dv += p^T do, dk += ds^T q, dq = ds k: rows of numbers to broadcast (^T: columns), and rows of registers.

template <class T>
constexpr int64_t short_keys = operand<T>::pack == 1 ? SHORT : 32;  // 16-bit products are twice as fast in pairs
constexpr int64_t SHORT_SCORES = 48 * SHORT;                        // of a step: 24 kB

template <class T>
static bool takes_short(const Attention& a) {
  return a.most_keys <= short_keys<T> && a.longest <= short_keys<T> && !a.every_b && !a.every_h;
}

template <class A>
struct Short {
  A *k, *v, *kt, *vt, *dk, *dv, *q, *dout, *dq, *s, *ds, *o;
  int64_t dp, dvp;
  char* end;
  Short(const Attention& a, char* scratch) : dp(round_up(a.D, vector<A>::lanes)), dvp(round_up(a.Dv, vector<A>::lanes)) {
    Pieces p{scratch};
    k = p.take<A>(KEYS * dp), v = p.take<A>(KEYS * dvp), kt = p.take<A>(KEYS * dp), vt = p.take<A>(KEYS * dvp);
    dk = p.take<A>(KEYS * dp), dv = p.take<A>(KEYS * dvp);
    q = p.take<A>(BWD_QUERIES * dp), dout = p.take<A>(BWD_QUERIES * dvp), dq = p.take<A>(BWD_QUERIES * dp);
    s = p.take<A>(SHORT_SCORES), ds = p.take<A>(SHORT_SCORES), o = p.take<A>(dvp);
    end = p.next;
  }
};

template <class T, class A>
INLINE void copy_row(const T* from, int64_t stride, int64_t d, int64_t width, A* to) {
  widen_row(to, from, stride, d);
  for (int64_t j = d; j < width; j++) to[j] = 0;
}

// Rows of d elements from the one at position first on, in registers filled up with zeros: where they lie, or copied to `to`.
template <class T, class A>
INLINE const A* natural_rows(const View& x, const Sequence& s, int64_t h, int64_t first, int64_t rows, int64_t d, int64_t width, A* to) {
  const T* from = row_of<T>(x, s.b, h, first);
  if (std::is_same_v<T, A> && x.d == 1 && x.row == d && d == width) return (const A*)from;
  for (int64_t i = 0; i < rows; i++) copy_row<T>(from + i * x.row, x.d, d, width, to + i * width);
  return to;
}

template <bool edge, class A>
static void short_gradients(A* s, A* ds, int64_t rows, int64_t n, Row<A>* row) {
  constexpr int L = vector<A>::lanes;
  for (int64_t r = 0; r < rows; r++) {
    round_huge(row[r], s + r * n, n);
    for (int64_t j = 0; j < n; j += L) {
      vec<A> x = load(s + r * n + j), y = load(ds + r * n + j);
      gradients<edge>(x, y, row[r], j);
      store(s + r * n + j, x), store(ds + r * n + j, y);
    }
  }
}

// What the queries first to first + rows - 1 of a head add to dk and dv, and their dq. k: natural rows.
template <class T, class A>
static void short_queries(const Attention& a, const Short<A>& w, const Sequence& s, int64_t h, int64_t first, int64_t rows, const A* k,
                          int64_t panel) {
  constexpr int L = vector<A>::lanes;
  int64_t begin = first_key(a, s, first) / COLS<A> * COLS<A>, keys = last_key(a, s, first + rows - 1) - begin, q0 = s.q0 + first;
  if (keys <= 0) {
    for (int64_t i = q0; i < q0 + rows; i++) zero_row(row_of<T>(a.dq, s.b, h, i), a.dq.d, a.D);
    return;
  }
  const A* q = natural_rows<T>(a.q, s, h, q0, rows, a.D, w.dp, w.q);
  const A* dout = natural_rows<T>(a.dout, s, h, q0, rows, a.Dv, w.dvp, w.dout);
  int64_t n = round_up(keys, L), at = (s.b * a.H + h) * a.M + q0;
  Row<A> row[BWD_QUERIES];
  const A by = A(a.scale * LOG2E);
  bool edge = false;
  for (int64_t r = 0; r < rows; r++) {
    fetch(a.ahead, 3 * AHEAD_LINES);
    double lse = ((lse_t<T>*)a.lse)[at + r] * LOG2E;
    const A* o = natural_rows<T>(a.o, s, h, q0 + r, 1, a.Dv, w.dvp, w.o);
    vec<A> delta = {};
    for (int64_t d = 0; d < w.dvp; d += L) delta += load(o + d) * load(dout + r * w.dvp + d);
    if (lse == -__builtin_inf())  // it sees no key
      row[r] = {A(-lse), 0, 0, 0, 0, by};
    else
      row[r] = {A(lse),
                A(lse - A(lse)),
                A(lanes_sum(delta) - (a.dlse ? ((const lse_t<T>*)a.dlse)[at + r] : 0)),
                first_key(a, s, first + r) - begin,
                last_key(a, s, first + r) - begin,
                by};
    edge |= row[r].lo > 0 || row[r].hi < n;
  }
  exact_product<Rows::exact>(rows, keys, a.D, q, w.dp, w.kt + begin * w.dp, panel, COLS<A> * w.dp, w.s, n);
  exact_product<Rows::exact>(rows, keys, a.Dv, dout, w.dvp, w.vt + begin * w.dvp, panel, COLS<A> * w.dvp, w.ds, n);
  if (a.softcap > 0 || a.bias.data || a.mask.data || a.dropout_p > 0)
    for (int64_t r = 0; r < rows; r++) {
      A dbias_sum;
      general_gradients<A>(a, s, h, first + r, begin, keys, n, row[r], w.s + r * n, w.ds + r * n, dbias_sum);
      if (a.dbias.data && !a.dbias.d) *row_of<A>(a.dbias, s.b, h, first + r) += dbias_sum;
    }
  else if (edge)
    short_gradients<true>(w.s, w.ds, rows, n, row);
  else
    short_gradients<false>(w.s, w.ds, rows, n, row);
  product<Start::add, Rows::transposed>(keys, a.Dv, rows, w.s, n, dout, w.dvp, COLS<A>, w.dv + begin * w.dvp, w.dvp);
  product<Start::add, Rows::transposed>(keys, a.D, rows, w.ds, n, q, w.dp, COLS<A>, w.dk + begin * w.dp, w.dp);
  product<Start::zero, Rows::exact>(rows, a.D, keys, w.ds, n, k + begin * w.dp, w.dp, COLS<A>, w.dq, w.dp);
  for (int64_t r = 0; r < rows; r++) narrow_row(row_of<T>(a.dq, s.b, h, q0 + r), a.dq.d, w.dq + r * w.dp, a.D, A(a.scale));
}

template <class T>
static void short_plan(Attention& a) {
  a.work_bytes = 0, a.scratch_bytes = int64_t(Short<acc_t<T>>(a, nullptr).end);
}

template <class T>
static void short_backward(const Attention& a, const Item& item, char* scratch) {
  using A = acc_t<T>;
  constexpr int64_t L = vector<A>::lanes, PANEL = COLS<A>;
  const Short<A> w(a, scratch);
  const Sequence& s = a.sequences[item.sequence];
  int64_t kv_head = item.head, group = a.group, n = seen_before(s, s.N), wide = round_up(n, L), panel = min(wide, PANEL);
  const auto pack = [&](const View& x, int64_t d, int64_t width, A* copy, A* panels, A* sums) {
    const A* rows = copy;
    if (!s.keys && n == wide)
      rows = natural_rows<T>(x, s, kv_head, s.k0, n, d, width, copy);
    else
      for (int64_t j = 0; j < n; j++) copy_row<T>(row_of<T>(x, s.b, kv_head, s.k0 + position(s, j)), x.d, d, width, copy + j * width);
    if (n < wide) __builtin_memset(copy + n * width, 0, (wide - n) * width * sizeof(A));
    for (int64_t j = 0; j < n; j += PANEL) transpose(rows + j * width, width, min(wide - j, PANEL), width, panels + j * width, panel);
    __builtin_memset(sums, 0, n * width * sizeof(A));
    return rows;
  };
  const A* k = pack(a.k, a.D, w.dp, w.k, w.kt, w.dk);
  pack(a.v, a.Dv, w.dvp, w.v, w.vt, w.dv);
  int64_t queries = min(BWD_QUERIES, SHORT_SCORES / max(wide, 1));
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
    for (int64_t first = 0; first < s.M; first += queries) short_queries<T>(a, w, s, h, first, min(s.M - first, queries), k, panel);
  const auto give = [&](const View& x, int64_t d, const A* sums, int64_t width, A factor) {
    for (int64_t j = 0; j < s.rows; j++)
      if (j < s.N && seen_before(s, j + 1) > seen_before(s, j))
        narrow_row(row_of<T>(x, s.b, kv_head, s.k0 + j), x.d, sums + seen_before(s, j) * width, d, factor);
      else
        zero_row(row_of<T>(x, s.b, kv_head, s.k0 + j), x.d, d);
  };
  give(a.dk, a.D, w.dk, w.dp, A(a.scale));
  give(a.dv, a.Dv, w.dv, w.dvp, A(1));
}

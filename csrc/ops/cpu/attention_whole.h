// Short sequences: a task packs key heads itself and takes them from end to end, so that their operands stay in its cache.
constexpr int64_t WHOLE_KEYS = 128;  // and queries: the longest
constexpr int64_t WHOLE_ROWS = 3;    // of fewer queries keys are streamed

static bool whole_forward(const Attention& a) {
  return a.most_keys <= WHOLE_KEYS && a.longest <= WHOLE_KEYS && a.longest * (a.H / a.Hkv) >= WHOLE_ROWS;
}

template <class T>
struct WholeForward : Forward<T> {  // and the operands of a key head
  word_t<T>*kt, *vn;
  char *natural, *end;
  WholeForward(const Sizes<T>& z, char* scratch) : Forward<T>(z, scratch) {
    Pieces p{Forward<T>::end};
    kt = p.take<word_t<T>>(WHOLE_KEYS * z.dw), vn = p.take<word_t<T>>(WHOLE_KEYS / operand<T>::pack * z.dvp);
    natural = p.take<char>(WHOLE_KEYS * max(z.dw, z.dvw) * sizeof(word_t<T>));
    end = p.next;
  }
};

template <class T>
static void whole_forward_plan(Attention& a) {
  a.tasks = (a.count * a.Hkv + a.whole - 1) / a.whole;
  a.scratch_bytes = WholeForward<T>(Sizes<T>(a), nullptr).end - (char*)nullptr;
}

template <class T>
static void whole_forward_task(const Attention& a, int64_t task, char* scratch) {
  Sizes<T> z(a);
  WholeForward<T> w(z, scratch);
  int64_t group = a.H / a.Hkv;
  for (int64_t i = task * a.whole; i < min((task + 1) * a.whole, a.count * a.Hkv); i++) {
    const Sequence& s = a.sequences[i / a.Hkv];
    int64_t kv_head = i % a.Hkv, n = seen_before(s, s.N);
    pack_keys<T>(a.k, s, kv_head, 0, n, a.D, w.kt, nullptr, 0, w.natural);
    pack_keys<T>(a.v, s, kv_head, 0, n, a.Dv, nullptr, w.vn, z.dvp, w.natural);
    for (int64_t h = kv_head * group; h < (a.fold ? kv_head * group + 1 : (kv_head + 1) * group); h++)
      for (int64_t row = 0; row < s.M; row += QUERIES) {
        const Block block(a, s, h, row / QUERIES);
        forward_block<T>(a, z, w, block, 0, w.kt, w.vn);
        write_rows(a, z, block, w);
        if (a.fold) break;
      }
  }
}

// The backward needs no turns then. It computes in the dtype of the arithmetic, where of the five products' operands only two, k and v,
// have to be transposed:
//   s = q kt, dp = do vt, dv += p^T do, dk += ds^T q, dq = ds k: rows of numbers to broadcast (^T: columns), and rows of registers.

template <class T>
constexpr int64_t whole_keys = operand<T>::pack == 1 ? KEYS : 32;  // 16-bit products are twice as fast in pairs
constexpr int64_t WHOLE_SCORES = 48 * KEYS;                        // of a step: 24 kB

template <class T>
static bool whole_backward(const Attention& a) {
  return a.most_keys <= whole_keys<T> && a.longest <= whole_keys<T> && !a.every_b && !a.every_h;
}

template <class A>
struct Whole {
  A *k, *v, *kt, *vt, *dk, *dv, *q, *dout, *dq, *s, *ds, *o;
  int64_t dp, dvp;
  char* end;
  Whole(const Attention& a, char* scratch) : dp(round_up(a.D, vector<A>::lanes)), dvp(round_up(a.Dv, vector<A>::lanes)) {
    constexpr int64_t rows = KEYS + ROWS;
    Pieces p{scratch};
    k = p.take<A>(rows * dp), v = p.take<A>(rows * dvp), kt = p.take<A>(rows * dp), vt = p.take<A>(rows * dvp);
    dk = p.take<A>(rows * dp), dv = p.take<A>(rows * dvp);
    q = p.take<A>(rows * dp), dout = p.take<A>(rows * dvp), dq = p.take<A>(rows * dp);
    s = p.take<A>(WHOLE_SCORES + COLS<A>), ds = p.take<A>(WHOLE_SCORES + COLS<A>), o = p.take<A>(dvp);
    end = p.next;
  }
};

// Rows of n elements, in registers filled up with zeros; from(i) tells where row i lies.
template <class T, class A, class F>
INLINE void whole_rows(A* to, int64_t width, F from, int64_t stride, int64_t n, int64_t rows) {
  for (int64_t i = 0; i < rows; i++) {
    widen_row(to + i * width, from(i), stride, n);
    for (int64_t d = n; d < width; d++) to[i * width + d] = 0;
  }
}

template <bool edge, class A>
static void whole_gradients(A* s, A* ds, int64_t ld, int64_t rows, int64_t n, A scale, const Row<A>* row) {
  constexpr int L = vector<A>::lanes;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < n; j += L) {
      vec<A> x = load(s + r * ld + j), y = load(ds + r * ld + j);
      gradients<edge>(x, y, splat(scale), row[r], j);
      store(s + r * ld + j, x), store(ds + r * ld + j, y);
    }
}

// What the queries first to first + rows - 1 of a head add to dk and dv, and their dq.
template <class T, class A>
static void whole_queries(const Attention& a, const Whole<A>& w, const Sequence& s, int64_t h, int64_t first, int64_t rows,
                          int64_t all_keys, int64_t panel) {
  constexpr int L = vector<A>::lanes;
  int64_t begin = first_key(a, s, first) / COLS<A> * COLS<A>, end = last_key(a, s, first + rows - 1), keys = end - begin;
  if (keys <= 0) {
    for (int64_t i = first; i < first + rows; i++) zero_row(row_of<T>(a.dq, s.b, h, s.q0 + i), a.dq.d, a.D);
    return;
  }
  // dk and dv are computed in tiles of rows: what those get that are no keys is nothing, or counts for nothing
  int64_t n = round_up(end < all_keys ? round_up(keys, ROWS) : keys, L), ld = n, at = (s.b * a.H + h) * a.M + s.q0 + first;
  whole_rows<T>(w.q, w.dp, [&](int64_t i) { return row_of<T>(a.q, s.b, h, s.q0 + first + i); }, a.q.d, a.D, rows);
  whole_rows<T>(w.dout, w.dvp, [&](int64_t i) { return row_of<T>(a.dout, s.b, h, s.q0 + first + i); }, a.dout.d, a.Dv, rows);
  Row<A> row[BWD_QUERIES];
  bool edge = false;
  for (int64_t r = 0; r < rows; r++) {
    double lse = ((lse_t<T>*)a.lse)[at + r] * LOG2E;
    whole_rows<T>(w.o, w.dvp, [&](int64_t) { return row_of<T>(a.o, s.b, h, s.q0 + first + r); }, a.o.d, a.Dv, 1);
    vec<A> delta = {};
    for (int64_t d = 0; d < w.dvp; d += L) delta += load(w.o + d) * load(w.dout + r * w.dvp + d);
    if (lse == -__builtin_inf())  // it sees no key
      row[r] = {A(-lse), 0, 0, 0, 0};
    else
      row[r] = {A(lse), A(lse - A(lse)), A(lanes_sum(delta) - (a.dlse ? ((const lse_t<T>*)a.dlse)[at + r] : 0)),
                first_key(a, s, first + r) - begin, last_key(a, s, first + r) - begin};
    edge |= row[r].lo > 0 || row[r].hi < n;
  }
  exact_product(rows, keys, a.D, w.q, w.dp, w.kt + begin * w.dp, panel, COLS<A> * w.dp, w.s, ld);
  exact_product(rows, keys, a.Dv, w.dout, w.dvp, w.vt + begin * w.dvp, panel, COLS<A> * w.dvp, w.ds, ld);
  if (a.softcap > 0 || a.bias.data || a.mask.data || a.dropout_p > 0)
    for (int64_t r = 0; r < rows; r++) {
      A dbias_sum;
      general_gradients<A>(a, s, h, first + r, begin, keys, n, row[r], w.s + r * ld, w.ds + r * ld, dbias_sum);
      if (a.dbias.data && !a.dbias.d) *row_of<A>(a.dbias, s.b, h, first + r) += dbias_sum;
    }
  else if (edge)
    whole_gradients<true>(w.s, w.ds, ld, rows, n, A(a.scale * LOG2E), row);
  else
    whole_gradients<false>(w.s, w.ds, ld, rows, n, A(a.scale * LOG2E), row);
  product<Start::add, true>(keys, a.Dv, rows, w.s, ld, w.dout, w.dvp, COLS<A>, w.dv + begin * w.dvp, w.dvp);
  product<Start::add, true>(keys, a.D, rows, w.ds, ld, w.q, w.dp, COLS<A>, w.dk + begin * w.dp, w.dp);
  product<Start::zero>(rows, a.D, keys, w.ds, ld, w.k + begin * w.dp, w.dp, COLS<A>, w.dq, w.dp);
  for (int64_t r = 0; r < rows; r++) narrow_row(row_of<T>(a.dq, s.b, h, s.q0 + first + r), a.dq.d, w.dq + r * w.dp, a.D, A(a.scale));
}

template <class T>
static void whole_backward_plan(Attention& a) {
  a.tasks = (a.count * a.Hkv + a.whole - 1) / a.whole;
  a.scratch_bytes = Whole<acc_t<T>>(a, nullptr).end - (char*)nullptr;
}

template <class T>
static void whole_backward_task(const Attention& a, int64_t task, char* scratch) {
  using A = acc_t<T>;
  constexpr int64_t L = vector<A>::lanes, PANEL = COLS<A>;
  const Whole<A> w(a, scratch);
  int64_t group = a.H / a.Hkv;
  for (int64_t i = task * a.whole; i < min((task + 1) * a.whole, a.count * a.Hkv); i++) {
    const Sequence& s = a.sequences[i / a.Hkv];
    int64_t kv_head = i % a.Hkv, n = seen_before(s, s.N), wide = round_up(n, L), panel = min(wide, PANEL);
    const auto pack = [&](const View& x, int64_t d, int64_t width, A* rows, A* panels, A* sums) {
      whole_rows<T>(rows, width, [&](int64_t j) { return row_of<T>(x, s.b, kv_head, s.k0 + position(s, j)); }, x.d, d, n);
      __builtin_memset(rows + n * width, 0, (wide - n) * width * sizeof(A));
      for (int64_t j = 0; j < n; j += PANEL) transpose(rows + j * width, width, min(wide - j, PANEL), width, panels + j * width, panel);
      __builtin_memset(sums, 0, n * width * sizeof(A));
    };
    pack(a.k, a.D, w.dp, w.k, w.kt, w.dk);
    pack(a.v, a.Dv, w.dvp, w.v, w.vt, w.dv);
    int64_t queries = min(BWD_QUERIES, WHOLE_SCORES / max(wide, 1) / ROWS * ROWS);
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
      for (int64_t first = 0; first < s.M; first += queries) whole_queries<T>(a, w, s, h, first, min(s.M - first, queries), n, panel);
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
}

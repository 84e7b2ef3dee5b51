// The backward of attention, in five products a tile. A task owns BWD_KEYS keys of a key head and streams the queries past them, so that
// dk and dv stay with it. dq is added up over the tasks of a head in the order of their keys: each waits for its turn at a block of
// queries, so the sum is the same for any number of threads. Tasks start in that order, so whoever is waited for is under way. Where one
// task takes a head whole, it runs these blocks in the same order.

constexpr int64_t BWD_KEYS = 64;     // keys of a task
constexpr int64_t BWD_QUERIES = 96;  // queries of a step

template <class T>
struct Backward {
  word_t<T>*q, *dout, *pairs_p, *pairs_ds;
  acc_t<T>*s, *ds, *dkt, *dvt, *back;
  char* end;
  Backward(const Sizes<T>& z, char* scratch) {
    Pieces p{scratch};
    q = p.take<word_t<T>>(BWD_QUERIES * z.dw), dout = p.take<word_t<T>>(BWD_QUERIES * z.dvw);
    s = p.take<acc_t<T>>(BWD_QUERIES * BWD_KEYS), ds = p.take<acc_t<T>>(BWD_QUERIES * BWD_KEYS);
    if (operand<T>::pack == 1) {
      pairs_p = (word_t<T>*)s, pairs_ds = (word_t<T>*)ds;  // a word is one element: natural rows are rows of a b operand
    } else {
      pairs_p = p.take<word_t<T>>(BWD_QUERIES / operand<T>::pack * BWD_KEYS);
      pairs_ds = p.take<word_t<T>>(BWD_QUERIES / operand<T>::pack * BWD_KEYS);
    }
    dkt = p.take<acc_t<T>>(z.d6 * BWD_KEYS), dvt = p.take<acc_t<T>>(z.dv6 * BWD_KEYS);
    back = p.take<acc_t<T>>(BWD_KEYS * max(z.d6, z.dv6));
    end = p.next;
  }
};

template <class T>
static void backward_plan(Attention& a) {
  using W = word_t<T>;
  using A = acc_t<T>;
  constexpr int PACK = operand<T>::pack;
  Sizes<T> z(a);
  int64_t keys = (a.local ? 1 : a.Hkv) * a.slots, queries = (a.local ? a.group : a.H) * a.q_slots;
  Pieces p{nullptr};
  a.kt = (int64_t)p.take<W>(keys * z.dw), a.vt = (int64_t)p.take<W>(keys * z.dvw), a.kn = (int64_t)p.take<W>(keys / PACK * z.dp);
  a.qt = (int64_t)p.take<W>(queries / PACK * z.d6), a.dot = (int64_t)p.take<W>(queries / PACK * z.dv6);
  a.dq32 = (int64_t)p.take<A>(queries * z.dp), a.delta = (int64_t)p.take<A>(queries);
  a.turn = (int64_t)p.take<int64_t>(a.all_turns);
  a.work_bytes = (int64_t)p.next;
  int64_t natural = max(KEYS, BWD_QUERIES) * max(z.dw, z.dvw) * sizeof(W), task = int64_t(Backward<T>(z, nullptr).end);
  a.scratch_bytes = max(natural, task);
}

template <class T>
INLINE void zero_row(T* row, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) row[i * stride] = T{};
}

// Keys of a chunk: packed three ways; a key that nobody sees gets zero gradients.
template <class T>
static void backward_pack_keys(const Attention& a, const Item& chunk, char* scratch) {
  Sizes<T> z(a);
  const Sequence& s = a.sequences[chunk.sequence];
  int64_t h = chunk.head, first = chunk.block * KEYS;
  int64_t begin = first_key(a, s, 0), end = s.M ? last_key(a, s, s.M - 1) : 0;  // what any query sees
  int64_t n = min(seen_before(s, s.N) - first, KEYS);
  if (n > 0 && first < end && first + n > begin) {
    pack_keys<T>(a.k, s, h, first, n, a.D, panels_of<T>(a, a.kt, s, h, z.dw), rows_of<T>(a, a.kn, s, h, z.dp), z.dp, scratch);
    pack_keys<T>(a.v, s, h, first, n, a.Dv, panels_of<T>(a, a.vt, s, h, z.dvw), nullptr, 0, scratch);
  }
  for (int64_t j = first; j < min(first + KEYS, s.rows); j++) {
    int64_t packed = j < s.N ? seen_before(s, j) : end;
    if (packed >= begin && packed < end && seen_before(s, j + 1) > packed) continue;
    zero_row(row_of<T>(a.dk, s.b, h, s.k0 + j), a.dk.d, a.D);
    zero_row(row_of<T>(a.dv, s.b, h, s.k0 + j), a.dv.d, a.Dv);
  }
}

// delta = sum(do * o) - dlse of a query.
template <class T>
INLINE acc_t<T> delta_of(const Attention& a, int64_t b, int64_t h, int64_t i) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  A x[256 + L], y[256 + L];
  for (int64_t j = a.Dv / L * L; j < round_up(a.Dv, L); j++) x[j] = y[j] = 0;
  widen_row(x, row_of<T>(a.dout, b, h, i), a.dout.d, a.Dv);
  widen_row(y, row_of<T>(a.o, b, h, i), a.o.d, a.Dv);
  vec<A> sum = {};
  for (int64_t j = 0; j < a.Dv; j += L) sum += load(x + j) * load(y + j);
  return A(lanes_sum(sum) - (a.dlse ? ((const lse_t<T>*)a.dlse)[(b * a.H + h) * a.M + i] : 0));
}

// -sum(p_sink * delta): a sink is a key whose value is 0, so only lse knows it.
template <class T>
static void sinks_grad(const Attention& a, const Item& item, char*) {
  using A = acc_t<T>;
  const double sink = double(((const A*)a.sinks)[item.head]);
  double sum = 0;
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t i = 0; i < a.M; i++) {
      const double lse = double(((const lse_t<T>*)a.lse)[(b * a.H + item.head) * a.M + i]);
      if (lse != -__builtin_inf()) sum -= __builtin_exp(sink < lse ? sink - lse : 0) * double(delta_of<T>(a, b, item.head, i));
    }
  ((A*)a.dsinks)[item.head] = A(sum);
}

// Queries of a block: q and do transposed, delta per row; a block that sees no key gets its zero dq here.
template <class T>
static void backward_pack_queries(const Attention& a, const Item& block, char* scratch) {
  using W = word_t<T>;
  using A = acc_t<T>;
  constexpr int PACK = operand<T>::pack;
  Sizes<T> z(a);
  const Sequence& s = a.sequences[block.sequence];
  int64_t i0 = block.block * BWD_QUERIES, rows = min(s.M - i0, BWD_QUERIES), q0 = s.q0 + i0, mw = words<T>(round_up(s.M, ROWS));
  int64_t h = block.head, slot = query_slot(a, s, h);
  if (first_key(a, s, i0) >= last_key(a, s, i0 + rows - 1)) {
    for (int64_t i = 0; i < rows; i++) zero_row(row_of<T>(a.dq, s.b, h, q0 + i), a.dq.d, a.D);
    return;
  }
  W* natural = (W*)scratch;
  auto pack = [&](const View& x, int64_t d, int64_t d6, int64_t at) {  // natural rows -> rows of two queries -> [d][word of query]
    W* to = (W*)(a.work + at) + slot / PACK * d6 + i0 / PACK;
    int64_t dw = words<T>(d), n = words<T>(rows);
    pack_rows<T>(natural, dw, [&](int64_t i) { return row_of<T>(x, s.b, h, q0 + i); }, x.d, d, rows, PACK);
#if LEVEL_BF16_DOT
    if constexpr (PACK == 2) {
      W pairs[vector<W>::lanes * 256];
      for (int64_t i = 0; i < n; i += vector<W>::lanes) {
        int64_t m = min(n - i, vector<W>::lanes);
        for (int64_t r = 0; r < m; r++) interleave(pairs + r * d, natural + 2 * (i + r) * dw, natural + (2 * (i + r) + 1) * dw, d);
        transpose(pairs, d, m, d, to + i, mw);
      }
    } else
#endif
      transpose(natural, dw, n, d, to, mw);
    for (int64_t i = d; i < d6; i++) __builtin_memset(to + i * mw, 0, n * sizeof(W));
  };
  pack(a.q, a.D, z.d6, a.qt);
  pack(a.dout, a.Dv, z.dv6, a.dot);

  A* delta = (A*)(a.work + a.delta) + slot + i0;
  for (int64_t i = 0; i < rows; i++) delta[i] = delta_of<T>(a, s.b, h, q0 + i);
}

template <class A>
struct Row {        // of a tile
  A lse, lse_rest;  // in log2 units, their sum
  A delta;
  int64_t lo, hi;  // the columns that it sees
  A by;            // what its scores are multiplied by to be in log2 units
};

// Scores that the forward has rounded before it subtracted from them are rounded here, too.
template <class A>
INLINE void round_huge(Row<A>& row, A* s, int64_t n) {
  if (!(row.lse > HUGE_SCORE || row.lse < -HUGE_SCORE)) return;
  for (int64_t j = 0; j < n; j += vector<A>::lanes) store(s + j, load(s + j) * splat(row.by));
  row.by = 1;
}

// Where a row sees a column: all bits set.
template <class A>
INLINE auto seen_columns(const Row<A>& row, int64_t column) {
  auto at = lane_numbers<A>() + splat(lane_t<A>(column));
  return (at >= splat(lane_t<A>(row.lo))) & (at < splat(lane_t<A>(row.hi)));
}
template <class A, class M>
INLINE vec<A> where(M seen, vec<A> x) {
  return (vec<A>)((M)x & seen);
}

// At most 1: an lse of -1e9 in fp32 may be off by 64. In this order NaN stays.
template <class V>
INLINE V probability(V log_p) {
  return exp2(min(V{}, log_p));
}

// p and ds: x = s in, p out; y = do v.T in, ds out.
template <bool edge, class A>
INLINE void gradients(vec<A>& x, vec<A>& y, const Row<A>& row, int64_t column) {
  vec<A> p = probability(x * splat(row.by) - splat(row.lse) - splat(row.lse_rest)), ds = p * (y - splat(row.delta));
  if constexpr (edge) {
    auto seen = seen_columns(row, column);
    p = where<A>(seen, p), ds = where<A>(seen, ds);
  }
  x = p, y = ds;
}

// The same for a row with softcap, bias, mask or dropout; and what it adds to dbias.
template <class T>
static void general_gradients(const Attention& a, const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t keys, int64_t n,
                              Row<acc_t<T>>& row, acc_t<T>* x, acc_t<T>* y, acc_t<T>& dbias_sum) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  A slopes[KEYS], z[KEYS], dbias[KEYS];
  lane_t<A> shown[KEYS];
  bool cap = a.softcap > 0, drop = a.dropout_p > 0;
  if (cap || a.bias.data)
    curve_row(a, s, h, i, j0, keys, row.by, x, cap ? slopes : nullptr), row.by = 1;
  else
    round_huge(row, x, n);
  if (a.mask.data) for_row<const char>(a.mask, s, h, i, j0, keys, [&](int64_t j, const char* seen) { shown[j] = *seen ? -1 : 0; });
  if (drop) drop_row(a, s, h, i, j0, keys, z);
  vec<A> sum = {};
  for (int64_t j = 0; j < n; j += L) {
    vec<A> dp = load(y + j);
    auto seen = seen_columns(row, j);
    if (a.mask.data) seen &= load(shown + j);
    vec<A> p = where<A>(seen, probability(load(x + j) * splat(row.by) - splat(row.lse) - splat(row.lse_rest)));
    vec<A> kept = drop ? load(z + j) : splat(A(1));
    vec<A> ds = where<A>(seen, p * (dp * kept - splat(row.delta)));
    store(dbias + j, ds), sum += ds;
    store(x + j, where<A>(seen, p * kept)), store(y + j, cap ? where<A>(seen, ds * load(slopes + j)) : ds);
  }
  dbias_sum = lanes_sum(sum);
  if (!a.dbias.data || !a.dbias.d) return;
  if (a.dbias.row)
    for_row<A>(a.dbias, s, h, i, j0, keys, [&](int64_t j, A* to) { *to += dbias[j]; });
  else
    for_row<double>(a.dbias, s, h, i, j0, keys, [&](int64_t j, double* to) { *to += double(dbias[j]); });
}

enum class Mode { whole, edge, done };  // every column is seen; some are; p and ds are there already

template <class T, Mode mode>
static void gradient_rows(const Backward<T>& w, int64_t rows, int64_t n, const Row<acc_t<T>>* row) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes, PACK = operand<T>::pack;
  for (int64_t i = 0; i < rows; i += PACK)
    for (int64_t j = 0; j < n; j += PACK * L) {
      vec<A> p[PACK][PACK], ds[PACK][PACK];  // [row][register]
#pragma GCC unroll 2
      for (int r = 0; r < PACK; r++)
#pragma GCC unroll 2
        for (int c = 0; c < PACK; c++) {
          p[r][c] = load(w.s + (i + r) * BWD_KEYS + j + c * L), ds[r][c] = load(w.ds + (i + r) * BWD_KEYS + j + c * L);
          if constexpr (mode != Mode::done) gradients<mode == Mode::edge>(p[r][c], ds[r][c], row[i + r], j + c * L);
        }
#if LEVEL_BF16_DOT
      if constexpr (PACK == 2) {
        for (int c = 0; c < 2; c++) {  // word j of a pair of rows: element j of both
          store(w.pairs_p + i / 2 * BWD_KEYS + j + c * L, interleave(p[0][c], p[1][c]));
          store(w.pairs_ds + i / 2 * BWD_KEYS + j + c * L, interleave(ds[0][c], ds[1][c]));
        }
      } else
#endif
        store((A*)w.pairs_p + i * BWD_KEYS + j, p[0][0]);
      for (int r = 0; r < PACK; r++) pack_scores<T>((word_t<T>*)w.ds + (i + r) * BWD_KEYS, j, ds[r]);
    }
}

// dk and dv of a block of keys of one sequence and key head.
template <class T>
static void backward_keys(const Attention& a, const Sequence& s, int64_t kv_head, int64_t block, char* scratch) {
  using W = word_t<T>;
  using A = acc_t<T>;
  constexpr int PACK = operand<T>::pack;
  Sizes<T> z(a);
  Backward<T> w(z, scratch);
  int64_t j0 = block * BWD_KEYS, seen = s.M ? last_key(a, s, s.M - 1) : 0;
  int64_t keys = min(seen - j0, BWD_KEYS), n = round_up(keys, PACK * vector<A>::lanes);
  if (keys <= 0 || j0 + keys <= first_key(a, s, 0)) return;
  const W *kt = panels_of<T>(a, a.kt, s, kv_head, z.dw) + j0 * z.dw, *vt = panels_of<T>(a, a.vt, s, kv_head, z.dvw) + j0 * z.dvw;
  const W* kn = rows_of<T>(a, a.kn, s, kv_head, z.dp) + j0 / PACK * z.dp;
  int64_t blocks = (s.M + BWD_QUERIES - 1) / BWD_QUERIES, group = a.group, mw = words<T>(round_up(s.M, ROWS));
  bool general = a.softcap > 0 || a.bias.data || a.mask.data || a.dropout_p > 0;
  __builtin_memset(w.dkt, 0, z.d6 * BWD_KEYS * sizeof(A));
  __builtin_memset(w.dvt, 0, z.dv6 * BWD_KEYS * sizeof(A));

  for (int64_t g = 0; g < group; g++) {
    int64_t h = kv_head * group + g, head = s.b * a.H + h, slot = query_slot(a, s, h);
    const W *qt = (W*)(a.work + a.qt) + slot / PACK * z.d6, *dot = (W*)(a.work + a.dot) + slot / PACK * z.dv6;
    for (int64_t iq = 0; iq < blocks; iq++) {
      int64_t first = iq * BWD_QUERIES, last = min(first + BWD_QUERIES, s.M), begin = first_key(a, s, first),
              end = last_key(a, s, last - 1);
      if (begin >= end || end <= j0 || begin >= j0 + BWD_KEYS) continue;
      bool starts = block == begin / BWD_KEYS, ends = end <= j0 + BWD_KEYS;  // the first, the last task that adds to this dq
      int64_t i0 = first, i1 = last;                                         // without the rows at both ends that see none of these keys
      while (i0 + ROWS < i1 && last_key(a, s, i0 + ROWS - 1) <= j0) i0 += ROWS;
      while (i1 - ROWS > i0 && first_key(a, s, i0 + (i1 - i0 - 1) / ROWS * ROWS) >= j0 + BWD_KEYS) i1 = i0 + (i1 - i0 - 1) / ROWS * ROWS;
      int64_t rows = i1 - i0;
      const auto natural = [&](const View& x, int64_t d, W* copy) {
        const T* from = row_of<T>(x, s.b, h, s.q0 + i0);
        if (rows % ROWS == 0 && lie_packed<T>(x, d)) return (const W*)from;
        pack_rows<T>(copy, words<T>(d), [&](int64_t i) { return from + i * x.row; }, x.d, d, rows, ROWS);
        return (const W*)copy;
      };
      // On the diagonal six rows go as far as some of them see; the first `low` rows see none of the second half of the keys. What is
      // left out stays whatever it was, and counts as not seen.
      const auto reach = [&](int64_t r) { return min(last_key(a, s, i0 + min(r, rows - 1)) - j0, keys); };
      const int64_t step = reach(0) < keys ? ROWS : rows;
      int64_t low = 0;
      while (low + PACK <= rows && reach(low + PACK - 1) <= BWD_KEYS / 2) low += PACK;
      const int64_t part = low ? BWD_KEYS / 2 : keys;
      const auto scores = [&](const W* x, int64_t dw, const W* panels, A* to) {
        for (int64_t r = 0; r < rows; r += step)
          exact_product(min(step, rows - r), reach(r + step - 1), dw, x + r * dw, dw, panels, COLS<A>, COLS<A> * dw, to + r * BWD_KEYS,
                        BWD_KEYS);
      };
      scores(natural(a.q, a.D, w.q), z.dw, kt, w.s);
      scores(natural(a.dout, a.Dv, w.dout), z.dvw, vt, w.ds);

      Row<A> row[BWD_QUERIES];
      A dbias_sum[BWD_QUERIES];
      const A by = A(a.scale * LOG2E);
      bool edge = rows % PACK;
      for (int64_t r = 0; r < round_up(rows, PACK); r++) {  // no such query, or one that sees no key: p = 0
        fetch(a.ahead, AHEAD_LINES);
        int64_t at = head * a.M + s.q0 + i0 + r;
        double lse = r < rows ? ((lse_t<T>*)a.lse)[at] * LOG2E : -__builtin_inf();
        if (lse == -__builtin_inf())
          row[r] = {A(-lse), 0, 0, 0, 0, by};
        else
          row[r] = {A(lse),
                    A(lse - A(lse)),
                    ((A*)(a.work + a.delta))[slot + i0 + r],
                    max(first_key(a, s, i0 + r) - j0, 0),
                    min(last_key(a, s, i0 + r) - j0, keys),
                    by};
        edge |= row[r].lo > 0 || row[r].hi < n;
        if (!general) round_huge(row[r], w.s + r * BWD_KEYS, n);
      }
      if (general) {
        for (int64_t r = 0; r < round_up(rows, PACK); r++)
          general_gradients<T>(a, s, h, min(i0 + r, s.M - 1), j0, keys, n, row[r], w.s + r * BWD_KEYS, w.ds + r * BWD_KEYS, dbias_sum[r]);
        gradient_rows<T, Mode::done>(w, rows, n, row);
      } else if (edge) {
        gradient_rows<T, Mode::edge>(w, rows, n, row);
      } else {
        gradient_rows<T, Mode::whole>(w, rows, n, row);
      }
      const auto add = [&](int64_t d, const W* x, const W* pairs, A* to) {
        for (int64_t j = 0, r = 0; j < keys; j += part, r = low)
          product<Start::add>(d, min(keys - j, part), words<T>(rows - r), x + (i0 + r) / PACK, mw, pairs + r / PACK * BWD_KEYS + j,
                              BWD_KEYS, COLS<A>, to + j, BWD_KEYS);
      };
      add(a.Dv, dot, w.pairs_p, w.dvt);
      add(a.D, qt, w.pairs_ds, w.dkt);

      int64_t* turn = a.local ? nullptr : (int64_t*)(a.work + a.turn) + s.turns + h * blocks + iq;
      while (turn && __atomic_load_n(turn, __ATOMIC_ACQUIRE) != block - begin / BWD_KEYS) a.yield();
      A *dq = (A*)(a.work + a.dq32) + (slot + first) * z.dp, *to = dq + (i0 - first) * z.dp;
      const bool fresh = starts && rows == last - first;
      if (starts && !fresh) __builtin_memset(dq, 0, (last - first) * z.dp * sizeof(A));
      for (int64_t r = 0; r < rows; r += step) {
        const int64_t many = min(step, rows - r), steps = words<T>(reach(r + step - 1));
        const W* ds = (W*)w.ds + r * BWD_KEYS;
        if (fresh)
          product<Start::zero>(many, a.D, steps, ds, BWD_KEYS, kn, z.dp, COLS<A>, to + r * z.dp, z.dp);
        else
          product<Start::add>(many, a.D, steps, ds, BWD_KEYS, kn, z.dp, COLS<A>, to + r * z.dp, z.dp);
      }
      if (a.dbias.data && !a.dbias.d)
        for (int64_t r = 0; r < rows; r++) *row_of<A>(a.dbias, s.b, h, i0 + r) += dbias_sum[r];
      if (ends)
        for (int64_t i = first; i < last; i++)
          narrow_row(row_of<T>(a.dq, s.b, h, s.q0 + i), a.dq.d, dq + (i - first) * z.dp, a.D, A(a.scale));
      if (turn) __atomic_store_n(turn, block - begin / BWD_KEYS + 1, __ATOMIC_RELEASE);
    }
  }

  auto give = [&](const View& x, const A* transposed, int64_t d, A factor) {
    transpose(transposed, BWD_KEYS, d, keys, w.back, d);
    for (int64_t j = 0; j < keys; j++) narrow_row(row_of<T>(x, s.b, kv_head, s.k0 + position(s, j0 + j)), x.d, w.back + j * d, d, factor);
  };
  give(a.dk, w.dkt, a.D, A(a.scale));
  give(a.dv, w.dvt, a.Dv, A(1));
}

// Tasks that share rows of dbias would add to them in any order: there one task takes all of their heads or batch entries.
template <class T>
static void backward_task(const Attention& a, const Item& item, char* scratch) {
  for (int64_t b = item.sequence; b < (a.every_b ? a.count : item.sequence + 1); b++)
    for (int64_t h = item.head; h < (a.every_h ? a.Hkv : item.head + 1); h++) backward_keys<T>(a, a.sequences[b], h, item.block, scratch);
}

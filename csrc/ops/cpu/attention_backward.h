// The backward of attention, in five products a tile. A task owns BWD_KEYS keys of a key head and streams the queries past them, so that
// dk and dv stay with it. dq is added up over the tasks of a head in the order of their keys: each waits for its turn at a block of
// queries, so the sum is the same for any number of threads. Tasks start in that order, so whoever is waited for is under way.

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
    back = p.take<acc_t<T>>(BWD_KEYS * (z.d6 > z.dv6 ? z.d6 : z.dv6));
    end = p.next;
  }
};

template <class T>
static void backward_plan(Attention& a) {
  using W = word_t<T>;
  using A = acc_t<T>;
  Sizes<T> z(a);
  int64_t heads = a.B * a.H, kv_heads = a.B * a.Hkv, blocks = (a.M + BWD_QUERIES - 1) / BWD_QUERIES;
  Pieces p{nullptr};
  a.kt = (int64_t)p.take<W>(kv_heads * z.keys * z.dw), a.vt = (int64_t)p.take<W>(kv_heads * z.keys * z.dvw);
  a.kn = (int64_t)p.take<W>(kv_heads * words<T>(z.keys) * z.dp);
  a.qt = (int64_t)p.take<W>(heads * z.d6 * z.mw), a.dot = (int64_t)p.take<W>(heads * z.dv6 * z.mw);
  a.dq32 = (int64_t)p.take<A>(heads * round_up(a.M, ROWS) * z.dp), a.delta = (int64_t)p.take<A>(heads * a.M);
  a.turns = heads * blocks, a.turn = (int64_t)p.take<int64_t>(a.turns);
  a.work_bytes = (int64_t)p.next;
  int64_t width = z.dw > z.dvw ? z.dw : z.dvw, rows = KEYS > BWD_QUERIES ? KEYS : BWD_QUERIES;
  int64_t natural = rows * width * sizeof(W), task = Backward<T>(z, nullptr).end - (char*)nullptr;
  a.scratch_bytes = natural > task ? natural : task;
  a.pack_tasks = kv_heads * ((a.N + KEYS - 1) / KEYS) + heads * blocks;
  a.tasks = kv_heads * ((a.N + BWD_KEYS - 1) / BWD_KEYS);
}

template <class T>
INLINE void zero_row(T* row, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) row[i * stride] = T{};
}

// Keys of a chunk: packed three ways; a key that nobody sees gets zero gradients.
template <class T>
static void backward_pack_keys(const Attention& a, int64_t head, int64_t first, char* scratch) {
  using W = word_t<T>;
  Sizes<T> z(a);
  int64_t b = head / a.Hkv, h = head % a.Hkv;
  const int32_t* seen = a.seen_of(b);
  int64_t n = min(seen[a.N] - first, KEYS);
  if (n > 0) {
    pack_keys<T>(a, a.k, b, h, first, n, a.D, (W*)(a.work + a.kt) + head * z.keys * z.dw,
                 (W*)(a.work + a.kn) + head * words<T>(z.keys) * z.dp, z.dp, scratch);
    pack_keys<T>(a, a.v, b, h, first, n, a.Dv, (W*)(a.work + a.vt) + head * z.keys * z.dvw, nullptr, 0, scratch);
  }
  int64_t reach = limit(a, seen, a.M - 1);  // what the last query sees, the others see a part of
  for (int64_t j = first; j < min(first + KEYS, a.N); j++)
    if (a.M == 0 || seen[j + 1] == seen[j] || seen[j] >= reach) {
      zero_row(row_of<T>(a.dk, b, h, j), a.dk.d, a.D);
      zero_row(row_of<T>(a.dv, b, h, j), a.dv.d, a.Dv);
    }
}

// Queries of a block: q and do transposed, delta = sum(do * o) per row; a block that sees no key gets its zero dq here.
template <class T>
static void backward_pack_queries(const Attention& a, int64_t head, int64_t block, char* scratch) {
  using W = word_t<T>;
  using A = acc_t<T>;
  Sizes<T> z(a);
  int64_t b = head / a.H, h = head % a.H, i0 = block * BWD_QUERIES, rows = min(a.M - i0, BWD_QUERIES);
  constexpr int PACK = operand<T>::pack;
  if (limit(a, a.seen_of(b), i0 + rows - 1) == 0) {
    for (int64_t i = 0; i < rows; i++) zero_row(row_of<T>(a.dq, b, h, i0 + i), a.dq.d, a.D);
    return;
  }
  W* natural = (W*)scratch;
  auto pack = [&](const View& x, int64_t d, int64_t d6, W* to) {  // natural rows -> rows of two queries -> [d][word of query]
    to += head * d6 * z.mw + i0 / PACK;
    int64_t dw = words<T>(d), n = words<T>(rows);
    pack_rows<T>(natural, dw, [&](int64_t i) { return row_of<T>(x, b, h, i0 + i); }, x.d, d, rows, PACK);
#if LEVEL_BF16_DOT
    if constexpr (PACK == 2) {
      W pairs[vector<W>::lanes * 256];
      for (int64_t i = 0; i < n; i += vector<W>::lanes) {
        int64_t m = min(n - i, vector<W>::lanes);
        for (int64_t r = 0; r < m; r++) interleave(pairs + r * d, natural + 2 * (i + r) * dw, natural + (2 * (i + r) + 1) * dw, d);
        transpose(pairs, d, m, d, to + i, z.mw);
      }
    } else
#endif
      transpose(natural, dw, n, d, to, z.mw);
    for (int64_t i = d; i < d6; i++) __builtin_memset(to + i * z.mw, 0, n * sizeof(W));
  };
  pack(a.q, a.D, z.d6, (W*)(a.work + a.qt));
  pack(a.dout, a.Dv, z.dv6, (W*)(a.work + a.dot));

  A* delta = (A*)(a.work + a.delta) + head * a.M + i0;
  constexpr int L = vector<A>::lanes;
  A x[256 + L] = {}, y[256 + L] = {};  // beyond Dv they stay 0
  for (int64_t i = 0; i < rows; i++) {
    widen_row(x, row_of<T>(a.dout, b, h, i0 + i), a.dout.d, a.Dv);
    widen_row(y, row_of<T>(a.o, b, h, i0 + i), a.o.d, a.Dv);
    vec<A> sum = {};
    for (int64_t j = 0; j < a.Dv; j += L) sum += load(x + j) * load(y + j);
    delta[i] = lanes_sum(sum);
  }
}

template <class T>
static void backward_pack(const Attention& a, int64_t task, char* scratch) {
  int64_t kv_heads = a.B * a.Hkv, heads = a.B * a.H, chunks = kv_heads * ((a.N + KEYS - 1) / KEYS);
  if (task < chunks) return backward_pack_keys<T>(a, task % kv_heads, task / kv_heads * KEYS, scratch);
  backward_pack_queries<T>(a, (task - chunks) % heads, (task - chunks) / heads, scratch);
}

template <class A>
struct Row {        // of a tile
  A lse, lse_rest;  // in log2 units, their sum
  A delta;
  int64_t hi;  // how many columns it sees
};

// p and ds: x = s in, p out; y = do v.T in, ds out.
template <bool edge, class A>
INLINE void gradients(vec<A>& x, vec<A>& y, vec<A> scale, const Row<A>& row, int64_t column) {
  vec<A> p = exp2(x * scale - splat(row.lse) - splat(row.lse_rest)), ds = p * (y - splat(row.delta));
  if constexpr (edge) {
    auto at = lane_numbers<A>() < splat(lane_t<A>(row.hi - column));
    p = (vec<A>)((decltype(at))p & at), ds = (vec<A>)((decltype(at))ds & at);
  }
  x = p, y = ds;
}

template <class T, bool edge>
static void gradient_rows(const Backward<T>& w, int64_t rows, int64_t n, acc_t<T> scale, const Row<acc_t<T>>* row) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes, PACK = operand<T>::pack;
  vec<A> by = splat(scale);
  for (int64_t i = 0; i < rows; i += PACK)
    for (int64_t j = 0; j < n; j += PACK * L) {
      vec<A> p[PACK][PACK], ds[PACK][PACK];  // [row][register]
#pragma GCC unroll 2
      for (int r = 0; r < PACK; r++)
#pragma GCC unroll 2
        for (int c = 0; c < PACK; c++) {
          p[r][c] = load(w.s + (i + r) * BWD_KEYS + j + c * L), ds[r][c] = load(w.ds + (i + r) * BWD_KEYS + j + c * L);
          gradients<edge>(p[r][c], ds[r][c], by, row[i + r], j + c * L);
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

template <class T>
static void backward_task(const Attention& a, int64_t task, char* scratch) {
  using W = word_t<T>;
  using A = acc_t<T>;
  constexpr int PACK = operand<T>::pack;
  Sizes<T> z(a);
  Backward<T> w(z, scratch);
  int64_t kv_heads = a.B * a.Hkv, kv_head = task % kv_heads, b = kv_head / a.Hkv, block = task / kv_heads, j0 = block * BWD_KEYS;
  const int32_t *seen = a.seen_of(b), *positions = a.keys_of(b) + j0;
  int64_t keys = min(a.M ? limit(a, seen, a.M - 1) - j0 : 0, BWD_KEYS), n = round_up(keys, PACK * vector<A>::lanes);
  if (keys <= 0) return;
  const W* kt = (W*)(a.work + a.kt) + kv_head * z.keys * z.dw + j0 * z.dw;
  const W* vt = (W*)(a.work + a.vt) + kv_head * z.keys * z.dvw + j0 * z.dvw;
  const W* kn = (W*)(a.work + a.kn) + (kv_head * words<T>(z.keys) + j0 / PACK) * z.dp;
  int64_t blocks = (a.M + BWD_QUERIES - 1) / BWD_QUERIES, group = a.H / a.Hkv;
  __builtin_memset(w.dkt, 0, z.d6 * BWD_KEYS * sizeof(A));
  __builtin_memset(w.dvt, 0, z.dv6 * BWD_KEYS * sizeof(A));

  for (int64_t g = 0; g < group; g++) {
    int64_t h = kv_head % a.Hkv * group + g, head = b * a.H + h;
    const W *qt = (W*)(a.work + a.qt) + head * z.d6 * z.mw, *dot = (W*)(a.work + a.dot) + head * z.dv6 * z.mw;
    for (int64_t iq = 0; iq < blocks; iq++) {
      int64_t i0 = iq * BWD_QUERIES, rows = min(a.M - i0, BWD_QUERIES), end = limit(a, seen, i0 + rows - 1);
      if (end <= j0) continue;
      int64_t skip = 0;  // leading rows that see none of these keys; the first task skips none, it starts the sum
      while (block > 0 && limit(a, seen, i0 + skip + ROWS - 1) <= j0) skip += ROWS;
      i0 += skip, rows -= skip;
      pack_rows<T>(w.q, z.dw, [&](int64_t i) { return row_of<T>(a.q, b, h, i0 + i); }, a.q.d, a.D, rows, ROWS);
      pack_rows<T>(w.dout, z.dvw, [&](int64_t i) { return row_of<T>(a.dout, b, h, i0 + i); }, a.dout.d, a.Dv, rows, ROWS);
      exact_product(rows, keys, z.dw, w.q, z.dw, kt, COLS<A>, COLS<A> * z.dw, w.s, BWD_KEYS);
      exact_product(rows, keys, z.dvw, w.dout, z.dvw, vt, COLS<A>, COLS<A> * z.dvw, w.ds, BWD_KEYS);

      Row<A> row[BWD_QUERIES];
      for (int64_t i = 0; i < round_up(rows, PACK); i++) {  // no such query, or one that sees no key: p = 0
        double lse = i < rows ? ((lse_t<T>*)a.lse)[head * a.M + i0 + i] * LOG2E : -__builtin_inf();
        A delta = i < rows ? ((A*)(a.work + a.delta))[head * a.M + i0 + i] : 0;
        row[i] = lse == -__builtin_inf() ? Row<A>{A(-lse), 0, 0, 0}
                                         : Row<A>{A(lse), A(lse - A(lse)), delta, min(limit(a, seen, i0 + i) - j0, n)};
      }
      if (row[0].hi < n || rows % PACK)
        gradient_rows<T, true>(w, rows, n, A(a.scale * LOG2E), row);
      else
        gradient_rows<T, false>(w, rows, n, A(a.scale * LOG2E), row);

      product<Start::add>(a.Dv, keys, words<T>(rows), dot + i0 / PACK, z.mw, w.pairs_p, BWD_KEYS, COLS<A>, w.dvt, BWD_KEYS);
      product<Start::add>(a.D, keys, words<T>(rows), qt + i0 / PACK, z.mw, w.pairs_ds, BWD_KEYS, COLS<A>, w.dkt, BWD_KEYS);

      int64_t* turn = (int64_t*)(a.work + a.turn) + head * blocks + iq;
      while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != block) a.yield();
      A* dq = (A*)(a.work + a.dq32) + (head * round_up(a.M, ROWS) + i0) * z.dp;
      if (block == 0)
        product<Start::zero>(rows, a.D, words<T>(keys), (W*)w.ds, BWD_KEYS, kn, z.dp, COLS<A>, dq, z.dp);
      else
        product<Start::add>(rows, a.D, words<T>(keys), (W*)w.ds, BWD_KEYS, kn, z.dp, COLS<A>, dq, z.dp);
      if (end <= j0 + BWD_KEYS)  // nobody adds after this
        for (int64_t i = -skip; i < rows; i++) narrow_row(row_of<T>(a.dq, b, h, i0 + i), a.dq.d, dq + i * z.dp, a.D, A(a.scale));
      __atomic_store_n(turn, block + 1, __ATOMIC_RELEASE);
    }
  }

  auto give = [&](const View& x, const A* transposed, int64_t d, A factor) {
    transpose(transposed, BWD_KEYS, d, keys, w.back, d);
    for (int64_t j = 0; j < keys; j++) narrow_row(row_of<T>(x, b, kv_head % a.Hkv, positions[j]), x.d, w.back + j * d, d, factor);
  };
  give(a.dk, w.dkt, a.D, A(a.scale));
  give(a.dv, w.dvt, a.Dv, A(1));
}

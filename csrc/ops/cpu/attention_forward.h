// The forward of attention: a task takes QUERIES queries of a head, and streams the keys past them, STEP at a time. Where queries are few,
// heads that share keys are one task, keys and values are read where they lie, and a block is split over the keys and merged.

constexpr int64_t QUERIES = 48;  // of a task
template <class T>
constexpr int64_t STEP = 128 * operand<T>::pack;  // keys: a tile of probabilities, 24 kB as words of 4 bytes, stays in L1
constexpr int64_t STREAM_ROWS = 8;                // so few queries that packing the keys would take longer than reading them; but for
constexpr int64_t PACKED_ROWS = 3;                // so many queries of a short sequence whose keys
constexpr int64_t PACKED_BYTES = 1 << 14;         // are not more, so that they do not come from memory
constexpr int64_t SPLIT_KEYS = 512;               // the fewest keys that are worth a task of their own
constexpr int64_t SPLIT_TASKS = 64;               // a call of fewer tasks is split over the keys
static_assert(STEP<bfloat16> <= 2 * PACKED_KEYS, "attention_scores.h has room for the bias of a step");

template <class T>
struct Forward {
  word_t<T>* q;
  acc_t<T>*s, *o, *l, *m, *top, *shift, *factor;  // the last four: one a row; l: a register a row, to be summed up at the end
  char* end;
  Forward(const Sizes<T>& z, char* scratch) {
    Pieces p{scratch};
    q = p.take<word_t<T>>(QUERIES * z.dw), s = p.take<acc_t<T>>(QUERIES * STEP<T>), o = p.take<acc_t<T>>(QUERIES * z.dvp);
    l = p.take<acc_t<T>>(QUERIES * vector<acc_t<T>>::lanes), m = p.take<acc_t<T>>(QUERIES), top = p.take<acc_t<T>>(QUERIES);
    shift = p.take<acc_t<T>>(QUERIES), factor = p.take<acc_t<T>>(QUERIES);
    end = p.next;
  }
};

template <class T>
struct Partial {  // what a split leaves of a block: o, m, l
  acc_t<T>*o, *m, *l;
  static int64_t size(const Sizes<T>& z) { return QUERIES * (z.dvp + 2); }
  Partial(const Attention& a, const Sizes<T>& z, const Item& item, int64_t split) {
    int64_t number = ((a.sequences[item.sequence].blocks + item.block) * (a.fold ? a.Hkv : a.H) + item.head) * a.splits + split;
    o = (acc_t<T>*)(a.work + a.partial) + number * size(z), m = o + QUERIES * z.dvp, l = m + QUERIES;
  }
};

// Whether values lie in memory as rows of a b operand do.
template <class T>
INLINE bool values_lie_packed(const Attention& a, const Sequence& s) {
  return operand<T>::pack == 1 && a.Dv % vector<acc_t<T>>::lanes == 0 && lie_packed<T>(a.v, a.Dv) && !s.keys;
}

template <class T>
static void forward_plan(Attention& a) {
  using W = word_t<T>;
  Sizes<T> z(a);
  int64_t heads = a.fold ? a.Hkv : a.H, kv_heads = a.local ? 1 : a.Hkv, rows = a.longest * a.group;
  bool small = a.most_keys <= SHORT && rows >= PACKED_ROWS && a.most_keys * a.D * int64_t(sizeof(T)) <= PACKED_BYTES;
  a.stream = rows <= STREAM_ROWS && a.k.d == 1 && a.v.d == 1 && !small;
  a.splits = 1;
  if (a.blocks * heads < SPLIT_TASKS) a.splits = (SPLIT_TASKS + a.blocks * heads - 1) / max(1, a.blocks * heads);
  a.splits = max(1, min(a.splits, a.most_keys / SPLIT_KEYS));
  Pieces p{nullptr};
  if (!a.stream) {
    a.kt = (int64_t)p.take<W>(kv_heads * a.slots * z.dw);
    a.vn = (int64_t)p.take<W>(kv_heads * a.slots / operand<T>::pack * z.dvp);
  }
  if (a.splits > 1) a.partial = (int64_t)p.take<acc_t<T>>(a.blocks * heads * a.splits * Partial<T>::size(z));
  a.work_bytes = (int64_t)p.next;
  int64_t natural = KEYS * max(z.dw, z.dvw) * sizeof(W), task = int64_t(Forward<T>(z, nullptr).end);
  a.scratch_bytes = max(natural, task);
}

template <class T>
static void forward_pack(const Attention& a, const Item& chunk, char* scratch) {
  Sizes<T> z(a);
  const Sequence& s = a.sequences[chunk.sequence];
  int64_t h = chunk.head, first = chunk.block * KEYS, n = min(seen_before(s, s.N) - first, KEYS);
  if (n <= 0 || first >= last_key(a, s, s.M - 1) || first + n <= first_key(a, s, 0)) return;
  pack_keys<T>(a.k, s, h, first, n, a.D, panels_of<T>(a, a.kt, s, h, z.dw), nullptr, 0, scratch);
  if (!values_lie_packed<T>(a, s)) pack_keys<T>(a.v, s, h, first, n, a.Dv, nullptr, rows_of<T>(a, a.vn, s, h, z.dvp), z.dvp, scratch);
}

constexpr float HUGE_SCORE = 0x1p24f;
template <class A>
constexpr A lowest = std::is_same_v<A, double> ? A(-__DBL_MAX__) : A(-__FLT_MAX__);

// A tile of scores becomes probabilities, in place and as words, relative to the running maxima m (in log2 units): n[i] columns of row i,
// filled up with zeros to whole registers, of which those from lo[i] to hi[i] count. f.factor tells by what each row's earlier sums shrink.
// Loops over all rows, one after the other, so that the latencies of one row's maximum, factor and sum hide behind its neighbours.
// multipliers(i): those of dropout for row i.
template <class T, bool DROP, class F>
INLINE void softmax_rows(const Forward<T>& f, int64_t rows, const int32_t* n, acc_t<T> scale, const int32_t* lo, const int32_t* hi,
                         Ahead* ahead, F multipliers) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes, PACK = operand<T>::pack;
  const A inf = __builtin_inf();
  const vec<lane_t<A>> lanes = lane_numbers<A>();
  for (int64_t i = 0; i < rows; i++) {
    A* s = f.s + i * STEP<T>;
    int64_t end = round_up(n[i], PACK * L), j = 0;
    vec<A> top = splat(-inf);
    const auto cut = [&](int64_t last) {  // in registers: a load of what narrower stores have just written would wait for them
      for (; j < last; j += L) {
        const vec<lane_t<A>> column = lanes + lane_t<A>(j);
        const vec<A> x = ((column >= lane_t<A>(lo[i])) & (column < lane_t<A>(hi[i]))) ? load(s + j) : splat(-inf);
        store(s + j, x), top = max(x, top);
      }
    };
    cut(round_up(lo[i], L));
    for (; j + L <= hi[i]; j += L) top = max(load(s + j), top);
    cut(end);
    f.top[i] = lanes_max(top) * scale;
  }
  for (int64_t i = 0; i < rows; i += L) {
    vec<A> m = load(f.m + i), m_new = max(m, load(f.top + i));
    vec<A> shift = max(m_new, splat(lowest<A>));  // no score above -inf so far: avoid inf - inf
    store(f.factor + i, exp2(m - shift)), store(f.shift + i, shift), store(f.m + i, m_new);
  }
  for (int64_t i = 0; i < rows; i++) {
    A* s = f.s + i * STEP<T>;
    vec<A> sum[PACK] = {}, shift = splat(f.shift[i]), by = splat(scale);
    if (f.shift[i] > HUGE_SCORE || f.shift[i] < -HUGE_SCORE) {  // what rounding made of the shift may be more than exp2 can take, where
      for (int64_t j = 0; j < n[i]; j += L) store(s + j, load(s + j) * by);  // the scores are not rounded alike before it is subtracted
      by = splat(A(1));
    }
    const A* z = DROP ? multipliers(i) : nullptr;
    fetch(ahead, AHEAD_LINES);
    for (int64_t j = 0; j < n[i]; j += PACK * L) {
      vec<A> x[PACK];
#pragma GCC unroll 2
      for (int u = 0; u < PACK; u++) {
        sum[u] += x[u] = exp2(load(s + j + u * L) * by - shift);
        if (DROP) x[u] *= load(z + j + u * L);
      }
      pack_scores<T>((word_t<T>*)s, j, x);
    }
    store(f.l + i * L, load(f.l + i * L) * splat(f.factor[i]) + (PACK == 2 ? sum[0] + sum[PACK - 1] : sum[0]));
  }
}

#include "attention_stream.h"

// The rows of a task: queries of one head, or of all that share a key head, one head after the other.
struct Block {
  const Sequence& s;
  int64_t h, kv_head, row0, rows;  // h: the head, or the first
  bool fold;
  Block(const Attention& a, const Item& item) : s(a.sequences[item.sequence]), fold(a.fold) {
    int64_t group = a.group;
    h = fold ? item.head * group : item.head, kv_head = h / group;
    // The last block is whole: the rows that fill up a tile are among the first, whose keys are the fewest.
    int64_t rest = s.M - (s.M + QUERIES - 1) / QUERIES * QUERIES;
    row0 = max(0, rest + item.block * QUERIES), rows = fold ? s.M * group : rest + (item.block + 1) * QUERIES - row0;
  }
  int64_t head(int64_t r) const { return fold ? h + r / s.M : h; }
  int64_t query(int64_t r) const { return fold ? r % s.M : row0 + r; }
};

template <class T>
static void write_rows(const Attention& a, const Sizes<T>& z, const Block& block, const Forward<T>& f) {
  using A = acc_t<T>;
  double l[QUERIES] = {}, log_l[QUERIES];
  for (int64_t r = 0; r < block.rows; r++) l[r] = double(lanes_sum(load(f.l + r * vector<A>::lanes)));
  for (int64_t r = 0; r < block.rows; r += vector<double>::lanes) store(log_l + r, log2(load(l + r)));
  for (int64_t r = 0; r < block.rows; r++) {
    int64_t h = block.head(r), i = block.s.q0 + block.query(r);
    const bool some = l[r] > 0;  // else a query that sees no key: zeros, and lse = -inf; or NaN
    narrow_row(row_of<T>(a.o, block.s.b, h, i), a.o.d, f.o + r * z.dvp, a.Dv, some ? A(1) / A(l[r]) : l[r] == l[r] ? A(0) : A(l[r]));
    ((lse_t<T>*)a.lse)[(block.s.b * a.H + h) * a.M + i] = lse_t<T>(some           ? (f.m[r] + log_l[r]) * LN2
                                                                   : l[r] == l[r] ? -__builtin_inf()
                                                                                  : l[r]);
  }
}

// kt, vn: the operands of the head, unless they are streamed.
template <class T>
static void forward_block(const Attention& a, const Sizes<T>& z, const Forward<T>& f, const Block& block, int64_t split,
                          const word_t<T>* kt, const word_t<T>* vn) {
  using W = word_t<T>;
  using A = acc_t<T>;
  constexpr int PACK = operand<T>::pack, L = vector<A>::lanes;
  const Sequence& s = block.s;
  int64_t rows = block.rows;
  A scale = A(a.scale * LOG2E);
  const W* q = f.q;
  if (rows % ROWS == 0 && lie_packed<T>(a.q, a.D) && scale > 0 && !block.fold) {
    q = (const W*)row_of<T>(a.q, s.b, block.h, s.q0 + block.row0);
  } else {
    pack_rows<T>(f.q, z.dw, [&](int64_t r) { return row_of<T>(a.q, s.b, block.head(r), s.q0 + block.query(r)); }, a.q.d, a.D, rows, ROWS);
    if (scale < 0) {  // the maximum of the scaled scores is the scaled maximum only for a positive scale
      for (int64_t i = 0; i < round_up(rows, ROWS) * z.dw; i++) f.q[i] = negate(f.q[i]);
      scale = -scale;
    } else if (scale == 0) {  // and 0 * -inf is NaN
      __builtin_memset(f.q, 0, round_up(rows, ROWS) * z.dw * sizeof(W));
      scale = 1;
    }
  }
  bool curved = a.softcap > 0 || a.bias.data;  // then the scores are in log2 units before the softmax sees them
  const A after = curved ? A(1) : scale;
  int32_t from[QUERIES], to[QUERIES], lo[QUERIES], hi[QUERIES], n[QUERIES];
  int64_t begin = s.N, end = 0, last_from = 0, first_to = s.N;
  for (int64_t r = 0; r < rows; r += L) store(f.m + r, splat(A(-__builtin_inf()))), store(f.top + r, splat(A(-__builtin_inf())));
  for (int64_t r = 0; r < rows; r++) {
    store(f.l + r * L, vec<A>{});
    int64_t i = block.query(r);
    from[r] = int32_t(first_key(a, s, i)), to[r] = int32_t(last_key(a, s, i));
    if (from[r] < to[r]) begin = min(begin, from[r]), end = max(end, to[r]);
    last_from = max(last_from, from[r]), first_to = min(first_to, to[r]);
    if (a.sinks && split == 0) f.m[r] = A(((const A*)a.sinks)[block.head(r)] * LOG2E), f.l[r * L] = f.m[r] == -__builtin_inf() ? 0 : 1;
  }
  if (a.splits > 1) {
    int64_t part = round_up((s.N + a.splits - 1) / a.splits, KEYS);
    begin = max(begin, split * part), end = min(end, (split + 1) * part);
  }
  begin = begin / COLS<A> * COLS<A>;

  bool empty = true;
  A multipliers[STEP<T>];
  for (int64_t j0 = begin; j0 < end; j0 += STEP<T>) {
    int64_t keys = min(end - j0, STEP<T>), step = rows;
    if (a.mask.data && !some_seen(a, s, block, j0, keys)) continue;
    if (last_from <= j0 && j0 + keys <= first_to) {
      for (int64_t r = 0; r < rows; r++) lo[r] = 0, hi[r] = n[r] = int32_t(keys);
    } else {
      for (int64_t r = 0; r < rows; r++) {
        lo[r] = int32_t(max(0, min(from[r] - j0, keys))), hi[r] = int32_t(max(0, min(to[r] - j0, keys)));
        if (hi[r] < keys && !a.stream) step = ROWS;  // on the diagonal: as many keys as some of these rows see
      }
      for (int64_t r0 = 0; r0 < rows; r0 += step) {
        int32_t reach = 0;
        for (int64_t r = r0; r < min(r0 + step, rows); r++) reach = max(reach, hi[r]);
        for (int64_t r = r0; r < min(r0 + step, rows); r++) n[r] = reach;
      }
    }
    if (a.stream)
      stream_scores<T>(a, s, block.kv_head, j0, keys, q, z.dw, rows, f.s);
    else
      for (int64_t j = 0; j < keys; j += COLS<A>)
        for (int64_t r = 0; r < rows; r += step)
          exact_product(min(step, rows - r), min(n[r] - j, COLS<A>), z.dw, q + r * z.dw, z.dw, kt + (j0 + j) * z.dw, COLS<A>, 0,
                        f.s + r * STEP<T> + j, STEP<T>);
    for (int64_t r = 0; r < rows && (curved || a.mask.data); r++) {
      const int64_t h = block.head(r), i = block.query(r);
      A* row = f.s + r * STEP<T>;
      if (curved) curve_row<A>(a, s, h, i, j0, n[r], scale, row, nullptr);
      const auto hide = [&](int64_t j, const char* seen) { row[j] = *seen ? row[j] : -__builtin_inf(); };
      if (a.mask.data) for_row<const char>(a.mask, s, h, i, j0, n[r], hide);
    }
    if (a.dropout_p > 0)
      softmax_rows<T, true>(f, rows, n, after, lo, hi, a.ahead, [&](int64_t r) {
        drop_row(a, s, block.head(r), block.query(r), j0, keys, multipliers);
        return multipliers;
      });
    else
      softmax_rows<T, false>(f, rows, n, after, lo, hi, a.ahead, [](int64_t) { return nullptr; });
    for (int64_t r = 0; r < rows; r += step) {
      int64_t many = min(step, rows - r), steps = words<T>(n[r]);
      const W *p = (W*)f.s + r * STEP<T>, *v = a.stream ? nullptr : vn + j0 / PACK * z.dvp;
      A* o = f.o + r * z.dvp;
      if (a.stream)
        stream_values<T>(a, s, block.kv_head, j0, n[r], p, rows, o, z.dvp, empty ? nullptr : f.factor);
      else if (empty)
        product<Start::zero>(many, a.Dv, steps, p, STEP<T>, v, z.dvp, COLS<A>, o, z.dvp);
      else
        product<Start::scale>(many, a.Dv, steps, p, STEP<T>, v, z.dvp, COLS<A>, o, z.dvp, f.factor + r);
    }
    empty = false;
  }
  if (empty) __builtin_memset(f.o, 0, rows * z.dvp * sizeof(A));
}

template <class T>
static void forward_task(const Attention& a, const Item& item, char* scratch) {
  Sizes<T> z(a);
  Forward<T> f(z, scratch);
  const Block block(a, item);
  const Sequence& s = block.s;
  const word_t<T>*kt = nullptr, *vn = nullptr;
  if (!a.stream) kt = panels_of<T>(a, a.kt, s, block.kv_head, z.dw), vn = rows_of<T>(a, a.vn, s, block.kv_head, z.dvp);
  if (values_lie_packed<T>(a, s)) vn = (const word_t<T>*)row_of<T>(a.v, s.b, block.kv_head, s.k0);
  forward_block<T>(a, z, f, block, item.split, kt, vn);
  if (a.splits == 1) return write_rows(a, z, block, f);
  Partial<T> part(a, z, item, item.split);
  __builtin_memcpy(part.o, f.o, block.rows * z.dvp * sizeof(acc_t<T>));
  for (int64_t r = 0; r < block.rows; r++) part.m[r] = f.m[r], part.l[r] = lanes_sum(load(f.l + r * vector<acc_t<T>>::lanes));
}

// The splits of a block, in the order of their keys.
template <class T>
static void forward_merge(const Attention& a, const Item& item, char* scratch) {
  using A = acc_t<T>;
  constexpr int L = vector<A>::lanes;
  Sizes<T> z(a);
  Forward<T> f(z, scratch);
  const Block block(a, item);
  for (int64_t r = 0; r < block.rows; r++) {
    A top = -__builtin_inf();
    for (int64_t split = 0; split < a.splits; split++) {
      A m = Partial<T>(a, z, item, split).m[r];
      top = m > top ? m : top;
    }
    A* o = f.o + r * z.dvp;
    __builtin_memset(o, 0, z.dvp * sizeof(A));
    f.m[r] = top, store(f.l + r * L, vec<A>{});
    for (int64_t split = 0; split < a.splits; split++) {
      Partial<T> part(a, z, item, split);
      if (part.l[r] == 0) continue;
      A by[L];
      store(by, exp2(splat(part.m[r] - top)));
      f.l[r * L] += part.l[r] * by[0];
      for (int64_t d = 0; d < z.dvp; d += L) store(o + d, load(o + d) + load(part.o + r * z.dvp + d) * splat(by[0]));
    }
  }
  write_rows(a, z, block, f);
}

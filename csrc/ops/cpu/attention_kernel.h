// Attention on one level. Keys that no query may see are left out when the rest is packed, and a query's band of keys is a range of the
// packed ones, whatever the mask. Everything is computed with these operands (product.h), per key head or query head:
//   kt, vt: keys, values transposed, in panels of COLS keys: [panel][word of d][key]      kn, vn: as rows of a b operand: [word of key][d]
//   qt, dot: queries, do transposed, as natural rows: [d][word of query]
// Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
#include "product.h"
#include "attention_scores.h"

constexpr int64_t KEYS = 128;   // keys of a packing task
constexpr int AHEAD_LINES = 6;  // fetched ahead for each row of a tile
static_assert(KEYS == PACKED_KEYS && KEYS == SHORT && ROWS == PACKED_QUERIES, "attention.h lays out the packed keys and queries");

template <class T>
struct Sizes {  // of the operands, in words or accumulators
  int64_t dw, dvw, dp, dvp, d6, dv6;
  Sizes(const Attention& a)
      : dw(words<T>(a.D)),
        dvw(words<T>(a.Dv)),
        dp(round_up(a.D, vector<acc_t<T>>::lanes)),
        dvp(round_up(a.Dv, vector<acc_t<T>>::lanes)),
        d6(round_up(a.D, ROWS)),
        dv6(round_up(a.Dv, ROWS)) {}
};

// The operands of a sequence and a head; a workspace has those of all heads, or of one head of keys.
INLINE int64_t key_slot(const Attention& a, const Sequence& s, int64_t kv_head) { return (a.local ? 0 : kv_head) * a.slots + s.slots; }
INLINE int64_t query_slot(const Attention& a, const Sequence& s, int64_t h) { return (a.local ? h % a.group : h) * a.q_slots + s.q_slots; }
template <class T>
INLINE word_t<T>* panels_of(const Attention& a, int64_t at, const Sequence& s, int64_t kv_head, int64_t dw) {
  return (word_t<T>*)(a.work + at) + key_slot(a, s, kv_head) * dw;
}
template <class T>
INLINE word_t<T>* rows_of(const Attention& a, int64_t at, const Sequence& s, int64_t kv_head, int64_t width) {
  return (word_t<T>*)(a.work + at) + key_slot(a, s, kv_head) / operand<T>::pack * width;
}

// Scratch memory handed out piece by piece, each on a cache line of its own.
struct Pieces {
  char* next;
  template <class X>
  X* take(int64_t n) {
    char* p = next;
    next += round_up(n * sizeof(X), 64);
    return (X*)p;
  }
};
// Natural rows of n elements each, from(i) telling where row i lies; rows up to a multiple of ROWS, or of `multiple`, become zero.
template <class T, class F>
INLINE void pack_rows(word_t<T>* to, int64_t to_row, F from, int64_t stride, int64_t n, int64_t rows, int64_t multiple) {
  for (int64_t i = 0; i < rows; i++) pack_row(to + i * to_row, from(i), stride, n);
  for (int64_t i = rows; i < round_up(rows, multiple); i++) __builtin_memset(to + i * to_row, 0, to_row * sizeof *to);
}

// Whether rows of n elements lie in memory as natural rows do, but for zeros up to a register.
template <class T>
INLINE bool lie_packed(const View& x, int64_t n) {
  constexpr int PACK = operand<T>::pack;
  bool as_words = PACK == 1 ? std::is_same_v<T, word_t<T>> : (n | x.b | x.h) % PACK == 0 && uintptr_t(x.data) % sizeof(word_t<T>) == 0;
  return as_words && x.d == 1 && x.row == n;
}

// Packs up to KEYS keys or values: transposed into panels, as rows of a b operand, or both.
template <class T>
static void pack_keys(const View& x, const Sequence& s, int64_t h, int64_t first, int64_t n, int64_t d, word_t<T>* panels, word_t<T>* rows,
                      int64_t rows_width, char* scratch) {
  using W = word_t<T>;
  int64_t dw = words<T>(d), from_row = dw;
  const W* natural = (const W*)scratch;
  const T* start = row_of<T>(x, s.b, h, s.k0 + position(s, first));
  constexpr int PACK = operand<T>::pack;
  bool as_words = std::is_same_v<T, W> || (PACK == 2 && d % 2 == 0 && x.row % 2 == 0 && uintptr_t(start) % sizeof(W) == 0);
  constexpr int64_t L = vector<acc_t<T>>::lanes, PANEL = COLS<acc_t<T>>;
  if (as_words && x.d == 1 && !s.keys && n % (panels ? L : PACK) == 0)
    natural = (const W*)start, from_row = x.row / PACK;  // already what packing would make of it
  else
    pack_rows<T>((W*)scratch, dw, [&](int64_t i) { return row_of<T>(x, s.b, h, s.k0 + position(s, first + i)); }, x.d, d, n, L);
  if (panels)
    for (int64_t j = 0; j < n; j += PANEL)
      transpose(natural + j * from_row, from_row, min(round_up(n - j, L), PANEL), dw, panels + (first + j) * dw, PANEL);
  if (rows) {
    rows += first / operand<T>::pack * rows_width;
    for (int64_t i = 0; i < words<T>(n); i++, rows += rows_width) {
#if LEVEL_BF16_DOT
      if constexpr (operand<T>::pack == 2)
        interleave(rows, natural + 2 * i * from_row, natural + (2 * i + 1) * from_row, d);
      else
#endif
        __builtin_memcpy(rows, natural + i * from_row, d * sizeof(W));
      __builtin_memset(rows + d, 0, (rows_width - d) * sizeof(W));
    }
  }
}

INLINE void fetch(Ahead* x, int lines) {
  for (; x && lines > 0 && x->part < x->count; lines--) {
    const Ahead::Rows& rows = x->parts[x->part];
    __builtin_prefetch(rows.at + x->row * rows.stride + x->byte, 0, 2);
    if ((x->byte += 64) < rows.bytes) continue;
    x->byte = 0;
    if (++x->row == rows.count) x->row = 0, x->part++;
  }
}

#include "attention_forward.h"
#include "attention_backward.h"
#include "attention_short.h"

template <class T>
static const AttentionRoads& attention_roads() {
  static constexpr AttentionRoads roads = {
      {QUERIES, 0, forward_plan<T>, forward_pack<T>, nullptr, forward_task<T>, forward_merge<T>},
      {BWD_QUERIES, BWD_KEYS, backward_plan<T>, backward_pack_keys<T>, backward_pack_queries<T>, backward_task<T>, nullptr},
      {SHORT, SHORT, short_plan<T>, nullptr, nullptr, short_backward<T>, nullptr},
      sinks_grad<T>,
      takes_short<T>};
  return roads;
}

// NMS on one level: boxes sorted by class and score, then each held against the list of those kept before it. Compiled without contraction:
// the IoU that decides has the same bits everywhere.

#include "nms_order.h"

template <class C>
struct Places {
  C *x1, *y1, *x2, *y2, *area;
  template <class Of>  // Image or Grid
  explicit Places(const Of& x) : x1((C*)x.x1), y1((C*)x.y1), x2((C*)x.x2), y2((C*)x.y2), area((C*)x.area) {}
  void copy(int64_t to, const Places& from, int64_t at) const {
    x1[to] = from.x1[at], y1[to] = from.y1[at], x2[to] = from.x2[at], y2[to] = from.y2[at], area[to] = from.area[at];
  }
};

template <class C>
struct Candidate {
  vec<C> x1, y1, x2, y2, area;
  Candidate(const Places<C>& p, int64_t at)
      : x1(splat(p.x1[at])), y1(splat(p.y1[at])), x2(splat(p.x2[at])), y2(splat(p.y2[at])), area(splat(p.area[at])) {}
};

template <class C>
struct Limits {
  vec<C> threshold, reject;  // an intersection of at most reject * union is no IoU above the threshold, whatever is rounded
  explicit Limits(const Nms& a, bool small_areas) {
    constexpr C tiny = sizeof(C) == 8 ? C(0x1p-500) : C(0x1p-60), most = sizeof(C) == 8 ? C(1 - 0x1p-48) : C(1 - 0x1p-20);
    C t = C(a.threshold);
    threshold = splat(t), reject = splat(small_areas || t < tiny ? C(0) : t * most);
  }
};

// A register of boxes.
template <class C>
struct Boxes {
  vec<C> x1 = {}, y1 = {}, x2 = {}, y2 = {}, area = {};
  Boxes() = default;
  __attribute__((always_inline)) Boxes(const Places<C>& p, int64_t at)
      : x1(load(p.x1 + at)), y1(load(p.y1 + at)), x2(load(p.x2 + at)), y2(load(p.y2 + at)), area(load(p.area + at)) {}
  __attribute__((always_inline)) void set(uint32_t k, const Candidate<C>& b) {  // lane k
    auto lane = lane_numbers<C>() == splat(lane_t<C>(k));
    x1 = lane ? b.x1 : x1, y1 = lane ? b.y1 : y1, x2 = lane ? b.x2 : x2, y2 = lane ? b.y2 : y2, area = lane ? b.area : area;
  }
};

// Which of a register's boxes suppress b, as bits; areas are positive and finite, all lanes beyond the list give anything.
template <class C>
INLINE uint32_t overlaps(const Boxes<C>& a, const Candidate<C>& b, const Limits<C>& limits) {
  vec<C> w = min(a.x2, b.x2) - max(a.x1, b.x1);
  vec<C> h = min(a.y2, b.y2) - max(a.y1, b.y1);
  vec<C> inter = max(w, vec<C>{}) * h;  // where h is negative, it is not above 0 and no candidate
  vec<C> whole = a.area + b.area - inter;
  uint32_t maybe = bits_above(inter, limits.reject * whole);
  return __builtin_expect(maybe != 0, 0) ? maybe & bits_above(inter / whole, limits.threshold) : 0;
}

// The first of n boxes from `at` on that suppresses b, or n. `steps` counts the registers looked at.
template <class C>
INLINE uint32_t find(const Places<C>& p, int64_t at, uint32_t n, const Candidate<C>& b, const Limits<C>& limits, int64_t& steps) {
  constexpr uint32_t L = vector<C>::lanes;
  for (uint32_t k = 0; k < n; k += L) {
    uint32_t bits = overlaps(Boxes<C>(p, at + k), b, limits);
    if (n - k < L) bits &= (1u << (n - k)) - 1;
    steps++;
    if (bits) return k + __builtin_ctz(bits);
  }
  return n;
}

// Cells. An IoU above t needs one above t on each axis: sides w and v with t < w / v < 1 / t, and centres less than
// (w + v) (1 - t) / (2 (1 + t)) apart. So a box looks into the cells within that distance, of the levels that its longer side allows: a
// level holds sides from 4**e to 4**(e + 1), in cells of 4**(e + 1) / 2**fine. Numbers of cells wrap; a box of another cell costs time
// alone. Bounds are a little wider than the IoU's rounding. Float alone: a double has the centre and its distance exactly.
struct Cells {
  uint32_t mask;
  int fine;
  double t, reach;
  uint64_t small = ~uint64_t(0), large = small;  // a bit for each level that has boxes, or may

  Cells(const Nms& a, int64_t size, int fine) : fine(fine) {
    mask = (1u << (31 - __builtin_clz(uint32_t(size - 1)))) - 1;  // starts of all cells, and the end, fit into the segment's places
    t = a.threshold * (1 - 1e-5), reach = (1 - t) / (2 * (1 + t)) * (1 + 1e-5);
  }
  static int level(float side) { return int(bits_as<uint32_t>(side) >> 24); }
  double per_cell(int level) const {  // 1 / its side
    return bits_as<double>(uint64_t(1023 + 127 - 2 - 2 * level + fine) << 52);
  }
  static int64_t floor(double x) {
    int64_t i = int64_t(x);
    return i - (double(i) > x);
  }
  uint32_t number(int level, int64_t i, int64_t j) const { return uint32_t(i + j * 0x9e3779b1 + level * 0x85ebca6b) & mask; }
  static int level_of(const Places<float>& p, int64_t at) {
    float w = p.x2[at] - p.x1[at], h = p.y2[at] - p.y1[at];
    return level(w > h ? w : h);
  }
  bool has(int level) const { return (level < 64 ? small : large) >> (level & 63) & 1; }
  uint32_t of(const Places<float>& p, int64_t at) const {
    int e = level_of(p, at);
    double k = per_cell(e);
    return number(e, floor((double(p.x1[at]) + p.x2[at]) / 2 * k), floor((double(p.y1[at]) + p.y2[at]) / 2 * k));
  }
};

// Lays out the kept boxes, and room for those that may come. The finer the cells, the more of them to look into: `fine` is what the kept
// boxes make least of.
static Cells build_grid(const Nms& a, const Image& x, const Segment& s, uint32_t at, uint32_t kept) {
  const Places<float> p(x), q(x.grid);
  uint32_t *start = x.grid.start + s.begin, *count = x.grid.count + s.begin, *cell = x.grid.cell;
  int best = 0;
  double least = __builtin_inf();
  for (int fine = 0; fine < 4; fine++) {
    Cells cells(a, s.end - s.begin, fine);
    for (uint32_t c = 0; c <= cells.mask; c++) count[c] = 0;
    int64_t pairs = 0;
    for (uint32_t i = 0; i < kept; i++) pairs += 2 * count[cells.of(p, s.begin + i)]++ + 1;
    double across = 1 + 3 * cells.reach * (1 << fine), cost = across * across * (1 + double(pairs) / kept / vector<float>::lanes);
    if (cost < least) least = cost, best = fine;
  }
  Cells cells(a, s.end - s.begin, best);
  for (uint32_t c = 0; c <= cells.mask; c++) count[c] = 0;
  for (uint32_t i = 0; i < kept; i++) count[cells.of(p, s.begin + i)]++;
  for (uint32_t i = at; i < s.end; i++)
    if (p.area[i] > 0) count[cell[i] = cells.of(p, i)]++;
  if (a.threshold < FEW_CELLS) {  // there are many levels to look into, of many cells
    cells.small = cells.large = 0;
    for (uint32_t i = s.begin; i < s.end; i = i + 1 == s.begin + kept ? at : i + 1)
      if (int e = Cells::level_of(p, i); p.area[i] > 0) (e < 64 ? cells.small : cells.large) |= uint64_t(1) << (e & 63);
  }
  uint32_t sum = s.begin;
  for (uint32_t c = 0; c <= cells.mask; c++) start[c] = sum, sum += count[c], count[c] = 0;
  for (uint32_t i = 0; i < kept; i++) {
    uint32_t c = cells.of(p, s.begin + i), to = start[c] + count[c]++;
    q.copy(to, p, s.begin + i), x.grid.rank[to] = x.rank[s.begin + i];
  }
  return cells;
}

// The rank of the first box that suppresses the one at place `at`, or NONE; of any that does, unless the first is wanted.
constexpr uint32_t NONE = ~0u;
static uint32_t find_in_grid(const Nms& a, const Image& x, const Segment& s, const Cells& cells, uint32_t at, const Limits<float>& limits) {
  const Places<float> p(x), q(x.grid);
  const Candidate<float> b(p, at);
  const uint32_t *start = x.grid.start + s.begin, *count = x.grid.count + s.begin;
  double w = p.x2[at] - p.x1[at], h = p.y2[at] - p.y1[at], longer = w > h ? w : h;
  double cx = (double(p.x1[at]) + p.x2[at]) / 2, cy = (double(p.y1[at]) + p.y2[at]) / 2, most = longer / cells.t;
  int64_t steps = 0;
  uint32_t first = NONE;
  int last = Cells::level(most < 3e38 ? float(most) : 3e38f);
  for (int e = Cells::level(float(longer * cells.t)); e <= last; e++) {
    if (a.threshold < FEW_CELLS && !cells.has(e)) continue;
    double k = cells.per_cell(e), side = bits_as<double>(uint64_t(1023 - 127 + 2 + 2 * e) << 52), v = w / cells.t, u = h / cells.t;
    double rx = (w + (v < side ? v : side)) * cells.reach, ry = (h + (u < side ? u : side)) * cells.reach;
    int64_t i0 = Cells::floor((cx - rx) * k), i1 = Cells::floor((cx + rx) * k), j1 = Cells::floor((cy + ry) * k);
    for (int64_t j = Cells::floor((cy - ry) * k); j <= j1; j++)
      for (int64_t i = i0; i <= i1; i++) {
        uint32_t c = cells.number(e, i, j), n = count[c], found = find(q, start[c], n, b, limits, steps);
        if (found == n) continue;
        uint32_t rank = x.grid.rank[start[c] + found];
        if (!a.want_suppressor) return rank;
        first = rank < first ? rank : first;
      }
  }
  return first;
}

template <class C>
static void suppress_segment(const Nms& a, const Image& x, Segment& s, const Limits<C>& limits, int64_t ranks) {
  constexpr int64_t window = 256;                                                    // boxes
  const double dear = 48 * (a.threshold < FEW_CELLS ? FEW_CELLS / a.threshold : 1);  // registers a box, from which on cells are less work
  const Places<C> p(x);
  uint32_t at = s.next, kept = s.kept, built = 0;  // built: how many were kept when the grid was, 0 without one
  int64_t steps = 0;
  // The last of the list, if they do not fill a register, are in one all the same: memory that was just written in parts loads late.
  constexpr uint32_t L = vector<C>::lanes;
  Boxes<C> open;
  if (kept % L) open = Boxes<C>(p, s.begin + kept / L * L);
  Cells cells(a, 2, 0);
  bool may = x.grid.x1 && s.end - s.begin >= GRID_BOXES;
  for (int64_t i = 0; at < s.end && x.rank[at] < ranks; at++, i++) {
    uint32_t r = x.rank[at], by = NONE;
    x.keep[r] = 1;
    if (!(p.area[at] > 0)) continue;  // neither suppresses nor is suppressed
    if constexpr (sizeof(C) == 4)
      if (may && i % window == 0) {
        if (built ? kept >= 4 * built : double(steps) > window * dear && s.end - at > kept) cells = build_grid(a, x, s, at, built = kept);
        steps = 0;
      }
    bool in_grid = false;
    if constexpr (sizeof(C) == 4)
      if (built) in_grid = true, by = find_in_grid(a, x, s, cells, at, limits);
    const Candidate<C> b(p, at);
    if (!in_grid) {
      uint32_t full = kept / L * L, found = find(p, s.begin, full, b, limits, steps);
      if (found == full) {
        uint32_t bits = overlaps(open, b, limits) & ((1u << kept % L) - 1);
        found = bits ? full + __builtin_ctz(bits) : kept;
      }
      if (found < kept) by = x.rank[s.begin + found];
    }
    if (by != NONE) {
      x.keep[r] = 0;
      if (a.want_suppressor) x.suppressor[r] = by;
      continue;
    }
    if (in_grid) {
      uint32_t c = s.begin + x.grid.cell[at], to = x.grid.start[c] + x.grid.count[c]++;
      Places<C>(x.grid).copy(to, p, at), x.grid.rank[to] = r;
    }
    if (!in_grid) open.set(kept % L, b);
    uint32_t to = s.begin + kept++;  // not beyond `at`: the list grows over boxes that are decided
    p.copy(to, p, at), x.rank[to] = r;
  }
  s.next = at, s.kept = kept;
}

template <class C>
static void suppress_task(const Nms& a, const Image& x, int64_t task, int64_t ranks) {
  const Limits<C> limits(a, x.small_areas);
  for (int64_t s = x.tasks[task]; s < x.tasks[task + 1]; s++) suppress_segment(a, x, x.segments[s], limits, ranks);
}
static void suppress(const Nms& a, const Image& x, int64_t task, int64_t ranks) {
  a.box_type == Dtype::f64 ? suppress_task<double>(a, x, task, ranks) : suppress_task<float>(a, x, task, ranks);
}

static constexpr NmsKernels nms_kernels = {prepare, suppress};

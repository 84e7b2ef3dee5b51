// The best match: the lanes hold boxes, a ground truth meets them all. Included by boxes_kernel.h.
// Pairs that do not meet are skipped, a whole register of them at a time: their IoU is 0 or NaN, and neither beats the IoU with the first
// ground truth, which is always computed. Whoever ends without an IoU above 0, and not with that first one, looks again for the first
// partner whose IoU is 0.

// The IoU of one pair, bit for bit what the lanes give.
template <class A>
INLINE A iou_of(const A* box, const A* gt) {
  Corners<A> a = splat_corners(box, 1), b = splat_corners(gt, 1);
  return iou(overlap(meeting(a, b), area(a), area(b)))[0];
}

// The first of `others` whose IoU with box is 0, where the best so far is `best` at `at`, at most 0.
template <class A>
static void look_again(const A* box, const Boxes& others, int64_t set, int64_t n, Format format, A& best, int64_t& at) {
  A size = area(splat_corners(box, 1))[0], other[4];
  if (size == size)
    for (int64_t i = 0; i < n; i++) {
      read_corners<A>(others, set, i, 1, format, other, 1);
      if (iou_of(box, other) == 0) {
        best = 0, at = i;
        return;
      }
    }
  if (at < 0) best = 0;
}

template <class A>
static void match_part(const Match& m, int64_t task, char* scratch) {
  constexpr int64_t L = vector<A>::lanes, BLOCK = 512, GTS = 64;
  using I = lane_t<A>;
  int64_t set = task / m.parts, begin = task % m.parts * m.part, n = min(m.part, m.N - begin), apart = (n + L - 1) / L * L;
  A *corners = (A*)scratch, *areas = corners + 4 * apart, *best = areas + apart;
  I* best_at = (I*)(best + apart);
  read_corners<A>(m.boxes, set, begin, n, m.format, corners, apart);
  const A nan = A(__builtin_nanf(""));
  for (int64_t i = n; i < apart; i++)
    for (int64_t k = 0; k < 4; k++) corners[k * apart + i] = nan;  // matches nothing
  for (int64_t i = 0; i < apart; i += L) {
    store(areas + i, area(load_corners(corners + i, apart)));
    store(best + i, splat(A(-__builtin_inf())));
    store(best_at + i, vec<I>{} - 1);
  }
  A* part_iou = (A*)m.part_iou + task * m.G;
  int64_t* part_box = m.part_box + task * m.G;
  for (int64_t g = 0; g < m.G; g++) part_iou[g] = A(-__builtin_inf()), part_box[g] = -1;
  A gts[4 * GTS];
  for (int64_t first = 0; first < m.G; first += GTS) {
    int64_t count = min(GTS, m.G - first);
    read_corners<A>(m.gts, set, first, count, m.format, gts, GTS);
    for (int64_t block = 0; block < n; block += BLOCK)
      for (int64_t g = 0; g < count; g++) {
        Corners<A> gt = splat_corners(gts + g, GTS);
        vec<A> gt_area = area(gt), top = splat(part_iou[first + g]);
        vec<I> top_at = vec<I>{} - 1, number = vec<I>{} + I(first + g);
        bool found = false;
        for (int64_t i = block; i < min(block + BLOCK, n); i += L) {
          Meeting<A> meet = meeting(load_corners(corners + i, apart), gt);
          if (first + g && !bits_above(min(meet.w, meet.h), vec<A>{})) continue;
          vec<A> x = iou(overlap(meet, load(areas + i), gt_area)), old = load(best + i);
          vec<I> better = x > old, tops = x > top;
          store(best + i, better ? x : old), store(best_at + i, better ? number : load(best_at + i));
          top = tops ? x : top, top_at = tops ? vec<I>{} + I(i) : top_at;
          found = true;
        }
        if (!found) continue;
        for (int64_t l = 0; l < L; l++) {
          if (top_at[l] < 0) continue;
          int64_t at = begin + top_at[l] + l;
          A& so_far = part_iou[first + g];
          int64_t& box = part_box[first + g];
          if (top[l] > so_far || (top[l] == so_far && at < box)) so_far = top[l], box = at;
        }
      }
  }
  A* best_iou = (A*)m.best_iou + set * m.N + begin;
  int64_t* best_gt = m.best_gt + set * m.N + begin;
  for (int64_t i = 0; i < n; i++) {
    int64_t at = best_at[i];
    if (!(best[i] > 0) && at) {
      A box[4] = {corners[i], corners[apart + i], corners[2 * apart + i], corners[3 * apart + i]};
      look_again(box, m.gts, set, m.G, m.format, best[i], at);
    }
    best_iou[i] = best[i], best_gt[i] = at;
  }
}

// The best box of each ground truth, over the parts in their order.
template <class A>
static void match_finish(const Match& m, int64_t set) {
  for (int64_t g = 0; g < m.G; g++) {
    A best = A(-__builtin_inf());
    int64_t at = -1;
    for (int64_t part = set * m.parts; part < (set + 1) * m.parts; part++) {
      A x = ((const A*)m.part_iou)[part * m.G + g];
      if (x > best) best = x, at = m.part_box[part * m.G + g];
    }
    if (!(best > 0)) {
      A gt[4];
      read_corners<A>(m.gts, set, g, 1, m.format, gt, 1);
      look_again(gt, m.boxes, set, m.N, m.format, best, at);
    }
    ((A*)m.gt_best_iou)[set * m.G + g] = best, m.gt_best_box[set * m.G + g] = at;
  }
}

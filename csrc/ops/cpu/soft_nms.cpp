// Soft-NMS and Matrix NMS on CPU tensors: who is a candidate, of which class, in which order. The arithmetic is in soft_nms_kernel.h.
#include "soft_nms.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "runtime.h"

#define KERNEL "soft_nms_kernel.h"
#include "levels.h"

namespace minkernels {

template <class A>
static SoftNMSKernels<A> kernels_now() {
  static constexpr SoftNMSKernels<A> (*kernels_at[])() = WIDE_LEVELS(soft_nms_kernels<A>);
  return kernels_at[level()]();
}

struct SoftArgs {  // of a call; all tensors are dense, in the type of the arithmetic
  Tensor boxes, scores;
  std::optional<Tensor> class_ids;
  double min_score;
  Tensor indices, out_scores, counts;
};

// The boxes of an image that count: in the order of their numbers, and grouped by class.
template <class A>
struct Candidates {
  std::vector<int64_t> number;  // in the image
  std::vector<A> s;             // scores
  std::vector<int64_t> of;      // which group it is in
  std::vector<int64_t> begins;  // of each group, and the end of the last one
  const A* boxes;

  Candidates(const SoftArgs& a, int64_t image) {
    int64_t N = a.scores.size(1);
    boxes = (const A*)a.boxes.data_ptr() + image * N * 4;
    const A* scores = (const A*)a.scores.data_ptr() + image * N;
    for (int64_t i = 0; i < N; i++) {
      const A* b = boxes + 4 * i;
      if (scores[i] > A(a.min_score) && b[0] == b[0] && b[1] == b[1] && b[2] == b[2] && b[3] == b[3])
        number.push_back(i), s.push_back(scores[i]);
    }
    of.assign(size(), 0), begins = {0, size()};
    if (a.class_ids) group((const int64_t*)a.class_ids->data_ptr() + image * N);
  }

  int64_t size() const { return int64_t(number.size()); }
  SoftBox<A> box(int64_t i) const {
    const A* b = boxes + 4 * number[i];
    return {b[0], b[1], b[2], b[3], (b[2] - b[0]) * (b[3] - b[1])};
  }

 private:
  void group(const int64_t* ids) {
    std::vector<int64_t> found(size());
    for (int64_t i = 0; i < size(); i++) found[i] = ids[number[i]];
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    begins.assign(found.size() + 1, 0);
    for (int64_t i = 0; i < size(); i++) {
      of[i] = std::lower_bound(found.begin(), found.end(), ids[number[i]]) - found.begin();
      begins[of[i] + 1]++;
    }
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
  }
};

template <class A>
struct SoftArrays {
  std::vector<A> memory;
  SoftBoxes<A> boxes;

  explicit SoftArrays(int64_t n) : memory(5 * (n + BOXES_PAD)) {
    A* p = memory.data();
    n += BOXES_PAD;
    boxes = {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n};
  }
};

template <class A>
static void write(const SoftArgs& a, int64_t image, int64_t k, int64_t number, A s) {
  int64_t at = image * a.indices.size(1) + k;
  ((int64_t*)a.indices.data_ptr())[at] = number, ((A*)a.out_scores.data_ptr())[at] = s;
}
template <class A>
static void finish(const SoftArgs& a, int64_t image, int64_t count) {
  ((int64_t*)a.counts.data_ptr())[image] = count;
  for (int64_t k = count; k < a.indices.size(1); k++) write<A>(a, image, k, -1, 0);
}

// By class, then by descending score, of equal ones the first.
template <class A>
static std::vector<int64_t> sorted(const Candidates<A>& x) {
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return x.of[i] != x.of[j] ? x.of[i] < x.of[j] : x.s[i] != x.s[j] ? x.s[i] > x.s[j] : i < j;
  });
  return order;
}

// Boxes of a class, by descending score, go in blocks. A block is lowered by all that its class has kept since it was lowered last, when
// no other block may hold a higher score: most blocks are never looked at, where few boxes are wanted.
template <class A>
static void soft_nms_image(const SoftArgs& a, int64_t image, const Decay<A>& decay, const SoftNMSKernels<A>& kernels) {
  struct Block {
    int64_t begin, n, group, done;  // places; of the boxes that its class has kept
  };
  Candidates<A> x(a, image);
  std::vector<int64_t> order = sorted(x);
  std::vector<Block> blocks;
  int64_t places = 0;
  for (size_t group = 0; group + 1 < x.begins.size(); group++)
    for (int64_t i = x.begins[group]; i < x.begins[group + 1]; i += SOFT_BLOCK) {
      int64_t n = std::min(SOFT_BLOCK, x.begins[group + 1] - i);
      blocks.push_back({places, n, int64_t(group), 0});
      places += (n + BOXES_PAD - 1) / BOXES_PAD * BOXES_PAD;
    }
  SoftArrays<A> boxes(places);
  const A gone = -std::numeric_limits<A>::infinity(), least = A(a.min_score);
  std::vector<A> scores(places + BOXES_PAD, gone), bounds(blocks.size() + BOXES_PAD, gone);
  std::vector<int64_t> of(places), kept_counts(x.begins.size() - 1);
  int64_t n_blocks = int64_t(blocks.size()), at = 0, count = 0;
  for (int64_t b = 0; b < n_blocks; b++) {
    for (int64_t p = blocks[b].begin; p < blocks[b].begin + blocks[b].n; p++, at++)
      boxes.boxes.put(p, x.box(order[at])), scores[p] = x.s[order[at]], of[p] = order[at];
    bounds[b] = scores[blocks[b].begin];
  }
  std::vector<SoftBox<A>> kept(x.size());
  while (count < a.indices.size(1)) {
    A top = kernels.largest(bounds.data(), n_blocks);
    if (!(top > least)) break;
    int64_t place = -1, block = 0;
    for (int64_t b = 0; (b = kernels.find(bounds.data(), n_blocks, b, top)) < n_blocks; b++) {
      Block& own = blocks[b];
      int64_t n_kept = kept_counts[own.group];
      if (own.done < n_kept) {
        bounds[b] = kernels.lower(boxes.boxes.from(own.begin), scores.data() + own.begin, own.n, &kept[x.begins[own.group] + own.done],
                                  n_kept - own.done, least, decay);
        own.done = n_kept;
        if (bounds[b] != top) continue;
      }
      const A* s = scores.data() + own.begin;
      for (int64_t i = 0; (i = kernels.find(s, own.n, i, top)) < own.n; i++)
        if (place < 0 || of[own.begin + i] < of[place]) place = own.begin + i, block = b;
    }
    if (place < 0) continue;  // all that might have been the highest were lowered
    Block& own = blocks[block];
    scores[place] = gone;
    kept[x.begins[own.group] + kept_counts[own.group]++] = boxes.boxes.at(place);
    write(a, image, count++, x.number[of[place]], top);
  }
  finish<A>(a, image, count);
}

template <class A>
static void matrix_nms_image(const SoftArgs& a, int64_t image, const Decay<A>& decay, const SoftNMSKernels<A>& kernels) {
  Candidates<A> x(a, image);
  int64_t n = x.size();
  std::vector<int64_t> order = sorted(x);
  SoftArrays<A> arrays(n);
  std::vector<A> scores(n), c(n + BOXES_PAD);
  for (int64_t i = 0; i < n; i++) arrays.boxes.put(i, x.box(order[i])), scores[i] = x.s[order[i]];
  for (size_t group = 0; group + 1 < x.begins.size(); group++) {
    int64_t first = x.begins[group];
    kernels.matrix(arrays.boxes.from(first), x.begins[group + 1] - first, scores.data() + first, c.data(), decay);
  }
  for (int64_t i = 0; i < n; i++) x.s[order[i]] = scores[i];
  order.clear();
  for (int64_t i = 0; i < n; i++)
    if (x.s[i] > A(a.min_score)) order.push_back(i);
  int64_t count = std::min<int64_t>(order.size(), a.indices.size(1));
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](int64_t i, int64_t j) { return x.s[i] != x.s[j] ? x.s[i] > x.s[j] : i < j; });
  for (int64_t k = 0; k < count; k++) write(a, image, k, x.number[order[k]], x.s[order[k]]);
  finish<A>(a, image, count);
}

template <class A>
static void rescore(const SoftArgs& a, bool matrix, bool gaussian, double iou_threshold, double factor) {
  SoftNMSKernels<A> kernels = kernels_now<A>();
  Decay<A> decay{gaussian, A(iou_threshold), A(factor)};
  run_tasks(a.boxes.size(0), 0,
            [&](int64_t image, char*) { (matrix ? matrix_nms_image<A> : soft_nms_image<A>)(a, image, decay, kernels); });
}

// factor: of IoU**2 in the exponent. class_ids: int64. Thresholds are numbers of the type of the arithmetic.
static void rescored_nms(Tensor boxes, Tensor scores, std::optional<Tensor> class_ids, bool matrix, bool gaussian, double iou_threshold,
                         double factor, double min_score, Tensor indices, Tensor out_scores, Tensor counts) {
  SoftArgs a{boxes, scores, class_ids, min_score, indices, out_scores, counts};
  (dtype_of(boxes) == Dtype::f64 ? rescore<double> : rescore<float>)(a, matrix, gaussian, iou_threshold, factor);
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def(
      "_rescored_nms(Tensor boxes, Tensor scores, Tensor? class_ids, bool matrix, bool gaussian, float iou_threshold, float factor, "
      "float min_score, Tensor(a!) indices, Tensor(b!) out_scores, Tensor(c!) counts) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) { m.impl("_rescored_nms", TORCH_BOX(&minkernels::rescored_nms)); }

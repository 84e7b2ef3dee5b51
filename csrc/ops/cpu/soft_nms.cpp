// Soft-NMS and Matrix NMS on CPU tensors: who is a candidate, of which class, in which order. The arithmetic is in soft_nms_kernel.h.
#include "soft_nms.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "runtime.h"

#define KERNEL "soft_nms_kernel.h"
#include "levels.h"

namespace minkernels {

template <class A>
static SoftNMSKernels<A> kernels_now() {
  static constexpr SoftNMSKernels<A> (*kernels_at[])() = LEVELS(soft_nms_kernels<A>);
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

// A box's score is lowered when its turn comes, by all that were kept since it was looked at last: what lies below the last box that is
// kept is never looked at.
template <class A>
static void soft_nms_image(const SoftArgs& a, int64_t image, const Decay<A>& decay, const SoftNMSKernels<A>& kernels) {
  struct Entry {
    A s;  // at most: kept boxes after the first `done` of its class have not lowered it yet
    int64_t i;
    bool operator<(const Entry& o) const { return s < o.s || (s == o.s && i > o.i); }
  };
  Candidates<A> x(a, image);
  SoftArrays<A> kept(x.size());
  std::vector<int64_t> kept_counts(x.begins.size() - 1), done(x.size());
  std::vector<Entry> heap(x.size());
  for (int64_t i = 0; i < x.size(); i++) heap[i] = {x.s[i], i};
  std::make_heap(heap.begin(), heap.end());
  int64_t k = 0;
  while (k < a.indices.size(1) && !heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    Entry e = heap.back();
    heap.pop_back();
    int64_t group = x.of[e.i];
    SoftBoxes<A> own = kept.boxes.from(x.begins[group]);
    SoftBox<A> box = x.box(e.i);
    A stop = heap.empty() ? A(0) : heap[0].s;
    e.s = kernels.lower(own, done[e.i], kept_counts[group], box, e.s, stop, A(a.min_score), decay);
    if (!(e.s > A(a.min_score))) continue;
    if (!heap.empty() && e < heap[0]) {
      heap.push_back(e);
      std::push_heap(heap.begin(), heap.end());
      continue;
    }
    own.put(kept_counts[group]++, box);
    write(a, image, k++, x.number[e.i], e.s);
  }
  finish<A>(a, image, k);
}

template <class A>
static void matrix_nms_image(const SoftArgs& a, int64_t image, const Decay<A>& decay, const SoftNMSKernels<A>& kernels) {
  Candidates<A> x(a, image);
  int64_t n = x.size();
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return x.of[i] != x.of[j] ? x.of[i] < x.of[j] : x.s[i] != x.s[j] ? x.s[i] > x.s[j] : i < j;
  });
  SoftArrays<A> sorted(n);
  std::vector<A> scores(n), c(n + BOXES_PAD);
  for (int64_t i = 0; i < n; i++) sorted.boxes.put(i, x.box(order[i])), scores[i] = x.s[order[i]];
  for (size_t group = 0; group + 1 < x.begins.size(); group++) {
    int64_t first = x.begins[group];
    kernels.matrix(sorted.boxes.from(first), x.begins[group + 1] - first, scores.data() + first, c.data(), decay);
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

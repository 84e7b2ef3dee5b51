// NMS on CPU tensors: memory, threads over classes or images, and the results in their order. The sorting and the arithmetic are in
// nms_kernel.h. Every check was made above.
#include "nms.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "runtime.h"

#define KERNEL "nms_kernel.h"
#include "levels.h"

namespace minkernels {

using Maybe = std::optional<Tensor>;

static constexpr NmsKernels kernels_at[] = WIDE_LEVELS(nms_kernels);

// Hands out `bytes` at a time, on cache lines; from null, it counts them.
struct Carver {
  char* base;
  size_t used = 0;
  template <class T>
  void operator()(T*& p, int64_t count) {
    p = (T*)(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
  }
};

static size_t carve(const Nms& a, char* memory, Image& x) {
  int64_t places = a.N + (a.N / TASK_BOXES + 2) * 2 * LINE, item = a.box_type == Dtype::f64 ? 8 : 4;
  Carver take{memory};
  take(x.pairs, a.N + 1), take(x.spare, a.N + 1), take(x.order, a.N), take(x.keep, a.N), take(x.rank, places);
  take(x.suppressor, a.want_suppressor ? a.N : 0);
  for (char** p : {&x.x1, &x.y1, &x.x2, &x.y2, &x.area}) take(*p, places * item);
  take(x.segments, a.classes ? a.N : 1), take(x.tasks, a.N / TASK_BOXES + 2);
  if (a.N >= GRID_BOXES && a.threshold >= GRID_THRESHOLD && item == 4) {
    Grid& g = x.grid;
    for (char** p : {&g.x1, &g.y1, &g.x2, &g.y2, &g.area}) take(*p, places * item);
    for (uint32_t** p : {&g.rank, &g.start, &g.count, &g.cell}) take(*p, places);
  }
  return take.used;
}

struct Results {
  int64_t *indices, *counts = nullptr, *suppressor = nullptr;  // (B, max_output), (B,), (B, N)
};

constexpr int64_t PARALLEL = 1 << 14;  // boxes of an image: fewer are decided before another thread has woken up

static int64_t run_image(const Nms& a, const NmsKernels& kernels, int64_t b, Image& x, bool parallel, const Results& out) {
  kernels.prepare(a, b, x);
  parallel = parallel && x.n >= PARALLEL;
  std::vector<uint32_t> longest(x.n_tasks);
  if (parallel) {
    std::iota(longest.begin(), longest.end(), 0);
    const auto boxes = [&](uint32_t t) { return x.segments[x.tasks[t + 1] - 1].end - x.segments[x.tasks[t]].begin; };
    std::stable_sort(longest.begin(), longest.end(), [&](uint32_t s, uint32_t t) { return boxes(s) > boxes(t); });
  }
  int64_t count = 0, done = 0, *indices = out.indices + b * a.max_output;
  for (int64_t ranks = std::max<int64_t>(4 * a.max_output, 1024); done < x.n && count < a.max_output; ranks *= 4) {
    int64_t end = a.max_output >= x.n ? x.n : std::min(ranks, x.n);  // as many as may be enough, then four times as many
    if (parallel)
      run_tasks(x.n_tasks, 0, [&](int64_t task, char*) { kernels.suppress(a, x, longest[task], end); });
    else
      for (int64_t task = 0; task < x.n_tasks; task++) kernels.suppress(a, x, task, end);
    for (; done < end && count < a.max_output; done++) {
      indices[count] = x.order[done];
      count += x.keep[done];
    }
  }
  std::fill(indices + count, indices + a.max_output, -1);
  if (out.counts) out.counts[b] = count;
  if (out.suppressor) {
    int64_t* suppressor = out.suppressor + b * a.N;
    std::fill(suppressor, suppressor + a.N, -2);
    for (int64_t r = 0; r < x.n; r++) suppressor[x.order[r]] = r >= done ? -3 : x.keep[r] ? -1 : int64_t(x.order[x.suppressor[r]]);
  }
  return count;
}

// Boxes (N, 4), or (B, N, 4) and all else in the same way.
static Nms arguments(const Tensor& boxes, const Tensor& scores, const Maybe& classes, double iou_threshold, int64_t max_output) {
  Nms a;
  int64_t d = boxes.dim() - 2;  // of the boxes
  a.N = boxes.size(d), a.max_output = max_output;
  a.boxes = (const char*)boxes.data_ptr(), a.box_type = dtype_of(boxes), a.box = boxes.stride(d), a.coordinate = boxes.stride(d + 1);
  a.scores = (const char*)scores.data_ptr(), a.score_type = dtype_of(scores), a.score = scores.stride(d);
  if (classes) a.classes = (const int64_t*)classes->data_ptr(), a.class_ = classes->stride(d);
  if (d == 1) {
    a.B = boxes.size(0), a.box_image = boxes.stride(0), a.score_image = scores.stride(0);
    if (classes) a.class_image = classes->stride(0);
  }
  a.threshold = iou_threshold;
  if (a.box_type != Dtype::f64) {
    float t = float(iou_threshold);
    a.threshold = t > iou_threshold ? std::nextafter(t, 0.0f) : t;
  }
  return a;
}

static Tensor nms(Tensor boxes, Tensor scores, Maybe idxs, double iou_threshold) {
  Nms a = arguments(boxes, scores, idxs, iou_threshold, boxes.size(0));
  Image x;
  size_t bytes = carve(a, nullptr, x);
  Workspace memory(bytes);
  carve(a, memory.get(), x);
  Results out{(int64_t*)x.pairs};  // of which nothing is left once the boxes are in their order
  int64_t count = run_image(a, kernels_at[level()], 0, x, true, out);
  Tensor kept = fresh({count}, torch::headeronly::ScalarType::Long);
  std::copy(out.indices, out.indices + count, (int64_t*)kept.data_ptr());
  return kept;
}

static void nms_padded(Tensor boxes, Tensor scores, Maybe classes, double iou_threshold, std::optional<double> score_threshold,
                       Tensor indices, Tensor counts, Maybe suppressor) {
  Nms a = arguments(boxes, scores, classes, iou_threshold, indices.size(1));
  a.drop = true, a.above = bool(score_threshold), a.score_threshold = score_threshold.value_or(0);
  a.want_suppressor = bool(suppressor);
  Results out{(int64_t*)indices.data_ptr(), (int64_t*)counts.data_ptr(), suppressor ? (int64_t*)suppressor->data_ptr() : nullptr};
  const NmsKernels& kernels = kernels_at[level()];
  Image x;
  size_t bytes = carve(a, nullptr, x);
  if (a.B == 1) {
    Workspace memory(bytes);
    carve(a, memory.get(), x);
    run_image(a, kernels, 0, x, true, out);
    return;
  }
  run_tasks(a.B, bytes, [&](int64_t b, char* memory) {
    Image mine;
    carve(a, memory, mine);
    run_image(a, kernels, b, mine, false, out);
  });
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def(
      "_nms_padded(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold, float? score_threshold, Tensor(a!) indices, "
      "Tensor(b!) counts, Tensor(c!)? suppressor) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("nms", TORCH_BOX(&minkernels::nms));  // defined in Python
  m.impl("_nms_padded", TORCH_BOX(&minkernels::nms_padded));
}

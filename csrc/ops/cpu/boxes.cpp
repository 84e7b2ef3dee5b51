// The IoU family on CPU tensors: how the work is shared out, and sums finished. The arithmetic is in boxes_kernel.h.
#include "boxes.h"

#include <optional>
#include <vector>

#include "runtime.h"

#define KERNEL "boxes_kernel.h"
#include "levels.h"

namespace minkernels {

using Maybe = std::optional<Tensor>;

template <int KIND>
static BoxKernels kernels_of_kind(Dtype dtype) {
  static constexpr BoxKernels (*kernels_at[][4])() = {WIDE_LEVELS(box_kernels<half, KIND>), LEVELS(box_kernels<bfloat16, KIND>),
                                                      WIDE_LEVELS(box_kernels<float, KIND>), WIDE_LEVELS(box_kernels<double, KIND>)};
  return kernels_at[int(dtype)][level()]();
}

static BoxKernels kernels_for(const Tensor& t, int64_t kind) {
  static constexpr BoxKernels (*of_kind[])(Dtype) = {kernels_of_kind<0>, kernels_of_kind<1>, kernels_of_kind<2>, kernels_of_kind<3>};
  return of_kind[kind](dtype_of(t));
}

static Boxes boxes(const Tensor& t) {  // (sets, boxes, 4), or (boxes, 4)
  bool sets = t.dim() == 3;
  return {(const char*)t.data_ptr(), sets ? t.stride(0) : 0, t.stride(sets), t.stride(sets + 1)};
}

static int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

static char* output(const Tensor& t) {
  char* p = (char*)t.data_ptr();
  advise_huge_pages(p, t.numel() * t.element_size());
  return p;
}

static void box_pairs_fwd(Tensor a, Tensor b, int64_t kind, int64_t format, double eps, Tensor out) {
  Pairs p{boxes(a), boxes(b), a.size(0), a.size(1), b.size(1), Format(format), eps};
  p.out = output(out);
  p.rows = std::clamp<int64_t>((1 << 16) / std::min(std::max<int64_t>(p.M, 1), COLUMNS), 64, 4096);
  BoxKernels kernels = kernels_for(a, kind);
  run_tasks(p.sets * parts_of(p.N, p.rows) * parts_of(p.M, COLUMNS), PAIRS_SCRATCH,
            [&](int64_t task, char* scratch) { kernels.pairs(p, task, scratch); });
}

// The gradient of n boxes of each set, from the sums of each part: in order, whatever thread was first.
template <class A>
static void finish_grads(const double* sums, int64_t sets, int64_t parts, int64_t n, Format format, A* grad) {
  constexpr int64_t BOXES = 4096;  // of a task
  run_tasks(parts_of(sets * n, BOXES), 0, [&](int64_t task, char*) {
    for (int64_t i = task * BOXES; i < std::min((task + 1) * BOXES, sets * n); i++) {
      const double* from = sums + (i / n * parts * n + i % n) * 4;
      double d[4] = {};
      for (int64_t part = 0; part < parts; part++)
        for (int64_t k = 0; k < 4; k++) d[k] += from[part * n * 4 + k];
      double x = d[0] + d[2], y = d[1] + d[3];
      if (format == Format::cxcywh) d[2] = (d[2] - d[0]) / 2, d[3] = (d[3] - d[1]) / 2;
      if (format != Format::xyxy) d[0] = x, d[1] = y;
      for (int64_t k = 0; k < 4; k++) grad[i * 4 + k] = A(d[k]);
    }
  });
}

static void box_pairs_bwd(Tensor dout, Tensor a, Tensor b, int64_t kind, int64_t format, double eps, Maybe da, Maybe db) {
  Pairs p{boxes(a), boxes(b), a.size(0), a.size(1), b.size(1), Format(format), eps};
  p.dout = (const char*)dout.data_ptr(), p.dout_set = dout.stride(0), p.dout_row = dout.stride(1), p.dout_column = dout.stride(2);
  const auto divide = [](int64_t n, int64_t least, int64_t& part, int64_t& parts) {
    part = parts_of(std::max(parts_of(n, MOST_PARTS), least), least) * least;
    parts = std::max<int64_t>(parts_of(n, part), 1);
  };
  divide(p.N, 64, p.row_part, p.row_parts);
  divide(p.M, COLUMNS, p.column_part, p.column_parts);
  size_t of_a = da ? p.sets * p.column_parts * p.N * 4 : 0, of_b = db ? p.sets * p.row_parts * p.M * 4 : 0;
  Workspace workspace((of_a + of_b) * sizeof(double));
  if (da) p.sums_a = (double*)workspace.get();
  if (db) p.sums_b = (double*)workspace.get() + of_a;
  BoxKernels kernels = kernels_for(a, kind);
  run_tasks(p.sets * p.row_parts * p.column_parts, PAIRS_SCRATCH,
            [&](int64_t task, char* scratch) { kernels.pairs_grad(p, task, scratch); });
  const auto finish = [&](const Maybe& grad, const double* sums, int64_t parts, int64_t n) {
    if (!grad || !p.sets || !n) return;
    if (dtype_of(a) == Dtype::f64)
      finish_grads(sums, p.sets, parts, n, p.format, (double*)grad->data_ptr());
    else
      finish_grads(sums, p.sets, parts, n, p.format, (float*)grad->data_ptr());
  };
  finish(da, p.sums_a, p.column_parts, p.N);
  finish(db, p.sums_b, p.row_parts, p.M);
}

static void iou_match(Tensor a, Tensor b, int64_t format, Tensor best_iou, Tensor best_gt, Tensor gt_best_iou, Tensor gt_best_box) {
  constexpr int64_t most = 64, least = 2048;  // parts of a set; boxes of a part
  Match m{boxes(a),
          boxes(b),
          a.size(1),
          b.size(1),
          Format(format),
          1,
          1,
          output(best_iou),
          (int64_t*)output(best_gt),
          output(gt_best_iou),
          (int64_t*)output(gt_best_box)};
  int64_t sets = a.size(0), item = a.element_size();
  m.part = std::max(parts_of(m.N, most), least), m.parts = parts_of(m.N, m.part);
  int64_t partial = sets * m.parts * m.G;
  Workspace workspace(partial * (sizeof(int64_t) + item));
  m.part_box = (int64_t*)workspace.get(), m.part_iou = workspace.get() + partial * sizeof(int64_t);
  BoxKernels kernels = kernels_for(a, 0);
  run_tasks(sets * m.parts, match_scratch(std::min(m.part, m.N), item),
            [&](int64_t task, char* scratch) { kernels.match(m, task, scratch); });
  run_tasks(m.G ? sets : 0, 0, [&](int64_t set, char*) { kernels.match_finish(m, set); });
}

static Loss loss_of(const Tensor& a, const Tensor& b, int64_t format, double eps) {
  return {boxes(a), boxes(b), a.size(0), Format(format), eps};
}

// Returns the sum of the losses; each is written if loss is given.
static double iou_loss_fwd(Tensor a, Tensor b, int64_t kind, int64_t format, double eps, Maybe loss) {
  Loss x = loss_of(a, b, format, eps);
  if (loss) x.loss = output(*loss);
  BoxKernels kernels = kernels_for(a, kind);
  std::vector<double> sums(parts_of(x.P, LOSS_TASK));
  run_tasks(sums.size(), 0, [&](int64_t task, char*) { sums[task] = kernels.loss(x, task); });
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

static void iou_loss_bwd(Tensor dloss, Tensor a, Tensor b, int64_t kind, int64_t format, double eps, Maybe da, Maybe db) {
  Loss x = loss_of(a, b, format, eps);
  x.dloss = (const char*)dloss.data_ptr(), x.dloss_stride = dloss.stride(0);
  if (da) x.da = output(*da);
  if (db) x.db = output(*db);
  BoxKernels kernels = kernels_for(a, kind);
  run_tasks(parts_of(x.P, LOSS_TASK), 0, [&](int64_t task, char*) { kernels.loss_grad(x, task); });
}

}  // namespace minkernels

#define OPTIONS "int kind, int format, float eps, "

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {  // boxes are (sets, boxes, 4), of a loss (boxes, 4); outputs are contiguous
  m.def("_box_pairs_fwd(Tensor a, Tensor b, " OPTIONS "Tensor(a!) out) -> ()");
  m.def("_box_pairs_bwd(Tensor dout, Tensor a, Tensor b, " OPTIONS "Tensor(a!)? da, Tensor(b!)? db) -> ()");
  m.def(
      "_iou_match(Tensor a, Tensor b, int format, Tensor(a!) best_iou, Tensor(b!) best_gt, Tensor(c!) gt_best_iou, Tensor(d!) gt_best_box) "
      "-> ()");
  m.def("_iou_loss_fwd(Tensor a, Tensor b, " OPTIONS "Tensor(a!)? loss) -> float");
  m.def("_iou_loss_bwd(Tensor dloss, Tensor a, Tensor b, " OPTIONS "Tensor(a!)? da, Tensor(b!)? db) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("_box_pairs_fwd", TORCH_BOX(&minkernels::box_pairs_fwd));
  m.impl("_box_pairs_bwd", TORCH_BOX(&minkernels::box_pairs_bwd));
  m.impl("_iou_match", TORCH_BOX(&minkernels::iou_match));
  m.impl("_iou_loss_fwd", TORCH_BOX(&minkernels::iou_loss_fwd));
  m.impl("_iou_loss_bwd", TORCH_BOX(&minkernels::iou_loss_bwd));
}

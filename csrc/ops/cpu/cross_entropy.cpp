// The softmax operators on CPU tensors: labels checked, rows shared out. The arithmetic is in cross_entropy_kernel.h.
#include "cross_entropy.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "runtime.h"

#define KERNEL "cross_entropy_kernel.h"
#include "levels.h"

namespace minkernels {

using Maybe = std::optional<Tensor>;

static constexpr SoftmaxKernels kernels_at[][4] = {WIDE_LEVELS(softmax_kernels<half>), LEVELS(softmax_kernels<bfloat16>),
                                                   WIDE_LEVELS(softmax_kernels<float>), WIDE_LEVELS(softmax_kernels<double>)};

static bool is_label(const Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Byte;
}

// (N, V) as (N, V, 1), or, where its rows lie side by side, as (1, V, N).
static Volume volume(const Tensor& t, bool columns) {
  Volume v{(char*)t.data_ptr(), 0, t.stride(1), 0, dtype_of(t)};
  if (t.dim() == 3)
    v.batch = t.stride(0), v.position = t.stride(2);
  else
    (columns ? v.position : v.batch) = t.stride(0);
  return v;
}

struct Options {
  int64_t ignore_index;
  double smoothing, z_loss, softcap, scale;
};

static Softmax arguments(const Tensor& input, const Tensor& target, const Maybe& weight, const Options& x) {
  Softmax a;
  bool columns = input.dim() == 2 && input.stride(0) == 1 && input.size(0) > 1 && input.stride(1) != 1;
  a.logits = volume(input, columns);
  a.B = columns ? 1 : input.size(0), a.V = input.size(1), a.D = columns ? input.size(0) : input.dim() == 3 ? input.size(2) : 1;
  if (is_label(target)) {
    a.target = (const char*)target.data_ptr(), a.label_bytes = int(target.element_size());
    a.target_batch = columns ? 0 : target.stride(0);
    a.target_position = columns ? target.stride(0) : target.dim() == 2 ? target.stride(1) : 0;
  } else {
    a.probs = volume(target, columns);
  }
  a.weight_sum = double(a.V);
  if (weight) {
    a.weight = (const char*)weight->data_ptr(), a.weight_sum = 0;
    bool wide = dtype_of(*weight) == Dtype::f64;
    for (int64_t i = 0; i < a.V; i++) a.weight_sum += wide ? ((const double*)a.weight)[i] : ((const float*)a.weight)[i];
  }
  a.ignore_index = x.ignore_index, a.smoothing = x.smoothing, a.z_loss = x.z_loss, a.softcap = x.softcap, a.scale = x.scale;
  return a;
}

static void want_grad(Softmax& a, const Tensor& grad) {
  bool columns = grad.dim() == 2 && a.D > 1;
  a.grad = volume(grad, columns);
  constexpr int64_t larger_than_a_cache = 32 << 20;
  int64_t bytes = grad.numel() * grad.element_size();
  a.stream = bytes >= larger_than_a_cache && a.grad.data != a.logits.data;
  a.fresh = a.stream && !resident(a.grad.data, bytes);
  advise_huge_pages(a.grad.data, bytes);
}

// What the labels alone tell: the first row whose label names no class, or -1; how many rows count, and the sum of their weights.
struct Labels {
  int64_t bad = -1;
  double count = 0, weight = 0;
};

// Adds n labels, of rows from `row` on. The first loop, which most calls need alone, has neither a branch nor a chain of additions in
// double.
template <class L>
static void scan_labels(const Softmax& a, const L* labels, int64_t step, int64_t row, int64_t n, Labels& part) {
  const auto counts = [&](int64_t k) { return int64_t(labels[k * step]) != a.ignore_index; };
  const auto bad = [&](int64_t k) { return counts(k) & (uint64_t(labels[k * step]) >= uint64_t(a.V)); };
  int64_t counted = 0, found = 0;
  for (int64_t k = 0; k < n; k++) counted += counts(k), found += bad(k);
  part.count += double(counted);
  for (int64_t k = 0; k < n && found && part.bad < 0; k++)
    if (bad(k)) part.bad = row + k;
  bool wide = a.logits.dtype == Dtype::f64;
  for (int64_t k = 0; k < n && a.weight && !found; k++)
    if (counts(k)) part.weight += wide ? ((const double*)a.weight)[labels[k * step]] : ((const float*)a.weight)[labels[k * step]];
}

static Labels check_labels(const Softmax& a) {
  constexpr int64_t rows = 1 << 15;  // of a task
  if (!a.target) return {-1, double(a.rows()), double(a.rows())};
  const bool flat = a.D == 1;
  const int64_t D = flat ? a.B : a.D, batch = flat ? 0 : a.target_batch, step = flat ? a.target_batch : a.target_position;
  std::vector<Labels> parts((a.rows() + rows - 1) / rows);
  run_tasks(parts.size(), 0, [&](int64_t task, char*) {
    Labels part;
    for (int64_t i = task * rows, end = std::min(i + rows, a.rows()); i < end && part.bad < 0;) {
      int64_t s = i % D, n = std::min(end - i, D - s);
      const char* from = a.target + (i / D * batch + s * step) * a.label_bytes;
      if (a.label_bytes == 8)
        scan_labels(a, (const int64_t*)from, step, i, n, part);
      else if (a.label_bytes == 4)
        scan_labels(a, (const int32_t*)from, step, i, n, part);
      else
        scan_labels(a, (const uint8_t*)from, step, i, n, part);
      i += n;
    }
    parts[task] = part;
  });
  Labels all;
  for (const Labels& part : parts) {
    all.count += part.count, all.weight += part.weight;
    if (part.bad >= 0 && all.bad < 0) all.bad = part.bad;
  }
  if (!a.weight) all.weight = all.count;
  return all;
}

// Short rows as positions.
static bool turn(Softmax& a) {
  if (!a.target || a.D != 1 || a.B < 8 || a.V > SHORT || a.logits.column != 1 || (a.grad.data && a.grad.column != 1)) return false;
  for (Volume* v : {&a.logits, &a.grad}) v->position = v->batch, v->batch = 0;
  a.target_position = a.target_batch, a.target_batch = 0;
  a.D = a.B, a.B = 1;
  return true;
}

// Every row, in tasks that depend on the shape alone; the sum of what they return, in their order.
static double run(Softmax& a, bool stats_alone = false) {
  SoftmaxKernels kernels = kernels_at[int(a.logits.dtype)][level()];
  constexpr int64_t elements = 1 << 15;  // of a task
  size_t item = a.logits.dtype == Dtype::f64 ? 8 : 4;
  int64_t tasks, group = 1, tiles = 1;
  size_t scratch = ((1 << 17) + (1 << 13)) * item;  // RowScratch, and the exponentials that are kept
  a.turned = (!stats_alone || a.argmax) && turn(a);
  bool positions = a.turned || (!stats_alone && a.D >= 8 && a.logits.position == 1 && a.logits.column != 1);
  if (positions) {
    constexpr int64_t in_cache = 1 << 14;  // elements of a block of classes
    a.class_block = std::min<int64_t>(a.V, 256);
    a.tile = a.turned ? 64 : std::clamp<int64_t>(in_cache / a.class_block / 64 * 64, 64, 512);
    tiles = (a.D + a.tile - 1) / a.tile, tasks = a.B * tiles;
    scratch = (a.tile + 64) * (8 + (11 + 2 * a.class_block) * item);
  } else {
    group = std::max<int64_t>(elements / a.V, 1);  // short rows go in groups
    tasks = (a.rows() + group - 1) / group;
  }
  std::vector<double> sums(tasks);
  run_tasks(tasks, scratch, [&](int64_t task, char* memory) {
    if (positions) {
      int64_t first = task % tiles * a.tile;
      sums[task] = kernels.positions(a, task / tiles, first, std::min(a.tile, a.D - first), memory);
    } else {
      sums[task] = kernels.rows(a, task * group, std::min((task + 1) * group, a.rows()), memory);
    }
  });
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

// As check_labels() of cross_entropy/_options.py; of std::out_of_range PyTorch makes an IndexError.
static void check_label(const Tensor& target, const Labels& labels, int64_t V) {
  const int64_t row = labels.bad, step = target.dim() == 2 ? target.size(1) : 1;
  if (row < 0) return;
  const int64_t at = row / step * target.stride(0) + (target.dim() == 2 ? row % step * target.stride(1) : 0);
  const int64_t bytes = target.element_size();
  const char* from = (const char*)target.data_ptr() + at * bytes;
  const int64_t label = bytes == 8 ? *(const int64_t*)from : bytes == 4 ? *(const int32_t*)from : *(const uint8_t*)from;
  const std::string where = std::to_string(row / step) + (target.dim() == 2 ? ", " + std::to_string(row % step) : "");
  throw std::out_of_range("target[" + where + "] is " + std::to_string(label) + ", out of range for " + std::to_string(V) +
                          " classes (0 to " + std::to_string(V - 1) + ")");
}

// divisor: of the mean, where these rows are a part of it. grad may be input.
static void forward(const Tensor& input, const Tensor& target, const Maybe& weight, const Options& x, Reduction reduction,
                    std::optional<double> divisor, bool empty_zero, const Tensor& loss, const Tensor& stats, const Maybe& grad) {
  Softmax a = arguments(input, target, weight, x);
  Labels labels = check_labels(a);
  check_label(target, labels, a.V);
  double sum_of_weights = divisor ? *divisor : labels.weight;
  if (reduction == Reduction::mean) a.factor = empty_zero && sum_of_weights == 0 ? 0 : 1 / sum_of_weights;
  if (grad) want_grad(a, *grad);
  a.stats = (char*)stats.data_ptr(), a.stats_columns = stats.size(1);
  advise_huge_pages(a.stats, stats.numel() * stats.element_size());
  if (reduction == Reduction::none) a.loss = (char*)loss.data_ptr();
  double sum = run(a) * a.factor;
  if (reduction == Reduction::none) return;
  if (a.logits.dtype == Dtype::f64)
    *(double*)loss.data_ptr() = sum;
  else
    *(float*)loss.data_ptr() = float(sum);
}

// Outputs as new_loss() and saved_stats() of cross_entropy/_options.py make them.
static std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor input, Tensor target, Maybe weight, int64_t ignore_index,
                                                            double smoothing, double z_loss, double softcap, double scale,
                                                            StringHandle reduction, bool empty_zero, bool with_grad) {
  const Reduction how = take_reduction(reduction);
  std::vector<int64_t> rows{input.size(0)};
  for (int64_t d = 2; d < input.dim(); d++) rows.push_back(input.size(d));
  const int64_t count = rows.size() == 2 ? rows[0] * rows[1] : rows[0];
  if (how != Reduction::none) rows.clear();
  Tensor loss = fresh(rows, wide_dtype(input));
  Tensor stats = fresh({count, is_label(target) ? 2 : 3}, wide_dtype(input));
  Tensor grad = with_grad ? minkernels::empty_like(input) : fresh({0}, input.scalar_type());
  forward(input, target, weight, {ignore_index, smoothing, z_loss, softcap, scale}, how, std::nullopt, empty_zero, loss, stats,
          with_grad ? Maybe(grad) : std::nullopt);
  return {loss, stats, grad};
}

// A part of the rows of a loss, for linear_cross_entropy.
static void cross_entropy_part(Tensor input, Tensor target, Maybe weight, int64_t ignore_index, double smoothing, double z_loss,
                               double softcap, double scale, StringHandle reduction, double divisor, bool empty_zero, Tensor loss,
                               Tensor stats, Maybe grad) {
  forward(input, target, weight, {ignore_index, smoothing, z_loss, softcap, scale}, take_reduction(reduction), divisor, empty_zero, loss,
          stats, grad);
}

// As many columns of statistics as stats has; a label that names no class is of another shard if shard is set.
static void softmax_stats(Tensor input, Tensor target, Maybe weight, int64_t ignore_index, double smoothing, double z_loss, double softcap,
                          double scale, bool shard, Tensor stats, Maybe argmax) {
  Softmax a = arguments(input, target, weight, {ignore_index, smoothing, z_loss, softcap, scale});
  if (!shard) check_label(target, check_labels(a), a.V);
  a.stats = (char*)stats.data_ptr(), a.stats_columns = stats.size(1);
  if (argmax) a.argmax = (int64_t*)argmax->data_ptr();
  run(a, true);
}

static void softmax_grad(Tensor input, Tensor target, Maybe weight, Tensor coefficients, int64_t ignore_index, double smoothing,
                         double z_loss, double softcap, double scale, Tensor grad) {
  Softmax a = arguments(input, target, weight, {ignore_index, smoothing, z_loss, softcap, scale});
  want_grad(a, grad);
  a.coefficients = (const char*)coefficients.data_ptr();
  run(a);
}

}  // namespace minkernels

#define OPTIONS "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale, "

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def("_cross_entropy_part(Tensor input, Tensor target, Tensor? weight, " OPTIONS
        "str reduction, float divisor, bool empty_zero, Tensor(a!) loss, Tensor(b!) stats, Tensor(c!)? grad) -> ()");
  m.def("_softmax_stats(Tensor input, Tensor target, Tensor? weight, " OPTIONS "bool shard, Tensor(a!) stats, Tensor(b!)? argmax) -> ()");
  m.def("_softmax_grad(Tensor input, Tensor target, Tensor? weight, Tensor coefficients, " OPTIONS "Tensor(a!) grad) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&minkernels::cross_entropy_fwd));
  m.impl("_cross_entropy_part", TORCH_BOX(&minkernels::cross_entropy_part));
  m.impl("_softmax_stats", TORCH_BOX(&minkernels::softmax_stats));
  m.impl("_softmax_grad", TORCH_BOX(&minkernels::softmax_grad));
}

// The cross-entropy operators on CPU tensors: labels checked, rows shared out. The arithmetic is in cross_entropy_kernel.h.
#include "cross_entropy.h"

#include <optional>

#include "runtime.h"

#define KERNEL "cross_entropy_kernel.h"
#include "levels.h"

namespace minkernels {

static constexpr CrossEntropyKernels (*kernels_at[])(Dtype) = LEVELS(cross_entropy_kernels);

static CrossEntropy arguments(const Tensor& input, const Tensor& target, const Tensor& stats, int64_t ignore_index) {
  CrossEntropy a;
  a.logits = (const char*)input.data_ptr(), a.row = input.stride(0), a.column = input.stride(1);
  a.N = input.size(0), a.V = input.size(1);
  a.target = (const char*)target.data_ptr(), a.target_stride = target.stride(0);
  a.target_is_int32 = target.element_size() == 4;
  a.ignore_index = ignore_index, a.stats = (char*)stats.data_ptr();
  return a;
}

static void want_grad(CrossEntropy& a, const Tensor& grad) {
  a.grad = (char*)grad.data_ptr(), a.grad_row = grad.stride(0), a.grad_column = grad.stride(1);
  advise_huge_pages(a.grad, grad.numel() * grad.element_size());
}

static int64_t count(const CrossEntropy& a) {
  int64_t n = 0;
  for (int64_t i = 0; i < a.N; i++) n += a.label(i) != a.ignore_index;
  return n;
}

template <class F>
static void run_rows(const CrossEntropy& a, F f) {
  constexpr int64_t elements = 1 << 15;  // of a task: short rows go in groups
  int64_t rows = std::max<int64_t>(elements / a.V, 1);
  run_tasks((a.N + rows - 1) / rows, 0, [&](int64_t task, char*) { f(task * rows, std::min((task + 1) * rows, a.N)); });
}

// Sums in double, in the order of the rows.
template <class A>
static void reduce(const char* losses, int64_t n, double factor, char* out) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += ((const A*)losses)[i];
  *(A*)out = A(sum * factor);
}

// Returns the first row whose label names no class, before anything is written; -1 if there is none.
static int64_t cross_entropy_fwd(Tensor input, Tensor target, int64_t ignore_index, int64_t reduction, Tensor loss, Tensor stats,
                                 std::optional<Tensor> grad) {
  CrossEntropy a = arguments(input, target, stats, ignore_index);
  for (int64_t i = 0; i < a.N; i++)
    if (a.label(i) != ignore_index && (a.label(i) < 0 || a.label(i) >= a.V)) return i;
  double mean = Reduction(reduction) == Reduction::mean ? 1.0 / double(count(a)) : 1.0;
  if (grad) {
    want_grad(a, *grad);
    a.factor = mean;
  }
  Dtype dtype = dtype_of(input);
  CrossEntropyKernels kernels = kernels_at[level()](dtype);
  Memory losses;
  if (Reduction(reduction) == Reduction::none)
    a.loss = (char*)loss.data_ptr();
  else
    losses = allocate(a.N * stats.element_size()), a.loss = losses.get();
  run_rows(a, [&](int64_t first, int64_t last) { kernels.forward(a, first, last); });
  if (losses) (dtype == Dtype::f64 ? reduce<double> : reduce<float>)(a.loss, a.N, mean, (char*)loss.data_ptr());
  return -1;
}

static void cross_entropy_bwd(Tensor dloss, Tensor input, Tensor target, Tensor stats, int64_t ignore_index, int64_t reduction,
                              Tensor grad) {
  CrossEntropy a = arguments(input, target, stats, ignore_index);
  want_grad(a, grad);
  a.dloss = (const char*)dloss.data_ptr(), a.dloss_stride = dloss.dim() ? dloss.stride(0) : 0;
  if (Reduction(reduction) == Reduction::mean) a.factor = 1.0 / double(count(a));
  CrossEntropyKernels kernels = kernels_at[level()](dtype_of(input));
  run_rows(a, [&](int64_t first, int64_t last) { kernels.backward(a, first, last); });
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def(
      "_cross_entropy_fwd(Tensor input, Tensor target, int ignore_index, int reduction, Tensor(a!) loss, Tensor(b!) stats, "
      "Tensor(c!)? grad) -> int");
  m.def(
      "_cross_entropy_bwd(Tensor dloss, Tensor input, Tensor target, Tensor stats, int ignore_index, int reduction, Tensor(a!) grad) "
      "-> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("_cross_entropy_fwd", TORCH_BOX(&minkernels::cross_entropy_fwd));
  m.impl("_cross_entropy_bwd", TORCH_BOX(&minkernels::cross_entropy_bwd));
}

// merge_attention on CPU tensors. Outputs are (B, H, M, D), log-sum-exps (B, H, M), contiguous and in the arithmetic's dtype; all results
// are allocated above. The arithmetic is in merge_kernel.h.
#include "merge.h"

#include <optional>

#include "runtime.h"

#define KERNEL "merge_kernel.h"
#include "levels.h"

namespace minkernels {

template <class A>
static constexpr MergeKernels<A> kernels_at[] = LEVELS(merge_kernels<A>);

static Rows rows_of(const Tensor& t) {
  Rows rows{(char*)t.data_ptr(), dtype_of(t), {}};
  for (int i = 0; i < 4; i++) rows.stride[i] = t.stride(i);
  return rows;
}
static Rows result(const Tensor& t) {
  advise_huge_pages(t.data_ptr(), t.numel() * t.element_size());
  return rows_of(t);
}

template <class A>
static Merge<A> merge_of(const Tensor& out1, const Tensor& lse1, const Tensor& out2, const Tensor& lse2) {
  Merge<A> x;
  x.B = out1.size(0), x.H = out1.size(1), x.M = out1.size(2), x.D = out1.size(3);
  x.out[0] = rows_of(out1), x.out[1] = rows_of(out2);
  x.lse[0] = (const A*)lse1.data_ptr(), x.lse[1] = (const A*)lse2.data_ptr();
  return x;
}

template <class A, class F>
static void run_merge(const Merge<A>& x, F kernel) {
  const int64_t threads = x.rows() * x.D < 32768 ? 1 : INT64_MAX;  // below, one is done before another begins
  run_tasks((x.rows() + MERGE_ROWS - 1) / MERGE_ROWS, 0, [&](int64_t task, char*) { kernel(x, task); }, threads);
}

static void merge_fwd(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2, Tensor out, Tensor lse) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    Merge<A> x = merge_of<A>(out1, lse1, out2, lse2);
    x.merged = result(out), x.merged_lse = (A*)lse.data_ptr();
    run_merge(x, kernels_at<A>[level()].forward);
  };
  dtype_of(lse) == Dtype::f64 ? run(0.0) : run(0.0f);
}

static void merge_bwd(Tensor dout, std::optional<Tensor> dlse, Tensor out1, Tensor lse1, Tensor out2, Tensor lse2, Tensor dout1,
                      Tensor dlse1, Tensor dout2, Tensor dlse2) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    Merge<A> x = merge_of<A>(out1, lse1, out2, lse2);
    x.dmerged = rows_of(dout), x.dmerged_lse = dlse ? (const A*)dlse->data_ptr() : nullptr;
    x.dout[0] = result(dout1), x.dout[1] = result(dout2);
    x.dlse[0] = (A*)dlse1.data_ptr(), x.dlse[1] = (A*)dlse2.data_ptr();
    run_merge(x, kernels_at<A>[level()].backward);
  };
  dtype_of(lse1) == Dtype::f64 ? run(0.0) : run(0.0f);
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def("_merge_fwd(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "_merge_bwd(Tensor dout, Tensor? dlse, Tensor out1, Tensor lse1, Tensor out2, Tensor lse2, Tensor(a!) dout1, Tensor(b!) dlse1, "
      "Tensor(c!) dout2, Tensor(d!) dlse2) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("_merge_fwd", TORCH_BOX(&minkernels::merge_fwd));
  m.impl("_merge_bwd", TORCH_BOX(&minkernels::merge_bwd));
}

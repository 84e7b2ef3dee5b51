// merge_attention's operators on CPU tensors. Outputs are (B, H, M, D), log-sum-exps (B, H, M) in the arithmetic's dtype; results are as
// merge_like() of attention/_options.py makes them. The arithmetic is in merge_kernel.h.
#include "merge.h"

#include <optional>
#include <tuple>

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
static Tensor out_like(const Tensor& t) {
  const Tensor out = fresh_like(t, t.scalar_type());
  advise_huge_pages(out.data_ptr(), out.numel() * out.element_size());
  return out;
}
static Tensor lse_like(const Tensor& t) { return fresh(t.sizes(), t.scalar_type()); }
static Tensor contiguous_of(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

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

static std::tuple<Tensor, Tensor> merge_fwd(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) {
  lse1 = contiguous_of(lse1), lse2 = contiguous_of(lse2);
  const Tensor out = out_like(out1), lse = lse_like(lse1);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    Merge<A> x = merge_of<A>(out1, lse1, out2, lse2);
    x.merged = rows_of(out), x.merged_lse = (A*)lse.data_ptr();
    run_merge(x, kernels_at<A>[level()].forward);
  };
  dtype_of(lse) == Dtype::f64 ? run(0.0) : run(0.0f);
  return {out, lse};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> merge_bwd(Tensor dout, std::optional<Tensor> dlse, Tensor out1, Tensor lse1, Tensor out2,
                                                            Tensor lse2) {
  lse1 = contiguous_of(lse1), lse2 = contiguous_of(lse2);
  if (dlse) dlse = contiguous_of(*dlse);
  const Tensor dout1 = out_like(out1), dlse1 = lse_like(lse1), dout2 = out_like(out2), dlse2 = lse_like(lse2);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    Merge<A> x = merge_of<A>(out1, lse1, out2, lse2);
    x.dmerged = rows_of(dout), x.dmerged_lse = dlse ? (const A*)dlse->data_ptr() : nullptr;
    x.dout[0] = rows_of(dout1), x.dout[1] = rows_of(dout2);
    x.dlse[0] = (A*)dlse1.data_ptr(), x.dlse[1] = (A*)dlse2.data_ptr();
    run_merge(x, kernels_at<A>[level()].backward);
  };
  dtype_of(lse1) == Dtype::f64 ? run(0.0) : run(0.0f);
  return {dout1, dlse1, dout2, dlse2};
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("merge_attention_fwd", TORCH_BOX(&minkernels::merge_fwd));
  m.impl("merge_attention_bwd", TORCH_BOX(&minkernels::merge_bwd));
}

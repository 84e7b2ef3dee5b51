// The attention operators on CPU tensors: which keys count, workspace, threads. The arithmetic is in attention_kernel.h.
#include "attention.h"

#include <cstring>
#include <optional>
#include <thread>

#include "runtime.h"

#define KERNEL "attention_kernel.h"
#include "levels.h"

namespace minkernels {

static constexpr const AttentionKernels* (*kernels_at[])(Dtype) = LEVELS(attention_kernels);

static View view(const Tensor& t) { return {(char*)t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Fills in a.keys and a.seen, and returns the memory that holds them.
static Memory list_keys(Attention& a, const std::optional<Tensor>& key_mask) {
  a.masked = key_mask.has_value();
  int64_t lists = a.masked ? a.B : 1;
  Memory memory = allocate(lists * (2 * a.N + 1) * sizeof(int32_t));
  int32_t *keys = (int32_t*)memory.get(), *seen = keys + lists * a.N;
  a.keys = keys, a.seen = seen;
  const char* mask = a.masked ? (const char*)key_mask->data_ptr() : nullptr;
  for (int64_t b = 0; b < lists; b++, keys += a.N, seen += a.N + 1) {
    int32_t n = 0;
    for (int64_t j = 0; j < a.N; j++) {
      seen[j] = n, keys[n] = int32_t(j);  // overwritten by the next key if this one is hidden
      n += mask ? mask[b * key_mask->stride(0) + j * key_mask->stride(1)] != 0 : 1;
    }
    seen[a.N] = n;
  }
  return memory;
}

static Attention arguments(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale) {
  Attention a;
  a.q = view(q), a.k = view(k), a.v = view(v);
  a.B = q.size(0), a.H = q.size(1), a.M = q.size(2), a.D = q.size(3);
  a.Hkv = k.size(1), a.N = k.size(2), a.Dv = v.size(3);
  a.causal = causal, a.scale = scale, a.dtype = dtype_of(q);
  a.yield = std::this_thread::yield;
  return a;
}

static void run(Attention& a, const std::optional<Tensor>& key_mask, bool backward) {
  const AttentionKernels& kernels = kernels_at[level()](a.dtype)[backward];
  Memory lists = list_keys(a, key_mask);
  kernels.plan(a);
  Workspace work(a.work_bytes);
  a.work = work.get();
  std::memset(a.work + a.turn, 0, a.turns * sizeof(int64_t));
  run_tasks(a.pack_tasks, a.scratch_bytes, [&](int64_t task, char* scratch) { kernels.pack(a, task, scratch); });
  run_tasks(a.tasks, a.scratch_bytes, [&](int64_t task, char* scratch) { kernels.run(a, task, scratch); });
}

static void attention_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, bool causal, double scale, Tensor o, Tensor lse) {
  Attention a = arguments(q, k, v, causal, scale);
  a.o = view(o), a.lse = (char*)lse.data_ptr();
  advise_huge_pages(a.o.data, o.numel() * o.element_size());
  run(a, key_mask, false);
}

static void attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, std::optional<Tensor> key_mask, bool causal,
                          double scale, Tensor dq, Tensor dk, Tensor dv) {
  Attention a = arguments(q, k, v, causal, scale);
  a.o = view(o), a.lse = (char*)lse.data_ptr();
  a.dout = view(dout), a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  for (const Tensor* t : {&dq, &dk, &dv}) advise_huge_pages(t->data_ptr(), t->numel() * t->element_size());
  run(a, key_mask, true);
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def("_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_mask, bool causal, float scale, Tensor(a!) o, Tensor(b!) lse) -> ()");
  m.def(
      "_attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? key_mask, bool causal, float scale, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("_attention_fwd", TORCH_BOX(&minkernels::attention_fwd));
  m.impl("_attention_bwd", TORCH_BOX(&minkernels::attention_bwd));
}

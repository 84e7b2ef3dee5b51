// Sums of bfloat16 products in float, kept where the bfloat16 result will be: its upper halves in the result, its lower halves beside it.
// So the gradient of a weight takes 4 bytes a number while it is summed, not 6.
#include <optional>

#include "runtime.h"

namespace minkernels {

static float join(uint16_t hi, uint16_t lo) {
  uint32_t bits = uint32_t(hi) << 16 | lo;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
static uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

static float widen(float x) { return x; }
static float widen(uint16_t x) { return join(x, 0); }

template <bool First, bool Last, class X>
static void add(uint16_t* __restrict hi, uint16_t* __restrict lo, const X* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t sum = bits_of((First ? 0.0f : join(hi[i], lo[i])) + widen(x[i]));
    if (Last) {  // to the nearest, ties to even; a NaN stays one
      bool nan = (sum & 0x7fffffff) > 0x7f800000;
      hi[i] = nan ? uint16_t(sum >> 16 | 0x40) : uint16_t((sum + 0x7fff + (sum >> 16 & 1)) >> 16);
    } else {
      hi[i] = uint16_t(sum >> 16), lo[i] = uint16_t(sum);
    }
  }
}

template <class X>
static void add_all(Tensor hi, Tensor lo, Tensor x, bool first, bool last) {
  constexpr int64_t piece = 1 << 15;
  const auto f = first ? (last ? add<true, true, X> : add<true, false, X>) : (last ? add<false, true, X> : add<false, false, X>);
  int64_t n = x.numel();
  run_tasks((n + piece - 1) / piece, 0, [&](int64_t task, char*) {
    int64_t at = task * piece;
    f((uint16_t*)hi.data_ptr() + at, (uint16_t*)lo.data_ptr() + at, (const X*)x.data_ptr() + at, std::min(piece, n - at));
  });
}

// (hi, lo) += x, bfloat16 or float; the first time they are taken for 0, the last time hi becomes the rounded sum. All contiguous.
static void add_bfloat16(Tensor hi, Tensor lo, Tensor x, bool first, bool last) {
  (dtype_of(x) == Dtype::f32 ? add_all<float> : add_all<uint16_t>)(hi, lo, x, first, last);
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def("_add_bfloat16(Tensor(a!) hi, Tensor(b!) lo, Tensor x, bool first, bool last) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) { m.impl("_add_bfloat16", TORCH_BOX(&minkernels::add_bfloat16)); }

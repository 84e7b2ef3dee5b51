// The attention kernels of float16 and bfloat16; what calls them is in attention.cpp.
#include "attention.h"

#define KERNEL "attention_kernel.h"
#include "levels.h"

namespace minkernels {

const AttentionRoads& attention_16bit(int level, Dtype dtype) {
  static constexpr const AttentionRoads& (*f16[])() = WIDE_LEVELS(attention_roads<half>);
  static constexpr const AttentionRoads& (*bf16[])() = LEVELS(attention_roads<bfloat16>);
  return dtype == Dtype::f16 ? f16[level]() : bf16[level]();
}

}  // namespace minkernels

// What the cross-entropy kernels are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

enum class Reduction : int64_t { none, mean, sum };

struct CrossEntropy {
  const char* logits = nullptr;  // (N, V); strides in elements
  int64_t row = 0, column = 0;
  char* grad = nullptr;  // (N, V), or null where none is wanted
  int64_t grad_row = 0, grad_column = 0;
  const char* target = nullptr;  // (N,) int64 or int32
  bool target_is_int32 = false;
  int64_t target_stride = 0, ignore_index = 0;
  int64_t N = 0, V = 0;
  char* stats = nullptr;        // (N, 2): the maximum of each row, the sum of exp(x - maximum); float, or double for double
  char* loss = nullptr;         // (N,) in the same type; forward alone
  const char* dloss = nullptr;  // backward alone
  int64_t dloss_stride = 0;     // 0: one for all rows
  double factor = 1;            // of the gradient: 1 / rows that count, for the mean

  int64_t label(int64_t i) const {
    i *= target_stride;
    return target_is_int32 ? ((const int32_t*)target)[i] : ((const int64_t*)target)[i];
  }
};

struct CrossEntropyKernels {
  void (*forward)(const CrossEntropy&, int64_t first, int64_t last);  // rows
  void (*backward)(const CrossEntropy&, int64_t first, int64_t last);
};

}  // namespace minkernels

// What the kernels of merge_attention are told: shared by every level, plain data. A is float or double.
#pragma once
#include "vec_includes.h"

namespace minkernels {

struct Rows {  // (B, H, M, D), strides in elements
  char* data = nullptr;
  Dtype type = Dtype::f32;
  int64_t stride[4] = {};
};

template <class A>
struct Merge {
  int64_t B, H, M, D;
  Rows out[2];      // of either part
  const A* lse[2];  // (B, H, M), contiguous
  Rows merged;      // forward
  A* merged_lse = nullptr;
  Rows dmerged;                    // backward: all from here on
  const A* dmerged_lse = nullptr;  // null: it is 0
  Rows dout[2];
  A* dlse[2] = {};

  int64_t rows() const { return B * H * M; }
};

constexpr int64_t MERGE_ROWS = 64;  // of a task

template <class A>
struct MergeKernels {
  void (*forward)(const Merge<A>&, int64_t task);
  void (*backward)(const Merge<A>&, int64_t task);
};

}  // namespace minkernels

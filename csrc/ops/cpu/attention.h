// What the attention kernels are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

struct View {  // a 4-D tensor; strides in elements
  char* data = nullptr;
  int64_t b = 0, h = 0, row = 0, d = 0;
};

struct Attention {
  View q, k, v, o;        // (B, H, M, D), (B, Hkv, N, D), (B, Hkv, N, Dv), (B, H, M, Dv)
  View dout, dq, dk, dv;  // backward alone
  char* lse = nullptr;    // (B, H, M), contiguous; float for 16-bit tensors, else double
  int64_t B, H, Hkv, M, N, D, Dv;
  bool causal;
  double scale;
  Dtype dtype;

  // The keys that somebody may see, per batch: everything else is packed, counted and looped over in their order.
  const int32_t* keys = nullptr;  // (B, N): their positions, ascending
  const int32_t* seen = nullptr;  // (B, N + 1): how many of them lie before position j
  bool masked = false;            // else one list serves every batch

  // Workspace, laid out by the level's plan(): offsets in bytes.
  char* work = nullptr;
  int64_t kt = 0, vt = 0, kn = 0, vn = 0, qt = 0, dot = 0, dq32 = 0, delta = 0;  // see attention_kernel.h
  int64_t work_bytes = 0, scratch_bytes = 0;
  int64_t pack_tasks = 0, tasks = 0;
  int64_t turn = 0;  // backward: (B * H, query blocks), the task whose turn it is to add to dq; starts as zeros
  int64_t turns = 0;
  void (*yield)() = nullptr;  // lets another thread run

  const int32_t* keys_of(int64_t b) const { return keys + (masked ? b * N : 0); }
  const int32_t* seen_of(int64_t b) const { return seen + (masked ? b * (N + 1) : 0); }
};

// One direction, at one level, for one dtype. First every pack task, then every other.
struct AttentionKernels {
  void (*plan)(Attention&);
  void (*pack)(const Attention&, int64_t task, char* scratch);
  void (*run)(const Attention&, int64_t task, char* scratch);
};

}  // namespace minkernels

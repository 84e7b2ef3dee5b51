// What the attention kernels are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

constexpr int64_t PACKED_KEYS = 128;  // packed keys, and queries, of a sequence are rounded up to
constexpr int64_t PACKED_QUERIES = 6;

struct View {  // a 4-D tensor; strides in elements, 0 where the tensor is broadcast
  char* data = nullptr;
  int64_t b = 0, h = 0, row = 0, d = 0;
};

struct Sequence {                             // an entry of the batch, or one of the sequences that lie end to end
  int64_t b, q0, k0;                          // where it starts in q and o, and in k and v
  int64_t M, N;                               // its queries and keys
  int64_t rows;                               // N, and the rows of k after it that belong to nobody
  int64_t off = 0;                            // query i is aligned with key i + off
  int64_t slots = 0, q_slots = 0, turns = 0;  // packed keys, transposed queries and turns of the sequences before it, for one head
  const int32_t* keys = nullptr;              // (N): positions of the keys that somebody may see, ascending; null: all
  const int32_t* count = nullptr;             // (N + 1): how many of them lie before position j
};

struct Item {  // of work
  int32_t sequence, block;
};

struct Attention {
  View q, k, v, o;                               // (B, H, M, D), (B, Hkv, N, D), (B, Hkv, N, Dv), (B, H, M, Dv)
  View dout, dq, dk, dv;                         // backward alone
  View bias, mask;                               // (B, H, M, N): any float dtype; bool
  View dbias;                                    // of bias' shape, in the dtype of the arithmetic; or (B, H, M, 1) where that has one key
  char* lse = nullptr;                           // (B, H, M), contiguous; float for 16-bit tensors, else double
  const char *sinks = nullptr, *dlse = nullptr;  // (H,), (B, H, M) of the dtype of lse; contiguous
  int64_t B, H, Hkv, M, N, D, Dv;
  double flops = 0;
  int64_t left, right;  // query i sees keys i + off - left to i + off + right
  double scale, softcap, dropout_p;
  uint64_t seed = 0;
  Dtype dtype, bias_dtype;

  const Sequence* sequences = nullptr;
  int64_t count = 0, longest = 0, most_keys = 0;  // sequences; the most queries, and keys, of one
  int64_t slots = 0, q_slots = 0, all_turns = 0;  // of all of them
  const Item *chunks, *blocks, *q_blocks;         // what to pack, what to run; backward: the queries to pack
  int64_t chunk_count = 0, block_count = 0, q_block_count = 0;

  int64_t whole = 0;                      // heads of a task, where it takes whole ones
  bool fold = false;                      // forward: the heads that share keys are rows of one task, query after query
  bool stream = false;                    // forward: keys and values are read where they lie
  int64_t splits = 1;                     // forward: tasks that a block is split over, by keys
  bool every_b = false, every_h = false;  // backward: a task takes its keys of every batch entry, or head, which share a row of dbias

  // Workspace, laid out by the level's plan(): offsets in bytes.
  char* work = nullptr;
  int64_t kt = 0, vt = 0, kn = 0, vn = 0, qt = 0, dot = 0, dq32 = 0, delta = 0, partial = 0;  // see attention_kernel.h
  int64_t turn = 0;  // backward: whose turn it is to add to dq, of each block of queries; starts as zeros
  int64_t work_bytes = 0, scratch_bytes = 0;
  int64_t pack_tasks = 0, tasks = 0, merge_tasks = 0;
  void (*yield)() = nullptr;  // lets another thread run
};

// One direction, at one level, for one dtype. First every pack task, then every other, then every merge task.
struct AttentionKernels {
  int64_t queries, keys;            // of a block: of queries forward, of keys backward; backward, queries is of those to pack
  bool (*takes)(const Attention&);  // of a kernel for whole key heads
  void (*plan)(Attention&);
  void (*pack)(const Attention&, int64_t task, char* scratch);
  void (*run)(const Attention&, int64_t task, char* scratch);
  void (*merge)(const Attention&, int64_t task, char* scratch);
};

struct AttentionRoads {  // of one dtype, at one level: packed, whole
  AttentionKernels forward[2], backward[2];
};
const AttentionRoads& attention_16bit(int level, Dtype);  // a source of its own, so that two cores compile the kernels

}  // namespace minkernels

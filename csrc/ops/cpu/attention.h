// What the attention kernels are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

constexpr int64_t PACKED_KEYS = 128;  // packed keys, and queries, of a sequence are rounded up to
constexpr int64_t PACKED_QUERIES = 6;
constexpr int64_t SHORT = 128;  // keys, and queries: of a sequence whose heads are taken whole, however few they are

struct View {  // a 4-D tensor; strides in elements, 0 where the tensor is broadcast
  char* data = nullptr;
  int64_t b = 0, h = 0, row = 0, d = 0;
};

struct Sequence {                             // an entry of the batch, or one of the sequences that lie end to end
  int64_t b, q0, k0;                          // where it starts in q and o, and in k and v
  int64_t M, N;                               // its queries and keys
  int64_t rows;                               // N, and the rows of k after it that belong to nobody
  int64_t off = 0;                            // query i is aligned with key i + off
  int64_t slots = 0, q_slots = 0, turns = 0;  // packed keys, transposed queries and turns of the sequences before it, for one head;
                                              // 0 where heads are taken whole
  int64_t blocks = 0;                         // of the forward, of the sequences before it
  const int32_t* keys = nullptr;              // (N): positions of the keys that somebody may see, ascending; null: all
  const int32_t* count = nullptr;             // (N + 1): how many of them lie before position j
};

struct Item {  // of work
  int32_t sequence, head, block, split = 0;
};

struct Ahead {  // rows that are read soon: fetched into the L2 cache a few lines at a time, beside the arithmetic
  struct Rows {
    const char* at;
    int64_t stride, bytes, count;  // stride: of a row, in bytes
  };
  Rows parts[5];
  int count = 0, part = 0;  // part, row, byte: what is fetched next
  int64_t row = 0, byte = 0;
};

struct Attention {
  View q, k, v, o;                               // (B, H, M, D), (B, Hkv, N, D), (B, Hkv, N, Dv), (B, H, M, Dv)
  View dout, dq, dk, dv;                         // backward alone
  View bias, mask;                               // (B, H, M, N): any float dtype; bool
  View dbias;                                    // of bias' shape, (B, H, M, 1) if that has one key; double if queries share it
  char* lse = nullptr;                           // (B, H, M), contiguous; float for 16-bit tensors, else double
  const char *sinks = nullptr, *dlse = nullptr;  // (H,) in the dtype of the arithmetic, (B, H, M) of the dtype of lse; contiguous
  char* dsinks = nullptr;                        // as sinks
  int64_t B, H, Hkv, M, N, D, Dv, group;         // group: query heads of a key head
  double flops = 0;
  int64_t left, right;  // query i sees keys i + off - left to i + off + right
  double scale, softcap, dropout_p;
  uint64_t seed = 0;
  Dtype dtype, bias_dtype;

  const Sequence* sequences = nullptr;
  int64_t count = 0, longest = 0, most_keys = 0;  // sequences; the most queries, and keys, of one
  int64_t slots = 0, q_slots = 0, all_turns = 0;  // of all of them; where heads are taken whole, of the largest
  int64_t blocks = 0;                             // of the forward

  bool local = false;                     // a task takes a key head whole, in a workspace of its own that stays in its cache
  bool fold = false;                      // forward: the heads that share keys are rows of one task, query after query
  bool stream = false;                    // forward: keys and values are read where they lie
  int64_t splits = 1;                     // forward: tasks that a block is split over, by keys
  bool every_b = false, every_h = false;  // backward: a task takes its keys of every batch entry, or head, which share a row of dbias

  // Workspace, laid out by the level's plan(): offsets in bytes.
  char* work = nullptr;
  int64_t kt = 0, vt = 0, kn = 0, vn = 0, qt = 0, dot = 0, dq32 = 0, delta = 0, partial = 0;  // see attention_kernel.h
  int64_t turn = 0;  // backward: whose turn it is to add to dq, of each block of queries; starts as zeros
  int64_t work_bytes = 0, scratch_bytes = 0;
  Ahead* ahead = nullptr;     // of the key head that this thread will take next, as far as one can tell
  void (*yield)() = nullptr;  // lets another thread run
};

using AttentionStep = void (*)(const Attention&, const Item&, char* scratch);

// One direction, at one level, for one dtype. First keys and queries are packed, of all heads or of the one that is taken whole, then every
// block runs, then those that were split are merged. Heads are those of the keys; for pack_queries, and forward for run and merge unless
// they are folded, those of the queries.
struct AttentionKernels {
  int64_t queries, keys;  // of a block: of queries forward, of keys backward; backward, queries is of those to pack
  void (*plan)(Attention&);
  AttentionStep pack_keys, pack_queries, run, merge;
};

struct AttentionRoads {  // of one dtype, at one level
  AttentionKernels forward, backward, short_backward;
  AttentionStep sinks_grad;  // of a head
  bool (*takes_short)(const Attention&);
};
const AttentionRoads& attention_16bit(int level, Dtype);  // a source of its own, so that two cores compile the kernels

}  // namespace minkernels

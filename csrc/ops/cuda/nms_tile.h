// What decides in NMS on CUDA, as code for host and device alike: tests/nms_cuda_host.cpp runs it on a CPU, thread by thread.
//
// Boxes go by descending score; their classes are compared, not sorted, so that the order of the work is the order of the results. A tile
// of 1024 is decided by one CTA: block after block of 64, each against itself by a matrix of bits, then against the rest of the tile.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif

namespace minkernels::nms_cuda {

constexpr int TILE = 1024;    // boxes, and threads of the CTA that decides them
constexpr int BLOCK = 64;     // boxes that are held against each other at a time: the bits of a word
constexpr int COLUMNS = 256;  // later boxes, and threads of a CTA that holds them against the kept ones of a tile
constexpr int32_t STAYS = -1, DROPPED = -2, UNDECIDED = -3;  // a box's state, where it is not the rank of what suppresses it

// IEEE operations that no compiler flag contracts: the IoU that decides has the bits of the CPU's.
#ifdef __CUDA_ARCH__
HD float add(float a, float b) { return __fadd_rn(a, b); }
HD float subtract(float a, float b) { return __fsub_rn(a, b); }
HD float multiply(float a, float b) { return __fmul_rn(a, b); }
HD float divide(float a, float b) { return __fdiv_rn(a, b); }
HD void set_bits(uint64_t* word, uint64_t bits) { atomicOr((unsigned long long*)word, bits); }
HD float float_of(uint32_t bits) { return __uint_as_float(bits); }
HD uint32_t bits_of(float x) { return __float_as_uint(x); }
HD int lowest(uint64_t bits) { return __ffsll((long long)bits) - 1; }
HD int count_bits(uint64_t bits) { return __popcll(bits); }
#else  // -ffp-contract=off
HD float add(float a, float b) { return a + b; }
HD float subtract(float a, float b) { return a - b; }
HD float multiply(float a, float b) { return a * b; }
HD float divide(float a, float b) { return a / b; }
HD void set_bits(uint64_t* word, uint64_t bits) { *word |= bits; }
HD float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
HD uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
HD int lowest(uint64_t bits) { return __builtin_ctzll(bits); }
HD int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }
#endif

enum class Type : int { f16, bf16, f32 };

HD float read(const void* p, Type type, int64_t i) {
  if (type == Type::f32) return ((const float*)p)[i];
  uint32_t bits = ((const uint16_t*)p)[i];
  if (type == Type::bf16) return float_of(bits << 16);
  float x = multiply(float_of((bits & 0x7fff) << 13), 0x1p112f);  // the exponent's bias moves by 112; right for subnormals too
  uint32_t special = x >= 65536.0f ? 0x7f800000u : 0u;            // inf and NaN keep the mantissa
  return float_of(bits_of(x) | special | (bits & 0x8000) << 16);
}

struct Input {  // strides in elements
  const void *boxes, *scores;
  const int64_t* classes;  // null: all boxes are of one
  Type box_type, score_type;
  int64_t box_image, box, coordinate, score_image, score, class_image, class_;
  int32_t B, N;
  float threshold;   // rounded down
  bool drop, above;  // boxes with a NaN take no part; nor those whose score is not above score_threshold
  float score_threshold;
  int64_t max_output;
};

struct Box {
  float x1, y1, x2, y2, area;  // area 0: neither suppresses nor is suppressed
  int64_t id;
};

// Ascends as scores descend, NaN first; of equal scores the lower index comes first.
HD uint64_t sort_key(const Input& a, int64_t b, int32_t i) {
  float score = read(a.scores, a.score_type, b * a.score_image + i * a.score);
  uint32_t bits = bits_of(score == 0 ? 0.0f : score);
  return uint64_t(score != score ? 0 : ~(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u))) << 32 | uint32_t(i);
}

HD Box read_box(const Input& a, int64_t b, int32_t i, int32_t& state) {
  int64_t at = b * a.box_image + i * a.box;
  Box box;
  box.x1 = read(a.boxes, a.box_type, at), box.y1 = read(a.boxes, a.box_type, at + a.coordinate);
  box.x2 = read(a.boxes, a.box_type, at + 2 * a.coordinate), box.y2 = read(a.boxes, a.box_type, at + 3 * a.coordinate);
  float w = subtract(box.x2, box.x1), area = multiply(w, subtract(box.y2, box.y1));
  box.area = w > 0 && area > 0 && area < float_of(0x7f800000) ? area : 0;
  box.id = a.classes ? a.classes[b * a.class_image + i * a.class_] : 0;
  bool in = true;
  if (a.drop) {
    float score = read(a.scores, a.score_type, b * a.score_image + i * a.score);
    in = box.x1 == box.x1 && box.y1 == box.y1 && box.x2 == box.x2 && box.y2 == box.y2 && score == score;
    in = in && (!a.above || score > a.score_threshold);
  }
  state = in ? UNDECIDED : DROPPED;
  return box;
}

HD bool suppresses(const Box& a, const Box& b, float threshold) {
  if (a.id != b.id) return false;
  float w = subtract(a.x2 < b.x2 ? a.x2 : b.x2, a.x1 > b.x1 ? a.x1 : b.x1);
  float h = subtract(a.y2 < b.y2 ? a.y2 : b.y2, a.y1 > b.y1 ? a.y1 : b.y1);
  if (!(w > 0 && h > 0 && a.area > 0 && b.area > 0)) return false;
  float inter = multiply(w, h);
  return divide(inter, subtract(add(a.area, b.area), inter)) > threshold;
}

struct Tile {  // in shared memory, 33 kB
  float x1[TILE], y1[TILE], x2[TILE], y2[TILE], area[TILE];
  int64_t id[TILE];
  int32_t state[TILE];
  uint64_t by[BLOCK];  // bit j: box j of the block suppresses this one, if it is kept
  int32_t start, n;    // the rank of the first, and how many there are
  int32_t last;        // the rank of the box that was kept last, in this tile or before

  HD Box box(int i) const { return {x1[i], y1[i], x2[i], y2[i], area[i], id[i]}; }
  HD void set(int i, const Box& b, int32_t s) {
    x1[i] = b.x1, y1[i] = b.y1, x2[i] = b.x2, y2[i] = b.y2, area[i] = b.area, id[i] = b.id, state[i] = s;
  }
};

// The boxes of a block that stay, `room` of them at most. Every thread comes to the same answer.
HD uint64_t resolve_block(const Tile& t, int block, int64_t room) {
  uint64_t keep = 0;
  for (int i = 0; i < BLOCK && block + i < t.n && room > 0; i++)
    if (t.state[block + i] == UNDECIDED && !(t.by[i] & keep)) keep |= uint64_t(1) << i, room--;
  return keep;
}

// Decides a tile. team.each(f) calls f(thread) for every thread and waits for all; team.wait() waits. keep(i, place) is called for every
// box i of the tile that stays, the place-th of its image. Returns how many the image then has.
template <class Team, class Keep>
HD int64_t decide_tile(const Team& team, Tile& t, int64_t count, int64_t max_output, float threshold, const Keep& keep_box) {
  for (int block = 0; block < t.n && count < max_output; block += BLOCK) {
    team.each([&](int thread) {
      if (thread < BLOCK) t.by[thread] = 0;
    });
    team.each([&](int thread) {
      int i = thread % BLOCK;
      if (block + i >= t.n || t.state[block + i] != UNDECIDED) return;
      Box b = t.box(block + i);
      uint64_t bits = 0;
      for (int j = thread / BLOCK; j < i; j += TILE / BLOCK)
        if (t.state[block + j] == UNDECIDED && suppresses(t.box(block + j), b, threshold)) bits |= uint64_t(1) << j;
      if (bits) set_bits(&t.by[i], bits);
    });
    uint64_t keep = resolve_block(t, block, max_output - count);
    bool full = count + count_bits(keep) == max_output;
    team.wait();  // all have read the states that now change
    team.each([&](int thread) {
      int i = thread - block;
      if (i >= 0 && i < BLOCK && keep >> i == 1) t.last = t.start + thread;
      if (i < 0 || thread >= t.n || t.state[thread] != UNDECIDED) return;
      if (i < BLOCK) {
        uint64_t below = (uint64_t(1) << i) - 1;
        if (keep >> i & 1) {
          t.state[thread] = STAYS;
          keep_box(thread, count + count_bits(keep & below));
        } else if (!full || keep >> i) {  // behind the last one of a full image nothing is looked at
          t.state[thread] = t.start + block + lowest(t.by[i] & keep);
        }
        return;
      }
      Box b = t.box(thread);
      for (uint64_t rest = keep; rest; rest &= rest - 1) {
        int j = block + lowest(rest);
        if (suppresses(t.box(j), b, threshold)) {
          t.state[thread] = t.start + j;
          return;
        }
      }
    });
    count += count_bits(keep);
  }
  return count;
}

// Sorts TILE keys, ascending.
template <class Team>
HD void sort_tile(const Team& team, uint64_t* keys) {
  for (int size = 2; size <= TILE; size *= 2)
    for (int apart = size / 2; apart > 0; apart /= 2)
      team.each([&](int thread) {
        int other = thread ^ apart;
        if (other < thread) return;
        bool up = (thread & size) == 0;
        uint64_t a = keys[thread], b = keys[other];
        if ((a > b) == up) keys[thread] = b, keys[other] = a;
      });
}

struct Results {
  int64_t *indices, *counts, *suppressor;  // (B, max_output), of -1 where images are larger than a tile; (B,); (B, N) or null
};

// Behind the last kept box of an image that is full, nothing was to be looked at.
template <class Index>
HD int64_t suppressor_of(int32_t rank, int32_t state, int32_t last, bool full, const Index& index) {
  if (state == DROPPED) return DROPPED;
  if (full && rank > last) return UNDECIDED;
  return state >= 0 ? index(state) : state;
}

// An image of at most TILE boxes from input to results.
template <class Team>
HD void small_image(const Team& team, const Input& a, int64_t b, Tile& t, uint64_t* keys, const Results& out) {
  team.each([&](int thread) {
    keys[thread] = thread < a.N ? sort_key(a, b, thread) : ~uint64_t(0);
    t.start = 0, t.n = a.N, t.last = -1;
  });
  sort_tile(team, keys);
  team.each([&](int thread) {
    int32_t state = DROPPED;
    if (thread < a.N) {
      Box box = read_box(a, b, int32_t(uint32_t(keys[thread])), state);
      t.set(thread, box, state);
    }
  });
  int64_t* indices = out.indices + b * a.max_output;
  int64_t count =
      decide_tile(team, t, 0, a.max_output, a.threshold, [&](int i, int64_t place) { indices[place] = int64_t(uint32_t(keys[i])); });
  team.each([&](int thread) {
    for (int64_t i = count + thread; i < a.max_output; i += TILE) indices[i] = -1;
    if (thread == 0) out.counts[b] = count;
    if (!out.suppressor || thread >= a.N) return;
    out.suppressor[b * a.N + int64_t(uint32_t(keys[thread]))] =
        suppressor_of(thread, t.state[thread], t.last, count == a.max_output, [&](int32_t r) { return int64_t(uint32_t(keys[r])); });
  });
}

// What larger images need: launches of one kernel each, in this order.

struct Ranked {  // by image and rank: (B, N)
  float *x1, *y1, *x2, *y2, *area;
  int64_t* id;  // null without classes
  int32_t* state;
  uint32_t* order;       // indices
  int32_t *kept, *last;  // (B, TILE + 1): of the last tile, how many stay, and their ranks; (B,)

  HD Box box(int64_t at) const { return {x1[at], y1[at], x2[at], y2[at], area[at], id ? id[at] : 0}; }
};

HD void rank_box(const Input& a, const Ranked& x, int64_t b, int32_t rank) {
  int64_t at = b * a.N + rank;
  int32_t state;
  Box box = read_box(a, b, int32_t(x.order[at]), state);
  x.x1[at] = box.x1, x.y1[at] = box.y1, x.x2[at] = box.x2, x.y2[at] = box.y2, x.area[at] = box.area, x.state[at] = state;
  if (x.id) x.id[at] = box.id;
}

template <class Team>
HD void one_tile(const Team& team, const Input& a, const Ranked& x, int64_t b, int32_t start, Tile& t, const Results& out) {
  int64_t count = start == 0 ? 0 : out.counts[b], first = b * a.N + start;
  if (start > 0 && count == a.max_output) return;
  team.wait();  // all have read the count
  team.each([&](int thread) {
    t.start = start, t.n = a.N - start < TILE ? a.N - start : TILE;
    if (thread == 0) t.last = start == 0 ? -1 : x.last[b];
    if (thread < a.N - start) t.set(thread, x.box(first + thread), x.state[first + thread]);
  });
  int64_t* indices = out.indices + b * a.max_output;
  int32_t* kept = x.kept + b * (TILE + 1);
  int64_t sum = decide_tile(team, t, count, a.max_output, a.threshold, [&](int i, int64_t place) {
    indices[place] = x.order[first + i];
    kept[1 + place - count] = start + i;
  });
  team.each([&](int thread) {
    if (thread < t.n) x.state[first + thread] = t.state[thread];
    if (thread == 0) kept[0] = int32_t(sum - count), out.counts[b] = sum, x.last[b] = t.last;
  });
}

// COLUMNS boxes from `start` on against what the last tile kept, in pieces of as many that go through shared memory.
struct Piece {
  float x1[COLUMNS], y1[COLUMNS], x2[COLUMNS], y2[COLUMNS], area[COLUMNS];
  int64_t id[COLUMNS];
  int32_t rank[COLUMNS], state[COLUMNS];
};

template <class Team>
HD void push_columns(const Team& team, const Input& a, const Ranked& x, int64_t b, int32_t start, Piece& p, const Results& out) {
  if (out.counts[b] == a.max_output) return;  // the kept ones may be of an earlier tile
  const int32_t* kept = x.kept + b * (TILE + 1);
  int32_t n = kept[0];
  team.each([&](int thread) { p.state[thread] = start + thread < a.N ? x.state[b * a.N + start + thread] : DROPPED; });
  for (int32_t from = 0; from < n; from += COLUMNS) {
    int32_t here = n - from < COLUMNS ? n - from : COLUMNS;
    team.each([&](int thread) {
      if (thread >= here) return;
      int32_t rank = kept[1 + from + thread];
      Box k = x.box(b * a.N + rank);
      p.x1[thread] = k.x1, p.y1[thread] = k.y1, p.x2[thread] = k.x2, p.y2[thread] = k.y2, p.area[thread] = k.area;
      p.id[thread] = k.id, p.rank[thread] = rank;
    });
    team.each([&](int thread) {
      if (p.state[thread] != UNDECIDED) return;
      Box mine = x.box(b * a.N + start + thread);
      for (int32_t k = 0; k < here; k++)
        if (suppresses({p.x1[k], p.y1[k], p.x2[k], p.y2[k], p.area[k], p.id[k]}, mine, a.threshold)) {
          p.state[thread] = p.rank[k];
          x.state[b * a.N + start + thread] = p.rank[k];
          return;
        }
    });
  }
}

HD void finish_box(const Input& a, const Ranked& x, int64_t b, int32_t rank, const Results& out) {
  int64_t count = out.counts[b], base = b * a.N;
  out.suppressor[base + x.order[base + rank]] =
      suppressor_of(rank, x.state[base + rank], x.last[b], count == a.max_output, [&](int32_t r) { return int64_t(x.order[base + r]); });
}

// What a call launches, whatever the data: the host alone decides it, and never waits.
struct Plan {
  int64_t launches;  // of the kernels here, beside CUB's sort: keys, ranks, tiles and pushes, suppressor
  int64_t bytes;     // of scratch, beside CUB's
};
inline Plan plan(int64_t B, int64_t N, bool classes, bool suppressor) {
  if (B == 0) return {0, 0};
  if (N <= TILE) return {1, 0};
  int64_t tiles = (N + TILE - 1) / TILE;
  return {2 + tiles + (tiles - 1) + suppressor, B * N * (2 * (8 + 4) + 5 * 4 + 4 + (classes ? 8 : 0)) + B * (TILE + 2) * 4};
}

}  // namespace minkernels::nms_cuda

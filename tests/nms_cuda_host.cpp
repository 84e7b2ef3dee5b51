// The CUDA kernels' code on a CPU: every CTA in turn, its threads one after the other between two barriers. A stable sort stands for CUB's.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../csrc/ops/cuda/nms_tile.h"

using namespace minkernels::nms_cuda;

struct Threads {
  int n;
  bool backwards;  // an order that the device might as well take
  template <class F>
  void each(const F& f) const {
    for (int t = 0; t < n; t++) f(backwards ? n - 1 - t : t);
  }
  void wait() const {}
};

extern "C" {

void nms_on_host(const void* boxes, const void* scores, const int64_t* classes, int type, int32_t B, int32_t N, float threshold, bool drop,
                 bool above, float score_threshold, int64_t max_output, bool backwards, int64_t* indices, int64_t* counts,
                 int64_t* suppressor) {
  Input a{boxes, scores, classes,   Type(type), Type(type), 4 * int64_t(N),  4,         1, N, 1, N, 1,
          B,     N,      threshold, drop,       above,      score_threshold, max_output};
  Results out{indices, counts, suppressor};
  Threads tile{TILE, backwards}, columns{COLUMNS, backwards};
  static Tile t;
  static Piece piece;
  std::memset(&t, 0xff, sizeof t), std::memset(&piece, 0xff, sizeof piece);  // as shared memory is: anything
  if (N <= TILE) {
    std::vector<uint64_t> keys(TILE);
    for (int32_t b = 0; b < B; b++) small_image(tile, a, b, t, keys.data(), out);
    return;
  }
  int64_t n = int64_t(B) * N;
  std::vector<float> floats(5 * n);
  std::vector<int64_t> ids(n);
  std::vector<int32_t> state(n), kept(B * (TILE + 1), -7), last(B, -7);
  std::vector<uint32_t> order(n);
  float* f = floats.data();
  Ranked x{f, f + n, f + 2 * n, f + 3 * n, f + 4 * n, classes ? ids.data() : nullptr, state.data(), order.data(), kept.data(), last.data()};
  std::fill(indices, indices + B * max_output, -1);
  for (int32_t b = 0; b < B; b++) {
    std::vector<uint64_t> keys(N);
    for (int32_t i = 0; i < N; i++) keys[i] = sort_key(a, b, i);
    std::sort(keys.begin(), keys.end());
    for (int32_t i = 0; i < N; i++) order[b * int64_t(N) + i] = uint32_t(keys[i]);
    for (int32_t r = 0; r < N; r++) rank_box(a, x, b, r);
  }
  for (int32_t start = 0; start < N; start += TILE) {
    for (int32_t b = 0; b < B; b++) one_tile(tile, a, x, b, start, t, out);
    for (int32_t b = 0; b < B; b++)
      for (int32_t from = start + TILE; from < N; from += COLUMNS) push_columns(columns, a, x, b, from, piece, out);
  }
  for (int32_t b = 0; b < B && suppressor; b++)
    for (int32_t r = 0; r < N; r++) finish_box(a, x, b, r, out);
}

int64_t plan_launches(int64_t B, int64_t N, bool classes, bool suppressor) { return plan(B, N, classes, suppressor).launches; }
int64_t plan_bytes(int64_t B, int64_t N, bool classes, bool suppressor) { return plan(B, N, classes, suppressor).bytes; }
}

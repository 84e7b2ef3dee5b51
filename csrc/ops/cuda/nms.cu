// NMS on CUDA tensors: what is launched, and where its memory lies. What decides is in nms_tile.h. Nothing waits for the device, so that a
// CUDA graph may hold a call. Not yet run by any GPU: _triton.py is the default until one has measured this.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cub/device/device_radix_sort.cuh>
#include <optional>
#include <stdexcept>
#include <string>

#include "nms_tile.h"

// Weak: a torch without CUDA has no such function, and loads this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace minkernels::nms_cuda {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

struct Cta {
  template <class F>
  __device__ void each(const F& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
  __device__ void wait() const { __syncthreads(); }
};

__global__ void __launch_bounds__(TILE) small_kernel(Input a, Results out) {
  __shared__ Tile tile;
  __shared__ uint64_t keys[TILE];
  small_image(Cta(), a, blockIdx.x, tile, keys, out);
}

constexpr int THREADS = 256;

// keys: image << 32 | score. Fills indices with -1 beside it.
__global__ void keys_kernel(Input a, uint64_t* keys, uint32_t* values, Results out) {
  int64_t step = int64_t(gridDim.x) * THREADS, first = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  for (int64_t g = first; g < int64_t(a.B) * a.N; g += step) {
    int64_t b = g / a.N;
    int32_t i = int32_t(g % a.N);
    keys[g] = uint64_t(b) << 32 | sort_key(a, b, i) >> 32, values[g] = i;
  }
  for (int64_t g = first; g < a.B * a.max_output; g += step) out.indices[g] = -1;
}

__global__ void rank_kernel(Input a, Ranked x) {
  int64_t step = int64_t(gridDim.x) * THREADS;
  for (int64_t g = int64_t(blockIdx.x) * THREADS + threadIdx.x; g < int64_t(a.B) * a.N; g += step)
    rank_box(a, x, g / a.N, int32_t(g % a.N));
}

__global__ void __launch_bounds__(TILE) tile_kernel(Input a, Ranked x, int32_t start, Results out) {
  __shared__ Tile tile;
  for (int32_t b = blockIdx.x; b < a.B; b += gridDim.x) one_tile(Cta(), a, x, b, start, tile, out);
}

__global__ void __launch_bounds__(COLUMNS) push_kernel(Input a, Ranked x, int32_t start, Results out) {
  __shared__ Piece piece;
  for (int32_t b = blockIdx.y; b < a.B; b += gridDim.y) push_columns(Cta(), a, x, b, start + int32_t(blockIdx.x) * COLUMNS, piece, out);
}

__global__ void finish_kernel(Input a, Ranked x, Results out) {
  int64_t step = int64_t(gridDim.x) * THREADS;
  for (int64_t g = int64_t(blockIdx.x) * THREADS + threadIdx.x; g < int64_t(a.B) * a.N; g += step)
    finish_box(a, x, g / a.N, int32_t(g % a.N), out);
}

static void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("minkernels: nms on CUDA: ") + cudaGetErrorString(error));
}

static Type type_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Float: return Type::f32;
    default: throw std::runtime_error("minkernels: float16, bfloat16 or float32 was expected");
  }
}

static unsigned blocks(int64_t items) { return unsigned(std::min<int64_t>((items + THREADS - 1) / THREADS, 1 << 16)); }

static void run(const Input& a, const Results& out, const Tensor& like, cudaStream_t stream) {
  if (a.B == 0) return;
  if (a.N <= TILE) {
    small_kernel<<<a.B, TILE, 0, stream>>>(a, out);
    return check(cudaGetLastError());
  }
  int64_t n = int64_t(a.B) * a.N;
  int bits = 32;
  for (int64_t images = a.B - 1; images > 0; images >>= 1) bits++;
  cub::DoubleBuffer<uint64_t> keys(nullptr, nullptr);
  cub::DoubleBuffer<uint32_t> values(nullptr, nullptr);
  size_t cub_bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, cub_bytes, keys, values, n, 0, bits, stream));
  int64_t own = plan(a.B, a.N, a.classes, out.suppressor).bytes;
  Tensor scratch = torch::stable::new_empty(like, {own + 16 + int64_t(cub_bytes)}, torch::headeronly::ScalarType::Byte);
  char* p = (char*)scratch.data_ptr();
  const auto take = [&](auto*& to, int64_t count) { to = (decltype(+to))p, p += count * sizeof(*to); };
  Ranked x = {};
  uint64_t *key, *key2;  // what is of 8 bytes first
  uint32_t *value, *value2;
  take(key, n), take(key2, n);
  if (a.classes) take(x.id, n);
  take(value, n), take(value2, n);
  take(x.x1, n), take(x.y1, n), take(x.x2, n), take(x.y2, n), take(x.area, n), take(x.state, n);
  take(x.kept, a.B * int64_t(TILE + 1)), take(x.last, a.B);
  p += -uintptr_t(p) % 16;

  keys_kernel<<<blocks(std::max(n, a.B * a.max_output)), THREADS, 0, stream>>>(a, key, value, out);
  keys = cub::DoubleBuffer<uint64_t>(key, key2), values = cub::DoubleBuffer<uint32_t>(value, value2);
  check(cub::DeviceRadixSort::SortPairs(p, cub_bytes, keys, values, n, 0, bits, stream));
  x.order = values.Current();
  rank_kernel<<<blocks(n), THREADS, 0, stream>>>(a, x);
  unsigned images = unsigned(std::min<int64_t>(a.B, 65535));
  for (int64_t start = 0; start < a.N; start += TILE) {
    tile_kernel<<<images, TILE, 0, stream>>>(a, x, int32_t(start), out);
    int64_t later = a.N - start - TILE;
    if (later > 0)
      push_kernel<<<dim3(unsigned((later + COLUMNS - 1) / COLUMNS), images), COLUMNS, 0, stream>>>(a, x, int32_t(start + TILE), out);
  }
  if (out.suppressor) finish_kernel<<<blocks(n), THREADS, 0, stream>>>(a, x, out);
  check(cudaGetLastError());
}

// iou_threshold and score_threshold: rounded down to float.
static void nms(Tensor boxes, Tensor scores, Maybe classes, double iou_threshold, bool drop, std::optional<double> score_threshold,
                Tensor indices, Tensor counts, Maybe suppressor) {
  int32_t device = boxes.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  check(cudaSetDevice(device));  // the runtime is linked statically: it is not torch's, and has a current device of its own
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(device, &stream))
    throw std::runtime_error("minkernels: this torch has no CUDA");
  Input a{};
  a.boxes = boxes.data_ptr(), a.box_type = type_of(boxes);
  a.box_image = boxes.stride(0), a.box = boxes.stride(1), a.coordinate = boxes.stride(2);
  a.scores = scores.data_ptr(), a.score_type = type_of(scores), a.score_image = scores.stride(0), a.score = scores.stride(1);
  if (classes) a.classes = (const int64_t*)classes->data_ptr(), a.class_image = classes->stride(0), a.class_ = classes->stride(1);
  a.B = int32_t(boxes.size(0)), a.N = int32_t(boxes.size(1));
  a.threshold = float(iou_threshold), a.drop = drop, a.above = bool(score_threshold),
  a.score_threshold = float(score_threshold.value_or(0));
  a.max_output = indices.size(1);
  Results out{(int64_t*)indices.data_ptr(), (int64_t*)counts.data_ptr(), suppressor ? (int64_t*)suppressor->data_ptr() : nullptr};
  run(a, out, boxes, (cudaStream_t)stream);
}

}  // namespace minkernels::nms_cuda

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def(
      "_nms_cuda(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold, bool drop, float? score_threshold, Tensor(a!) indices, "
      "Tensor(b!) counts, Tensor(c!)? suppressor) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CUDA, m) { m.impl("_nms_cuda", TORCH_BOX(&minkernels::nms_cuda::nms)); }

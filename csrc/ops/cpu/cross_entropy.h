// What the softmax kernels are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

// A tensor of (B, V, D): V classes, B D rows of them. Strides in elements; null where there is none.
struct Volume {
  char* data = nullptr;
  int64_t batch = 0, column = 0, position = 0;
  Dtype dtype = Dtype::f32;
};

constexpr int64_t SHORT = 128;  // classes of rows that are taken many at a time, turned so that a register holds one class of each

struct Softmax {
  Volume logits, grad, probs;    // probs: the targets, where they are probabilities
  const char* target = nullptr;  // (B, D) labels, where they are not
  int label_bytes = 8;           // int64, int32 or uint8
  int64_t target_batch = 0, target_position = 0, ignore_index = 0;
  int64_t B = 0, V = 0, D = 1;
  const char* weight = nullptr;   // (V,) in the type of the arithmetic: float, or double for double
  double weight_sum = 0;          // V without weights
  double scale = 1, softcap = 0;  // z = softcap tanh(scale logit / softcap), or scale logit where softcap is 0
  double smoothing = 0, z_loss = 0;
  double factor = 1;      // of the gradient: 1 / the sum of weights, for the mean
  char* loss = nullptr;   // (B D,) or null, in the type of the arithmetic, as all that follows
  char* stats = nullptr;  // (B D, columns): see Row
  int64_t stats_columns = 0;
  int64_t* argmax = nullptr;           // (B D,)
  const char* coefficients = nullptr;  // (B D, 5): see Coefficients
  int64_t tile = 0, class_block = 0;   // of the kernel that takes many positions at a time
  bool turned = false;                 // (1, V, rows) whose classes lie side by side, SHORT of them at most
  bool stream = false;                 // whether its gradient is larger than a cache that could keep it
  bool fresh = false;                  // and its memory is yet to be handed out by the system, which then leaves zeros in the cache

  int64_t rows() const { return B * D; }
  int64_t label(int64_t b, int64_t s) const {
    int64_t i = b * target_batch + s * target_position;
    return label_bytes == 8 ? ((const int64_t*)target)[i] : label_bytes == 4 ? ((const int32_t*)target)[i] : ((const uint8_t*)target)[i];
  }
  bool ignored(int64_t label) const { return target && label == ignore_index; }
};

struct SoftmaxKernels {
  // Over rows first to last - 1, or over one tile of positions of one batch; the sum of the losses is returned.
  double (*rows)(const Softmax&, int64_t first, int64_t last, char* scratch);
  double (*positions)(const Softmax&, int64_t b, int64_t first, int64_t n, char* scratch);
};

}  // namespace minkernels

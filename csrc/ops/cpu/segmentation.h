// What the segmentation kernels are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

constexpr int MAX_DIMS = 64;               // PyTorch's own limit
constexpr int64_t BLOCK = 1024;            // elements that are worked on in the L1 cache
constexpr int64_t TASK = 16 * BLOCK;       // elements of a task, whatever the number of threads
constexpr int DICE_SUMS = 4, FACTORS = 3;  // see Dice

enum class Element { f16, bf16, f32, f64, u8, i32, i64 };  // bool is u8

struct Walk {  // the order in which elements are visited: the last dimension runs fastest
  int dims = 1;
  int64_t size[MAX_DIMS] = {1};
  int64_t elements = 1;
};

struct Operand {         // strides in elements, 0 where the tensor is broadcast
  char* data = nullptr;  // null: there is none
  Element type = Element::f32;
  int64_t stride[MAX_DIMS] = {};
  int64_t image = 0, channel = 0;  // strides outside of the walk: Dice alone

  bool is_integer() const { return type >= Element::u8; }
};

struct Pointwise {  // BCE and focal loss
  Walk walk;
  Operand x, t, weight, pos_weight, mask;
  Operand dloss;  // backward, where it is not a scalar
  Operand loss;   // forward, where it is not reduced
  Operand grad;   // null: none is wanted
  double alpha = -1, gamma = 0;
  double factor = 1;       // of the gradient
  double* sums = nullptr;  // forward: the loss of each task
  char* bad = nullptr;     // forward, of integer targets: whether a task met one that is neither 0 nor 1
};

struct Dice {
  Walk walk;  // over the pixels of one image and channel
  int64_t N, C;
  Operand x, t, mask, grad;
  bool class_map, squared;
  const double* pos_weight = nullptr;  // (C,)
  double* sums = nullptr;              // forward: (pieces, C, DICE_SUMS) of BCE, p t, p + t (or their squares), elements that count
  const char* factors = nullptr;       // backward: (N or 1, C, FACTORS) of the BCE's gradient, and of p (1 - p) t and p (1 - p)
  int64_t factors_image = 0;           // their stride from image to image
  char* bad = nullptr;                 // forward, of integer targets: whether a piece met one out of range

  // A piece is TASK pixels of an image, in every channel.
  int64_t pieces_of_an_image() const { return (walk.elements + TASK - 1) / TASK; }
};

struct SegmentationKernels {
  int64_t (*count)(const Pointwise&, int64_t task);      // elements of it that the mask lets count
  void (*pointwise[4])(const Pointwise&, int64_t task);  // gamma 0, 1, 2, any other
  void (*dice_sums)(const Dice&, int64_t piece, char* scratch);
  void (*dice_grad)(const Dice&, int64_t piece, char* scratch);
  int64_t dice_scratch;  // bytes
};

}  // namespace minkernels

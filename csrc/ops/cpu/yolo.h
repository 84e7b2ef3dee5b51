// What the kernels of yolo_detect are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

enum class Head : int64_t { v1, v1_planar, v8 };

struct Yolo {
  const char* pred = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t image = 0, channel = 0, anchor = 0;  // strides in elements, the last two of the v8 head; the v1 heads are dense
  Head head = Head::v8;
  int64_t B = 0, places = 0, C = 0;  // images; boxes of an image that the head predicts; classes
  int64_t boxes_per_cell = 1, S = 1;
  double least = 0;  // a raw score passes if it is above; a number of the arithmetic's type
  bool multi_label = false;
};

// A raw score above the threshold. number: place * C + class.
struct Found {
  double score;
  int64_t number;
};

constexpr int64_t YOLO_PAD = 16;  // elements that a vector loop may pass the end of an array by

struct YoloKernels {
  // Writes what passes of places first to first + n - 1, in the order of its numbers, to `out`, which has room for n, or n C for
  // multi_label; returns how many there are. scratch: n + C elements of the arithmetic's type and C int64, and pads.
  int64_t (*find)(const Yolo&, int64_t image, int64_t first, int64_t n, char* scratch, Found* out);
};

}  // namespace minkernels

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

constexpr int64_t yolo_scratch(int64_t n, int64_t C) {
  int64_t elements = (n > C ? n : C) + YOLO_PAD, bits = (n / 2 + 1) * C * 2;  // 2: the fewest lanes
  return ((elements * 8 > bits ? elements * 8 : bits) + 63) / 64 * 64;
}

struct YoloKernels {
  // Writes what passes of places first to first + n - 1, in the order of its numbers, to `out`, which has room for n, or n C for
  // multi_label; returns how many there are. scratch: yolo_scratch(n, C) bytes.
  int64_t (*find)(const Yolo&, int64_t image, int64_t first, int64_t n, char* scratch, Found* out);
};

}  // namespace minkernels

// What the kernels of Soft-NMS and Matrix NMS are told: shared by every level, plain data. A is float or double.
#pragma once
#include "vec_includes.h"

namespace minkernels {

constexpr int64_t BOXES_PAD = 16;  // elements that a vector loop may pass the end of an array by

template <class A>
struct SoftBox {
  A x1, y1, x2, y2, area;
};

template <class A>
struct SoftBoxes {  // a structure of arrays
  A *x1, *y1, *x2, *y2, *area;

  SoftBoxes from(int64_t i) const { return {x1 + i, y1 + i, x2 + i, y2 + i, area + i}; }
  SoftBox<A> at(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i], area[i]}; }
  void put(int64_t i, const SoftBox<A>& b) const { x1[i] = b.x1, y1[i] = b.y1, x2[i] = b.x2, y2[i] = b.y2, area[i] = b.area; }
};

template <class A>
struct Decay {
  bool gaussian;
  A threshold, factor;  // the linear one's; of IoU**2 in the exponent
};

template <class A>
struct SoftNMSKernels {
  // Multiplies s by the weight of each kept box in turn, from `done` to n, which `done` counts up. Stops early where s falls below stop,
  // or is not above least.
  A (*lower)(const SoftBoxes<A>& kept, int64_t& done, int64_t n, const SoftBox<A>& box, A s, A stop, A least, const Decay<A>&);
  // boxes: n of one class, by descending score; multiplies each score by its weight. c: n + BOXES_PAD elements, for use here.
  void (*matrix)(const SoftBoxes<A>& boxes, int64_t n, A* scores, A* c, const Decay<A>&);
};

}  // namespace minkernels

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

constexpr int64_t SOFT_BLOCK = 128;  // boxes of a class that are lowered together

template <class A>
struct SoftNMSKernels {
  // Multiplies the scores of n boxes by their weights under each of the kept ones in turn; -inf where a score is no longer above least.
  // Returns the largest. Scores and boxes go on to a multiple of BOXES_PAD: boxes with a score of -inf.
  A (*lower)(const SoftBoxes<A>& boxes, A* scores, int64_t n, const SoftBox<A>* kept, int64_t n_kept, A least, const Decay<A>&);
  // Of n numbers, none a NaN, and BOXES_PAD more that do not count: the largest; the first from i on that is at least x, or n.
  A (*largest)(const A* numbers, int64_t n);
  int64_t (*find)(const A* numbers, int64_t n, int64_t i, A x);
  // boxes: n of one class, by descending score; multiplies each score by its weight. c: n + BOXES_PAD elements, for use here.
  void (*matrix)(const SoftBoxes<A>& boxes, int64_t n, A* scores, A* c, const Decay<A>&);
};

}  // namespace minkernels

// YOLO v1's loss on one image. Scalar code: of a cell without an object only the confidences count, and few cells have one. Decisions are
// those of reference.py, bit for bit: each operation rounds once, in its order.
#pragma once
#include <cmath>

#include "runtime.h"

namespace minkernels {

struct YoloLoss {
  const char* pred;  // (N, K, K, 5 B + C)
  int64_t pred_strides[4];
  const char* boxes;       // (N, K, K, 4) of the arithmetic's type, contiguous
  const int64_t* classes;  // (N, K, K), contiguous
  int64_t N, K, B, C;
  double coord, noobj;

  int64_t cells() const { return K * K; }
};

template <class T>
struct YoloErrors {
  using A = typename accumulator<T>::type;
  const YoloLoss& x;

  // What a box and a truth meet in, both centre and sizes.
  static A iou(const A* a, const A* b) {
    A low[2], high[2], side[2], area_a = 1, area_b = 1;
    for (int k = 0; k < 2; k++) {
      A half_a = A(0.5) * a[2 + k], half_b = A(0.5) * b[2 + k];
      A a1 = a[k] - half_a, a2 = a[k] + half_a, b1 = b[k] - half_b, b2 = b[k] + half_b;
      low[k] = a1 > b1 ? a1 : b1, high[k] = a2 < b2 ? a2 : b2, side[k] = high[k] - low[k] > 0 ? high[k] - low[k] : A(0);
      area_a *= a2 - a1, area_b *= b2 - b1;
    }
    A inter = side[0] * side[1], total = area_a + area_b - inter;  // a NaN is in the areas
    return total == 0 ? A(0) : inter / total;
  }

  // term(cell, channel, weight, error) for each squared error of image n, in the order of its cells. Returns its first cell whose class is
  // none, or -1.
  template <class F>
  int64_t visit(int64_t n, const F& term) const {
    const int64_t* s = x.pred_strides;
    for (int64_t cell = 0; cell < x.cells(); cell++) {
      const T* p = (const T*)x.pred + n * s[0] + cell / x.K * s[1] + cell % x.K * s[2];
      const auto at = [&](int64_t channel) { return A(plain::widen(p[channel * s[3]])); };
      int64_t i = n * x.cells() + cell, label = x.classes[i], mine = -1;
      if (label < -1 || label >= x.C) return cell;
      A best = 0;
      if (label >= 0) {
        const A* truth = (const A*)x.boxes + 4 * i;
        A known[4] = {truth[0] / A(x.K), truth[1] / A(x.K), truth[2], truth[3]};
        for (int64_t b = 0; b < x.B; b++) {
          A w = at(5 * b + 2), h = at(5 * b + 3), guess[4] = {at(5 * b) / A(x.K), at(5 * b + 1) / A(x.K), w * w, h * h};
          A overlap = iou(guess, known);
          if (mine < 0 || overlap > best || (overlap != overlap && best == best)) best = overlap, mine = b;
        }
        for (int64_t k = 0; k < 4; k++) term(cell, 5 * mine + k, x.coord, at(5 * mine + k) - (k < 2 ? truth[k] : std::sqrt(truth[k])));
        for (int64_t c = 0; c < x.C; c++) term(cell, 5 * x.B + c, 1.0, at(5 * x.B + c) - A(c == label));
      }
      for (int64_t b = 0; b < x.B; b++) term(cell, 5 * b + 4, b == mine ? 1.0 : x.noobj, at(5 * b + 4) - (b == mine ? best : A(0)));
    }
    return -1;
  }

  int64_t loss(int64_t n, double& sum) const {
    double own = 0;  // not in the memory that other threads write to
    int64_t bad = visit(n, [&](int64_t, int64_t, double weight, A error) { own += weight * double(error) * double(error); });
    sum = own;
    return bad;
  }

  // grad: of zeros.
  void gradient(int64_t n, double upstream, char* grad, const int64_t* s) const {
    visit(n, [&](int64_t cell, int64_t channel, double weight, A error) {
      T* to = (T*)grad + n * s[0] + cell / x.K * s[1] + cell % x.K * s[2] + channel * s[3];
      plain::narrow(A(2 * weight * upstream) * error, *to);
    });
  }
};

}  // namespace minkernels

// The greedy loop as torchvision's CPU kernel has it, one box against every later one: what the tests and the bench compare NMS with.
// It is compiled by bench/plain_nms.py and is no part of the library.
#include <algorithm>
#include <cstdint>
#include <vector>

template <class T>
static int64_t plain_nms(const T* boxes, const int64_t* order, int64_t n, double threshold, int64_t* kept) {
  std::vector<T> area(n);
  for (int64_t i = 0; i < n; i++) area[i] = (boxes[4 * i + 2] - boxes[4 * i]) * (boxes[4 * i + 3] - boxes[4 * i + 1]);
  std::vector<uint8_t> suppressed(n);
  int64_t count = 0;
  for (int64_t a = 0; a < n; a++) {
    int64_t i = order[a];
    if (suppressed[i]) continue;
    kept[count++] = i;
    T x1 = boxes[4 * i], y1 = boxes[4 * i + 1], x2 = boxes[4 * i + 2], y2 = boxes[4 * i + 3];
    for (int64_t b = a + 1; b < n; b++) {
      int64_t j = order[b];
      if (suppressed[j]) continue;
      T w = std::max(T(0), std::min(x2, boxes[4 * j + 2]) - std::max(x1, boxes[4 * j]));
      T h = std::max(T(0), std::min(y2, boxes[4 * j + 3]) - std::max(y1, boxes[4 * j + 1]));
      T inter = w * h, iou = inter / (area[i] + area[j] - inter);
      if (iou > threshold) suppressed[j] = 1;
    }
  }
  return count;
}

extern "C" int64_t plain_nms_f32(const float* boxes, const int64_t* order, int64_t n, double threshold, int64_t* kept) {
  return plain_nms(boxes, order, n, threshold, kept);
}
extern "C" int64_t plain_nms_f64(const double* boxes, const int64_t* order, int64_t n, double threshold, int64_t* kept) {
  return plain_nms(boxes, order, n, threshold, kept);
}

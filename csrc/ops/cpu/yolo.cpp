// yolo_detect on CPU tensors: candidates found in blocks of places, cut to the most that are wanted, decoded; and, when NMS has chosen,
// the results. The filter is in yolo_kernel.h. And yolo_loss, whose arithmetic is in yolo_loss.h.
#include "yolo.h"

#include <cmath>
#include <limits>
#include <vector>

#include "runtime.h"

#define KERNEL "yolo_kernel.h"
#include "levels.h"
#include "yolo_loss.h"

namespace minkernels {

static constexpr YoloKernels kernels_at[][4] = {WIDE_LEVELS(yolo_kernels<half>), LEVELS(yolo_kernels<bfloat16>),
                                                WIDE_LEVELS(yolo_kernels<float>), WIDE_LEVELS(yolo_kernels<double>)};

struct Decoder {
  const Yolo& a;
  double height, width;
  bool sqrt_wh;

  template <class A>
  A at(int64_t i) const {
    switch (a.dtype) {
      case Dtype::f16: return A(plain::widen(((const half*)a.pred)[i]));
      case Dtype::bf16: return A(plain::widen(((const bfloat16*)a.pred)[i]));
      case Dtype::f32: return A(((const float*)a.pred)[i]);
      default: return A(((const double*)a.pred)[i]);
    }
  }
  // Corners in pixels: each operation rounds once, in the order of reference.py.
  template <class A>
  void corners(int64_t image, int64_t place, A* to) const {
    A x[4];
    int64_t start = image * a.image;
    if (a.head == Head::v8) {
      for (int i = 0; i < 4; i++) x[i] = at<A>(start + i * a.channel + place * a.anchor);
    } else {
      int64_t cell = place / a.boxes_per_cell, cells = a.S * a.S, n = 5 * a.boxes_per_cell + a.C;
      start += a.head == Head::v1 ? cell * n + place % a.boxes_per_cell * 5 : cells * (a.C + a.boxes_per_cell) + place * 4;
      for (int i = 0; i < 4; i++) x[i] = at<A>(start + i);
      x[0] = (x[0] + A(cell % a.S)) / A(a.S) * A(width), x[1] = (x[1] + A(cell / a.S)) / A(a.S) * A(height);
      if (sqrt_wh) x[2] = x[2] * x[2], x[3] = x[3] * x[3];
      x[2] = x[2] * A(width), x[3] = x[3] * A(height);
    }
    A w = x[2] * A(0.5), h = x[3] * A(0.5);
    to[0] = x[0] - w, to[1] = x[1] - h, to[2] = x[0] + w, to[3] = x[1] + h;
  }
};

// The `most` highest scores, of equal ones the first, in the order they had.
static void cut(std::vector<Found>& found, int64_t most) {
  if (int64_t(found.size()) <= most) return;
  std::vector<double> scores(found.size());
  for (size_t i = 0; i < found.size(); i++) scores[i] = found[i].score;
  std::nth_element(scores.begin(), scores.begin() + most - 1, scores.end(), [](double x, double y) { return x > y; });
  double last = scores[most - 1];
  int64_t ties = most - std::count_if(scores.begin(), scores.begin() + most, [&](double s) { return s > last; });
  size_t n = 0;
  for (const Found& f : found)
    if (f.score > last || (f.score == last && ties-- > 0)) found[n++] = f;
  found.resize(n);
}

// Candidates of every image: corners (B, N, 4), raw scores (B, N) and classes (B, N), where N is the most that an image has; the others
// end with NaN scores.
static std::tuple<Tensor, Tensor, Tensor> yolo_candidates(Tensor pred, int64_t head, int64_t boxes_per_cell, int64_t num_classes,
                                                          double height, double width, bool sqrt_wh, double least, bool multi_label,
                                                          int64_t max_candidates) {
  Yolo a;
  a.pred = (const char*)pred.data_ptr(), a.dtype = dtype_of(pred), a.head = Head(head);
  a.B = pred.size(0), a.image = pred.stride(0), a.C = num_classes, a.boxes_per_cell = boxes_per_cell;
  a.least = least, a.multi_label = multi_label;
  if (a.head == Head::v8) {
    a.channel = pred.stride(1), a.anchor = pred.stride(2), a.places = pred.size(2);
  } else {
    int64_t n = 5 * boxes_per_cell + num_classes;
    a.S = a.head == Head::v1 ? pred.size(1) : std::llround(std::sqrt(double(pred.size(1) / n)));
    a.places = a.S * a.S * boxes_per_cell;
  }
  YoloKernels kernels = kernels_at[int(a.dtype)][level()];
  const int64_t block = std::clamp<int64_t>((1 << 17) / a.C, 64, 1024);  // places of a task
  int64_t tasks = (a.places + block - 1) / block, room = block * (multi_label ? a.C : 1);
  int64_t scratch = yolo_scratch(block, a.C);
  std::vector<std::vector<Found>> parts(a.B * tasks);
  run_tasks(a.B * tasks, scratch + room * sizeof(Found), [&](int64_t task, char* memory) {
    int64_t first = task % tasks * block;
    Found* found = (Found*)(memory + scratch);
    int64_t n = kernels.find(a, task / tasks, first, std::min(block, a.places - first), memory, found);
    parts[task].assign(found, found + n);
  });

  std::vector<std::vector<Found>> images(a.B);
  run_tasks(a.B, 0, [&](int64_t b, char*) {
    for (int64_t t = 0; t < tasks; t++) images[b].insert(images[b].end(), parts[b * tasks + t].begin(), parts[b * tasks + t].end());
    cut(images[b], max_candidates);
  });
  int64_t N = 0;
  for (const auto& found : images) N = std::max(N, int64_t(found.size()));
  using torch::headeronly::ScalarType;
  bool wide = a.dtype == Dtype::f64;
  Tensor boxes = fresh({a.B, N, 4}, wide_dtype(pred)), scores = fresh({a.B, N}, wide_dtype(pred));
  Tensor classes = fresh({a.B, N}, ScalarType::Long);
  const auto decode_image = [&](int64_t b, auto zero) {
    using A = decltype(zero);
    Decoder decoder{a, height, width, sqrt_wh};
    A *box = (A*)boxes.data_ptr() + b * N * 4, *score = (A*)scores.data_ptr() + b * N;
    int64_t* class_id = (int64_t*)classes.data_ptr() + b * N;
    for (int64_t i = 0; i < N; i++) {
      if (i < int64_t(images[b].size())) {
        Found f = images[b][i];
        decoder.corners(b, f.number / a.C, box + 4 * i);
        score[i] = A(f.score), class_id[i] = f.number % a.C;
      } else {
        std::fill(box + 4 * i, box + 4 * i + 4, A(0)), score[i] = std::numeric_limits<A>::quiet_NaN(), class_id[i] = 0;
      }
    }
  };
  run_tasks(a.B, 0, [&](int64_t b, char*) { wide ? decode_image(b, double()) : decode_image(b, float()); });
  return {boxes, scores, classes};
}

template <class A>
static void write_detections(const Tensor& boxes, const Tensor& scores, const Tensor& classes, const Tensor& indices, bool logits,
                             Tensor& out_boxes, Tensor& out_scores, Tensor& out_classes) {
  int64_t B = indices.size(0), K = indices.size(1), N = scores.size(1);
  for (int64_t b = 0; b < B; b++) {
    const A *from = (const A*)boxes.data_ptr() + b * N * 4, *raw = (const A*)scores.data_ptr() + b * N;
    const int64_t *chosen = (const int64_t*)indices.data_ptr() + b * K, *of = (const int64_t*)classes.data_ptr() + b * N;
    A *box = (A*)out_boxes.data_ptr() + b * K * 4, *score = (A*)out_scores.data_ptr() + b * K;
    int64_t *class_id = (int64_t*)out_classes.data_ptr() + b * K, k = 0;
    for (; k < K && chosen[k] >= 0; k++) {
      int64_t i = chosen[k];
      std::copy(from + 4 * i, from + 4 * i + 4, box + 4 * k);
      score[k] = logits ? A(1 / (1 + std::exp(-double(raw[i])))) : raw[i], class_id[k] = of[i];
    }
    std::fill(box + 4 * k, box + 4 * K, A(0)), std::fill(score + k, score + K, A(0)), std::fill(class_id + k, class_id + K, -1);
  }
}

static void yolo_detections(Tensor boxes, Tensor scores, Tensor classes, Tensor indices, bool logits, Tensor out_boxes, Tensor out_scores,
                            Tensor out_classes) {
  (dtype_of(boxes) == Dtype::f64 ? write_detections<double> : write_detections<float>)(boxes, scores, classes, indices, logits, out_boxes,
                                                                                       out_scores, out_classes);
}

static YoloLoss yolo_loss_of(const Tensor& pred, const Tensor& boxes, const Tensor& classes, int64_t boxes_per_cell, double coord,
                             double noobj) {
  YoloLoss x{(const char*)pred.data_ptr(),
             {},
             (const char*)boxes.data_ptr(),
             (const int64_t*)classes.data_ptr(),
             pred.size(0),
             pred.size(1),
             boxes_per_cell,
             pred.size(3) - 5 * boxes_per_cell,
             coord,
             noobj};
  for (int i = 0; i < 4; i++) x.pred_strides[i] = pred.stride(i);
  return x;
}

// f(errors, image) for every image, where errors is a YoloErrors of pred's type.
template <class F>
static void each_image(const YoloLoss& x, Dtype dtype, const F& f) {
  const int64_t threads = x.N * x.cells() < 4096 ? 1 : INT64_MAX;  // below, one is done before another begins
  const auto run = [&](auto errors) { run_tasks(x.N, 0, [&](int64_t n, char*) { f(errors, n); }, threads); };
  switch (dtype) {
    case Dtype::f16: return run(YoloErrors<half>{x});
    case Dtype::bf16: return run(YoloErrors<bfloat16>{x});
    case Dtype::f32: return run(YoloErrors<float>{x});
    default: return run(YoloErrors<double>{x});
  }
}

static void put(const Tensor& t, int64_t i, double value) {
  dtype_of(t) == Dtype::f64 ? void(((double*)t.data_ptr())[i] = value) : void(((float*)t.data_ptr())[i] = float(value));
}
static double get(const Tensor& t, int64_t i) {
  i *= t.dim() ? t.stride(0) : 0;
  return dtype_of(t) == Dtype::f64 ? ((const double*)t.data_ptr())[i] : ((const float*)t.data_ptr())[i];
}

// loss: (N,), or () where it is a sum, times factor. Returns the first of all cells whose class is none, or -1.
static int64_t yolo_loss_fwd(Tensor pred, Tensor boxes, Tensor classes, int64_t boxes_per_cell, double coord, double noobj, double factor,
                             Tensor loss) {
  YoloLoss x = yolo_loss_of(pred, boxes, classes, boxes_per_cell, coord, noobj);
  std::vector<double> sums(x.N);
  std::vector<int64_t> bad(x.N);
  each_image(x, dtype_of(pred), [&](const auto& errors, int64_t n) { bad[n] = errors.loss(n, sums[n]); });
  double total = 0;
  for (int64_t n = 0; n < x.N; n++) {
    if (bad[n] >= 0) return n * x.cells() + bad[n];
    total += sums[n];  // in the order of the images
    if (loss.dim()) put(loss, n, sums[n]);
  }
  if (!loss.dim()) put(loss, 0, total * factor);
  return -1;
}

// dloss: (N,) or (), which is multiplied by factor. grad: zeros.
static void yolo_loss_bwd(Tensor dloss, Tensor pred, Tensor boxes, Tensor classes, int64_t boxes_per_cell, double coord, double noobj,
                          double factor, Tensor grad) {
  YoloLoss x = yolo_loss_of(pred, boxes, classes, boxes_per_cell, coord, noobj);
  int64_t strides[4];
  for (int i = 0; i < 4; i++) strides[i] = grad.stride(i);
  char* to = (char*)grad.data_ptr();
  each_image(x, dtype_of(pred), [&](const auto& errors, int64_t n) { errors.gradient(n, get(dloss, n) * factor, to, strides); });
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_FRAGMENT(minkernels, m) {
  m.def(
      "_yolo_candidates(Tensor pred, int head, int boxes_per_cell, int num_classes, float height, float width, bool sqrt_wh, float least, "
      "bool multi_label, int max_candidates) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_yolo_detections(Tensor boxes, Tensor scores, Tensor classes, Tensor indices, bool logits, Tensor(a!) out_boxes, "
      "Tensor(b!) out_scores, Tensor(c!) out_classes) -> ()");
  m.def(  // boxes in the arithmetic's dtype and classes int64, contiguous
      "_yolo_loss_fwd(Tensor pred, Tensor boxes, Tensor classes, int boxes_per_cell, float coord, float noobj, float factor, "
      "Tensor(a!) loss) -> int");
  m.def(
      "_yolo_loss_bwd(Tensor dloss, Tensor pred, Tensor boxes, Tensor classes, int boxes_per_cell, float coord, float noobj, "
      "float factor, Tensor(a!) grad) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("_yolo_candidates", TORCH_BOX(&minkernels::yolo_candidates));
  m.impl("_yolo_detections", TORCH_BOX(&minkernels::yolo_detections));
  m.impl("_yolo_loss_fwd", TORCH_BOX(&minkernels::yolo_loss_fwd));
  m.impl("_yolo_loss_bwd", TORCH_BOX(&minkernels::yolo_loss_bwd));
}

// The BCE, focal and Dice operators on CPU tensors: how elements are visited, blocks shared out, sums finished. The arithmetic is in
// segmentation_kernel.h. Every tensor of a pointwise loss has the shape of the logits.
#include "segmentation.h"

#include <cmath>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime.h"

#define KERNEL "segmentation_kernel.h"
#include "levels.h"

namespace minkernels {

using Maybe = std::optional<Tensor>;

static constexpr SegmentationKernels kernels_at[][4] = {LEVELS(segmentation_kernels<float>), WIDE_LEVELS(segmentation_kernels<double>)};

static Element element_type(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    case ScalarType::Bool:
    case ScalarType::Byte: return Element::u8;
    case ScalarType::Int: return Element::i32;
    case ScalarType::Long: return Element::i64;
    default: throw std::runtime_error("minkernels: a float, bool, uint8, int32 or int64 tensor was expected");
  }
}

using Operands = std::vector<std::pair<Operand*, const Tensor*>>;

// Visits the last `dims` dimensions of all tensors, which agree on them, in the order of the first one's memory: those of size 1 are
// left out, and neighbours become one where every tensor lets them.
static Walk walk_of(int64_t dims, const Operands& all) {
  const Tensor& x = *all[0].second;
  const auto stride = [&](const Tensor& t, int64_t d) { return t.stride(t.dim() - dims + d); };
  const auto size = [&](int64_t d) { return x.size(x.dim() - dims + d); };
  std::vector<int64_t> order;
  Walk walk;
  for (int64_t d = 0; d < dims; d++) {
    walk.elements *= size(d);
    if (size(d) != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return stride(x, a) > stride(x, b); });
  walk.dims = 0;
  for (int64_t d : order) {
    bool joins = walk.dims > 0;
    for (auto& [o, t] : all) joins = joins && o->stride[walk.dims - 1] == stride(*t, d) * size(d);
    walk.dims += !joins;
    walk.size[walk.dims - 1] = joins ? walk.size[walk.dims - 1] * size(d) : size(d);
    for (auto& [o, t] : all) o->stride[walk.dims - 1] = stride(*t, d);
  }
  walk.dims = std::max(walk.dims, 1);  // one element: size 1, stride 0
  for (auto& [o, t] : all) o->data = (char*)t->data_ptr(), o->type = element_type(*t);
  return walk;
}

static void add(Operands& all, Operand& o, const Maybe& t) {
  if (t) all.push_back({&o, &*t});
}

static SegmentationKernels kernels_for(const Tensor& x) { return kernels_at[element_type(x) == Element::f64][level()]; }

static void put(const Tensor& t, double value) {
  if (element_type(t) == Element::f64)
    *(double*)t.data_ptr() = value;
  else
    *(float*)t.data_ptr() = float(value);
}

static double get(const Tensor& t) { return element_type(t) == Element::f64 ? *(const double*)t.data_ptr() : *(const float*)t.data_ptr(); }

static bool any(const std::vector<char>& flags) { return std::find(flags.begin(), flags.end(), 1) != flags.end(); }

static Pointwise pointwise(const Tensor& input, const Tensor& target, const Maybe& weight, const Maybe& pos_weight, const Maybe& mask,
                           const Maybe& dloss, const Maybe& loss, const Maybe& grad) {
  Pointwise a;
  Operands all = {{&a.x, &input}, {&a.t, &target}};
  add(all, a.weight, weight), add(all, a.pos_weight, pos_weight), add(all, a.mask, mask);
  add(all, a.dloss, dloss), add(all, a.loss, loss), add(all, a.grad, grad);
  a.walk = walk_of(input.dim(), all);
  if (grad) advise_huge_pages(a.grad.data, grad->numel() * grad->element_size());
  if (loss) advise_huge_pages(a.loss.data, loss->numel() * loss->element_size());
  return a;
}

static void run_pointwise(const Pointwise& a, const SegmentationKernels& kernels, int64_t tasks) {
  int which = a.gamma == 0 ? 0 : a.gamma == 1 ? 1 : a.gamma == 2 ? 2 : 3;
  run_tasks(tasks, 0, [&](int64_t task, char*) { kernels.pointwise[which](a, task); });
}

// As check_targets() of segmentation/_targets.py: the first integer target that counts and is neither 0 nor 1, or names none of the classes
// of a class map.
[[noreturn]] static void bad_target(const Tensor& input, const Tensor& target, const Maybe& mask) {
  const bool class_map = target.dim() < input.dim();
  const int64_t classes = class_map ? input.size(1) : 2;
  std::vector<int64_t> at(target.dim());
  const auto element = [](const Tensor& t, const std::vector<int64_t>& at) {
    int64_t offset = 0;
    for (int64_t d = 0; d < t.dim(); d++) offset += at[d] * t.stride(d);
    const int64_t bytes = t.element_size();
    const char* p = (const char*)t.data_ptr() + offset * bytes;
    return bytes == 8 ? *(const int64_t*)p : bytes == 4 ? *(const int32_t*)p : *(const uint8_t*)p;
  };
  const auto counts = [&] {
    if (!mask || !class_map) return !mask || element(*mask, at);
    std::vector<int64_t> of_class(at);
    of_class.insert(of_class.begin() + 1, 0);
    for (int64_t& c = of_class[1]; c < mask->size(1); c++)
      if (element(*mask, of_class)) return true;
    return false;
  };
  for (int64_t left = target.numel(); left; left--) {
    const int64_t label = element(target, at);
    if ((label < 0 || label >= classes) && counts()) {
      std::string where;
      for (int64_t i : at) where += (where.empty() ? "" : ", ") + std::to_string(i);
      throw std::out_of_range("target[" + where + "] is " + std::to_string(label) +
                              (class_map
                                   ? ", out of range for " + std::to_string(classes) + " classes (0 to " + std::to_string(classes - 1) + ")"
                                   : ": an integer target is 0 or 1 wherever it counts"));
    }
    for (int64_t d = target.dim(); d-- > 0 && ++at[d] == target.size(d);) at[d] = 0;
  }
  throw std::logic_error("minkernels: a target was out of range, and is not");
}

// Outputs as sigmoid_loss_outputs() of segmentation/_outputs.py makes them. scale: what the gradient of each element is multiplied by.
static std::tuple<Tensor, Tensor, Tensor> sigmoid_loss_fwd(Tensor input, Tensor target, Maybe weight, Maybe pos_weight, Maybe mask,
                                                           double alpha, double gamma, StringHandle reduction, bool with_grad) {
  const Reduction how = take_reduction(reduction);
  const bool each = how == Reduction::none, mean = how == Reduction::mean;
  Tensor loss = each ? fresh_like(input, wide_dtype(input)) : fresh({}, wide_dtype(input)), scale = fresh({}, wide_dtype(input));
  Tensor grad = with_grad ? minkernels::empty_like(input) : fresh({0}, input.scalar_type());
  Pointwise a = pointwise(input, target, weight, pos_weight, mask, {}, each ? Maybe(loss) : Maybe(), with_grad ? Maybe(grad) : Maybe());
  SegmentationKernels kernels = kernels_for(input);
  int64_t tasks = (a.walk.elements + TASK - 1) / TASK, count = a.walk.elements;
  if (mean && mask) {
    std::vector<int64_t> counts(tasks);
    run_tasks(tasks, 0, [&](int64_t task, char*) { counts[task] = kernels.count(a, task); });
    count = std::accumulate(counts.begin(), counts.end(), int64_t(0));
  }
  a.alpha = alpha, a.gamma = gamma, a.factor = !mean ? 1.0 : count ? 1.0 / double(count) : 0.0;
  std::vector<double> sums(tasks);
  std::vector<char> bad(tasks);
  a.sums = sums.data(), a.bad = bad.data();
  run_pointwise(a, kernels, tasks);
  if (any(bad)) bad_target(input, target, mask);
  double sum = std::accumulate(sums.begin(), sums.end(), 0.0);  // in the order of the tasks
  if (!each) put(loss, mean ? sum / double(count) : sum);
  put(scale, a.factor);
  return {loss, scale, grad};
}

static Tensor sigmoid_loss_bwd(Tensor dloss, Tensor input, Tensor target, Maybe weight, Maybe pos_weight, Maybe mask, Tensor scale,
                               double alpha, double gamma) {
  Tensor grad = minkernels::empty_like(input);
  bool each = dloss.dim() == input.dim() && dloss.dim() > 0;
  Pointwise a = pointwise(input, target, weight, pos_weight, mask, each ? Maybe(dloss) : Maybe(), {}, grad);
  a.alpha = alpha, a.gamma = gamma, a.factor = get(scale) * (each ? 1.0 : get(dloss));
  run_pointwise(a, kernels_for(input), (a.walk.elements + TASK - 1) / TASK);
  return grad;
}

// pos_weight: (C,) of any float dtype, or empty.
static std::vector<double> doubles(const Maybe& pos_weight) {
  if (!pos_weight) return {};
  const Tensor wide = torch::stable::contiguous(torch::stable::to(*pos_weight, torch::headeronly::ScalarType::Double));
  const double* from = (const double*)wide.data_ptr();
  return {from, from + wide.numel()};
}

static Dice dice(const Tensor& input, const Tensor& target, const std::vector<double>& pos_weight, const Maybe& mask, bool squared,
                 const Maybe& grad) {
  Dice a;
  a.N = input.size(0), a.C = input.size(1), a.squared = squared, a.class_map = target.dim() < input.dim();
  Operands all = {{&a.x, &input}, {&a.t, &target}};
  add(all, a.mask, mask), add(all, a.grad, grad);
  a.walk = walk_of(input.dim() - 2, all);
  for (auto& [o, t] : all) o->image = t->stride(0), o->channel = t->dim() < input.dim() ? 0 : t->stride(1);
  if (!pos_weight.empty()) a.pos_weight = pos_weight.data();
  if (grad) advise_huge_pages(a.grad.data, grad->numel() * grad->element_size());
  return a;
}

static void run_pieces(const Dice& a, int64_t scratch_bytes, void (*f)(const Dice&, int64_t, char*)) {
  int64_t pieces = a.N * a.pieces_of_an_image(), of_a_piece = std::min(a.walk.elements, TASK) * a.C;
  int64_t group = std::max<int64_t>(TASK / std::max<int64_t>(of_a_piece, 1), 1);
  run_tasks((pieces + group - 1) / group, size_t(scratch_bytes), [&](int64_t task, char* scratch) {
    for (int64_t piece = task * group; piece < std::min((task + 1) * group, pieces); piece++) f(a, piece, scratch);
  });
}

// Losses and gradient factors of every entry (image and channel, or channel), from the sums of its pieces, in their order.
template <class A>
static void finish_dice(const Dice& a, const std::vector<double>& sums, double bce_weight, double dice_weight, double smooth,
                        bool per_image, Reduction reduction, A* loss, A* factors) {
  int64_t pieces = a.pieces_of_an_image(), entries = per_image ? a.N * a.C : a.C;
  std::vector<double> totals(entries * DICE_SUMS);
  for (int64_t piece = 0; piece < a.N * pieces; piece++)
    for (int64_t c = 0; c < a.C; c++)
      for (int k = 0; k < DICE_SUMS; k++)
        totals[((per_image ? piece / pieces * a.C : 0) + c) * DICE_SUMS + k] += sums[(piece * a.C + c) * DICE_SUMS + k];
  double bce = 0, dice = 0, all = 0, elements = 0, present = 0;
  for (int64_t e = 0; e < entries; e++) elements += totals[e * DICE_SUMS + 3], present += totals[e * DICE_SUMS + 3] > 0;
  bool mean = reduction == Reduction::mean;
  for (int64_t e = 0; e < entries; e++) {
    const double* s = &totals[e * DICE_SUMS];
    bool counts = s[3] > 0;
    double above = 2 * s[1] + smooth, below = s[2] + smooth, score = 1 - above / below,
           own = bce_weight * (s[0] / s[3]) + dice_weight * score;
    if (counts) bce += s[0], dice += score, all += own;
    if (reduction == Reduction::none) loss[e] = A(counts ? own : 0);
    double of_dice = counts ? dice_weight / (mean ? present : 1) : 0;
    A* f = factors + e * FACTORS;
    f[0] = A(counts ? bce_weight / (mean ? elements : s[3]) : 0);
    f[1] = A(counts ? -2 * of_dice / below : 0);
    f[2] = A(counts ? of_dice * above / below / below * (a.squared ? 2 : 1) : 0);
  }
  if (reduction == Reduction::sum) *loss = A(all);
  if (mean) *loss = A(bce_weight * (bce / elements) + dice_weight * (dice / present));
}

// Outputs as bce_dice_outputs() of segmentation/_outputs.py makes them.
static std::tuple<Tensor, Tensor> bce_dice_fwd(Tensor input, Tensor target, Maybe pos_weight, Maybe mask, double bce_weight,
                                               double dice_weight, double smooth, bool squared, bool per_image, StringHandle reduction) {
  const Reduction how = take_reduction(reduction);
  const std::vector<double> weights = doubles(pos_weight);
  Dice a = dice(input, target, weights, mask, squared, {});
  std::vector<int64_t> entries{a.C};
  if (per_image) entries.insert(entries.begin(), a.N);
  Tensor loss = fresh(how == Reduction::none ? entries : std::vector<int64_t>(), wide_dtype(input));
  entries.push_back(FACTORS);
  Tensor factors = fresh(entries, wide_dtype(input));
  std::vector<double> sums(a.N * a.pieces_of_an_image() * a.C * DICE_SUMS);
  std::vector<char> bad(a.N * a.pieces_of_an_image());
  a.sums = sums.data(), a.bad = bad.data();
  SegmentationKernels kernels = kernels_for(input);
  run_pieces(a, kernels.dice_scratch, kernels.dice_sums);
  if (any(bad)) bad_target(input, target, mask);
  const auto finish = [&](auto zero) {
    using A = decltype(zero);
    finish_dice(a, sums, bce_weight, dice_weight, smooth, per_image, how, (A*)loss.data_ptr(), (A*)factors.data_ptr());
  };
  element_type(factors) == Element::f64 ? finish(0.0) : finish(0.0f);
  return {loss, factors};
}

static Tensor bce_dice_bwd(Tensor input, Tensor target, Maybe pos_weight, Maybe mask, Tensor factors, bool squared) {
  const std::vector<double> weights = doubles(pos_weight);
  Tensor grad = minkernels::empty_like(input);
  if (!factors.is_contiguous()) factors = torch::stable::contiguous(factors);
  Dice a = dice(input, target, weights, mask, squared, grad);
  a.factors = (const char*)factors.data_ptr(), a.factors_image = factors.dim() == 3 ? a.C * FACTORS : 0;
  SegmentationKernels kernels = kernels_for(input);
  run_pieces(a, kernels.dice_scratch, kernels.dice_grad);
  return grad;
}

}  // namespace minkernels

STABLE_TORCH_LIBRARY_IMPL(minkernels, CPU, m) {
  m.impl("sigmoid_loss_fwd", TORCH_BOX(&minkernels::sigmoid_loss_fwd));
  m.impl("sigmoid_loss_bwd", TORCH_BOX(&minkernels::sigmoid_loss_bwd));
  m.impl("bce_dice_fwd", TORCH_BOX(&minkernels::bce_dice_fwd));
  m.impl("bce_dice_bwd", TORCH_BOX(&minkernels::bce_dice_bwd));
}

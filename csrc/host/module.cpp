// minkernels._host: the C++ that works on NumPy arrays. Private: minmodels/metrics.py has checked what comes here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>

#include "average_precision.h"

namespace py = pybind11;
namespace mk = minkernels;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class... More>
static mk::Boxes boxes(const Array<double>& box, const Array<mk::Index>& image, const Array<mk::Index>& category, const More&... more) {
  py::ssize_t count = image.size();
  if (count > std::numeric_limits<mk::Index>::max()) throw std::length_error("2**31 boxes and more are not supported");
  if (box.size() != 4 * count || category.size() != count || ((more.size() != count) || ...))
    throw std::invalid_argument("the columns of the boxes differ in length");
  return {mk::Index(count), box.data(), image.data(), category.data()};
}

static py::tuple coco_ap(Array<double> gt_box, Array<mk::Index> gt_image, Array<mk::Index> gt_category, Array<double> gt_area,
                         Array<uint8_t> gt_crowd, Array<double> dt_box, Array<mk::Index> dt_image, Array<mk::Index> dt_category,
                         Array<double> dt_score, mk::Index images, mk::Index categories, std::vector<double> ious,
                         std::vector<double> recalls, std::vector<std::pair<double, double>> areas, std::vector<mk::Index> most,
                         int threads) {
  mk::Truths gts{boxes(gt_box, gt_image, gt_category, gt_area, gt_crowd), gt_area.data(), gt_crowd.data()};
  mk::Detections dts{boxes(dt_box, dt_image, dt_category, dt_score), dt_score.data()};
  mk::CocoParams params{ious, recalls, {}, {}, most};
  for (auto& [from, to] : areas) params.area_from.push_back(from), params.area_to.push_back(to);
  py::ssize_t T = ious.size(), A = areas.size(), M = most.size(), R = recalls.size();
  Array<double> precision({py::ssize_t(categories), T, A, M, R}), scores({py::ssize_t(categories), T, A, M, R});
  Array<double> recall({py::ssize_t(categories), T, A, M});
  mk::CocoResult out{precision.mutable_data(), scores.mutable_data(), recall.mutable_data()};
  {
    py::gil_scoped_release release;
    mk::coco_ap(gts, dts, images, categories, params, threads, out);
  }
  return py::make_tuple(precision, recall, scores);
}

static Array<int8_t> voc_match(Array<double> gt_box, Array<mk::Index> gt_image, Array<mk::Index> gt_category, Array<uint8_t> gt_difficult,
                               Array<double> dt_box, Array<mk::Index> dt_image, Array<mk::Index> dt_category, Array<double> dt_score,
                               mk::Index images, mk::Index categories, double iou, double extent) {
  mk::Truths gts{boxes(gt_box, gt_image, gt_category, gt_difficult), nullptr, gt_difficult.data()};
  mk::Detections dts{boxes(dt_box, dt_image, dt_category, dt_score), dt_score.data()};
  Array<int8_t> outcome(py::ssize_t(dts.count));
  {
    int8_t* to = outcome.mutable_data();
    py::gil_scoped_release release;
    mk::voc_match(gts, dts, images, categories, iou, extent, to);
  }
  return outcome;
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "The C++ that works on NumPy arrays.";
  m.def("coco_ap", &coco_ap);
  m.def("voc_match", &voc_match);
}

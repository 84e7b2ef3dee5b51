// Average precision of boxes, as pycocotools (COCO) and the VOC devkits count it: detections matched to ground truths, and precision
// sampled at recalls. Plain C++ on plain arrays; the caller has checked them.
#pragma once
#include <cstdint>
#include <vector>

namespace minkernels {

using Index = int32_t;  // of a box: there are fewer than 2**31

struct Boxes {
  Index count;
  const double* box;              // (count, 4): xywh for COCO, xyxy for VOC
  const Index *image, *category;  // (count,): 0 .. images - 1, 0 .. categories - 1
};

struct Truths : Boxes {
  const double* area;   // COCO: (count,), which is not always that of the box
  const uint8_t* flag;  // (count,): 1 is a crowd (COCO) or difficult (VOC)
};

struct Detections : Boxes {
  const double* score;  // (count,): not NaN
};

struct CocoParams {
  std::vector<double> ious;                // T, ascending
  std::vector<double> recalls;             // R, ascending, the first is 0
  std::vector<double> area_from, area_to;  // A, both ends belong to the range; T * A <= 64
  std::vector<Index> most;                 // M, ascending: detections of a class in an image that count
};

// precision and scores (categories, T, A, M, R), recall (categories, T, A, M): -1 for a class without a ground truth in that range.
struct CocoResult {
  double *precision, *scores, *recall;
};

// The bits of the result do not depend on the number of threads.
void coco_ap(const Truths& gts, const Detections& dts, Index images, Index categories, const CocoParams& params, int threads,
             const CocoResult& out);

// outcome (dts.count,): 1 a true positive, 0 a false one, -1 neither: its object is difficult. extent: 1 where a box includes its last
// pixel, so that its width is x2 - x1 + 1, else 0.
void voc_match(const Truths& gts, const Detections& dts, Index images, Index categories, double iou, double extent, int8_t* outcome);

}  // namespace minkernels

// What the NMS kernels are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

constexpr int64_t TASK_BOXES = 2048;     // of a task at least, or one segment
constexpr int64_t LINE = 16;             // places
constexpr int64_t GRID_BOXES = 1024;     // of a segment for which there is memory for a grid
constexpr double GRID_THRESHOLD = 0.02;  // below it, a box may overlap with too many cells
constexpr double FEW_CELLS = 0.25;       // above it, with few

struct Nms {  // strides in elements
  const char *boxes = nullptr, *scores = nullptr;
  const int64_t* classes = nullptr;  // null: all boxes are of one
  Dtype box_type = Dtype::f32, score_type = Dtype::f32;
  int64_t box_image = 0, box = 0, coordinate = 0;
  int64_t score_image = 0, score = 0;
  int64_t class_image = 0, class_ = 0;
  int64_t B = 1, N = 0;
  double threshold = 0;              // of the IoU, in the arithmetic's precision
  bool drop = false, above = false;  // boxes with a NaN take no part; nor those whose score is not above score_threshold
  double score_threshold = 0;
  bool want_suppressor = false;
  int64_t max_output = 0;
};

struct Segment {  // the boxes of a class, at places next to end - 1; those before `next` are decided
  uint32_t begin, next, end;
  uint32_t kept;  // boxes that may suppress others: a list at begin to begin + kept - 1
};

// Of a large segment, once most of its boxes are kept: the places of each cell's boxes lie together. By place, beginning at the segment's.
struct Grid {
  char *x1 = nullptr, *y1, *x2, *y2, *area;  // null: none is wanted
  uint32_t *rank, *start, *count, *cell;
};

// The boxes of an image. Rank: by descending score. Place: by class, then rank; the places of a task begin on a cache line.
struct Image {
  int64_t n = 0;             // that take part
  uint64_t *pairs, *spare;   // of the sorting: key << 32 | index
  uint32_t* order;           // by rank: the index
  uint32_t* suppressor;      // by rank: the rank of the first box that suppresses it
  uint8_t* keep;             // by rank
  uint32_t* rank;            // by place
  char *x1, *y1, *x2, *y2;   // by place, in the type of the arithmetic
  char* area;                // 0 of a box that neither suppresses nor is suppressed: NaN, or no area
  bool small_areas = false;  // some box's is so small that products with the threshold may be subnormal
  Segment* segments;
  int64_t n_segments = 0;
  Grid grid;
  uint32_t* tasks;  // the first segment of each, and behind the last one n_segments
  int64_t n_tasks = 0;
};

struct NmsKernels {
  void (*prepare)(const Nms&, int64_t image, Image&);
  // Decides the boxes of one task whose rank is below `ranks`.
  void (*suppress)(const Nms&, const Image&, int64_t task, int64_t ranks);
};

}  // namespace minkernels

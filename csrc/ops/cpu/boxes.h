// What the kernels of the IoU family are told: shared by every level, plain data.
#pragma once
#include "vec_includes.h"

namespace minkernels {

enum class Kind : int64_t { iou, giou, diou, ciou };
enum class Format : int64_t { xyxy, xywh, cxcywh };

struct Boxes {  // (sets, boxes, 4); strides in elements
  const char* data = nullptr;
  int64_t set = 0, box = 0, coordinate = 0;
};

// Pairwise values and their gradients, in parts that depend on the shape alone.
constexpr int64_t COLUMNS = 1024;   // boxes of the second set that are worked on in the L1 and L2 caches
constexpr int64_t MOST_PARTS = 16;  // of a set, in the backward: each has sums of its own for every box of the other set
struct Pairs {
  Boxes a, b;
  int64_t sets, N, M;
  Format format;
  double eps;                  // of the squared diagonal, and of alpha
  char* out = nullptr;         // (sets, N, M), forward
  int64_t rows = 0;            // of a task, forward
  const char* dout = nullptr;  // backward, any strides
  int64_t dout_set = 0, dout_row = 0, dout_column = 0;
  int64_t row_parts = 0, row_part = 0, column_parts = 0, column_part = 0;  // how many there are, and boxes of each
  double *sums_a = nullptr, *sums_b = nullptr;  // (sets, column_parts, N, 4), (sets, row_parts, M, 4); null: not wanted
};

struct Match {
  Boxes boxes, gts;
  int64_t N, G;
  Format format;
  int64_t parts, part;  // how many there are of a set of boxes, and boxes of each
  char* best_iou;       // (sets, N)
  int64_t* best_gt;
  char* gt_best_iou;  // (sets, G)
  int64_t* gt_best_box;
  char* part_iou = nullptr;  // (sets, parts, G)
  int64_t* part_box = nullptr;
};

constexpr int64_t LOSS_BLOCK = 512, LOSS_TASK = 8 * LOSS_BLOCK;  // pairs
struct Loss {
  Boxes a, b;  // one set; P boxes
  int64_t P;
  Format format;
  double eps;
  char* loss = nullptr;         // (P,) or null
  const char* dloss = nullptr;  // backward
  int64_t dloss_stride = 0;
  char *da = nullptr, *db = nullptr;  // (P, 4); null: not wanted
};

struct BoxKernels {  // pairs and match: of float and double alone
  void (*pairs)(const Pairs&, int64_t task, char* scratch);
  void (*pairs_grad)(const Pairs&, int64_t task, char* scratch);
  void (*match)(const Match&, int64_t task, char* scratch);
  void (*match_finish)(const Match&, int64_t set);
  double (*loss)(const Loss&, int64_t task);  // returns their sum
  void (*loss_grad)(const Loss&, int64_t task);
};
constexpr int64_t PAIRS_SCRATCH = 16 * COLUMNS * 8;
inline int64_t match_scratch(int64_t part, int64_t item) { return (8 * (part + 64)) * item; }

}  // namespace minkernels

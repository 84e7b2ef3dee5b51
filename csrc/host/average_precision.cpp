#include "average_precision.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <limits>
#include <numeric>

namespace minkernels {
namespace {

struct Range {
  Index begin, end;
};

// Boxes by class, then image, then as they came.
struct Groups {
  std::vector<Index> order, category_begin;

  Groups(const Boxes& b, Index images, Index categories) {
    std::vector<Index> ids(b.count), by_image, starts;
    std::iota(ids.begin(), ids.end(), 0);
    spread(ids, b.image, images, by_image, starts);
    spread(by_image, b.category, categories, order, category_begin);
  }

  // The boxes of one image from position i on.
  Range image_at(const Boxes& b, Index i, Index end) const {
    Index stop = i;
    while (stop < end && b.image[order[stop]] == b.image[order[i]]) stop++;
    return {i, stop};
  }

  // f(gts of an image, dts of it) for every image of a class that has any, in their order.
  template <class F>
  static void each_image(const Boxes& gts, const Groups& by_gt, const Boxes& dts, const Groups& by_dt, Index category, const F& f) {
    constexpr Index none = std::numeric_limits<Index>::max();
    Index g = by_gt.category_begin[category], g_end = by_gt.category_begin[category + 1];
    Index d = by_dt.category_begin[category], d_end = by_dt.category_begin[category + 1];
    while (g < g_end || d < d_end) {
      Index g_image = g < g_end ? gts.image[by_gt.order[g]] : none, d_image = d < d_end ? dts.image[by_dt.order[d]] : none;
      Range own_gts = g_image <= d_image ? by_gt.image_at(gts, g, g_end) : Range{g, g};
      Range own_dts = d_image <= g_image ? by_dt.image_at(dts, d, d_end) : Range{d, d};
      f(own_gts, own_dts);
      g = own_gts.end, d = own_dts.end;
    }
  }

 private:
  static void spread(const std::vector<Index>& from, const Index* key, Index keys, std::vector<Index>& to, std::vector<Index>& starts) {
    starts.assign(keys + 1, 0);
    for (Index i : from) starts[key[i] + 1]++;
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<Index> next(starts.begin(), starts.end() - 1);
    to.resize(from.size());
    for (Index i : from) to[next[key[i]]++] = i;
  }
};

// From the highest score to the lowest; equal ones as they came.
void by_score(const Detections& dts, const Groups& groups, Range r, std::vector<Index>& sorted) {
  sorted.assign(groups.order.begin() + r.begin, groups.order.begin() + r.end);
  std::sort(sorted.begin(), sorted.end(), [&](Index a, Index b) {
    return dts.score[a] > dts.score[b] || (dts.score[a] == dts.score[b] && a < b);  // ids of one image ascend
  });
}

double coco_iou(const double* d, const double* g, bool crowd) {
  double w = std::min(d[2] + d[0], g[2] + g[0]) - std::max(d[0], g[0]);
  if (w <= 0) return 0;
  double h = std::min(d[3] + d[1], g[3] + g[1]) - std::max(d[1], g[1]);
  if (h <= 0) return 0;
  double both = w * h, area = d[2] * d[3];
  return both / (crowd ? area : area + g[2] * g[3] - both);
}

// One class. A setting is an (area range, IoU threshold), and a bit of the masks.
class CocoClass {
 public:
  CocoClass(const Truths& gts, const Groups& by_gt, const Detections& dts, const Groups& by_dt, const CocoParams& params)
      : gts_(gts),
        by_gt_(by_gt),
        dts_(dts),
        by_dt_(by_dt),
        params_(params),
        T_(params.ious.size()),
        A_(params.area_from.size()),
        M_(params.most.size()),
        R_(params.recalls.size()) {
    for (double t : params.ious) at_least_.push_back(std::min(t, 1 - 1e-10));  // so that equal boxes match at an IoU of 1
  }

  void run(Index category, const CocoResult& out) {
    dets_.clear();
    positives_.assign(A_, 0);
    Groups::each_image(gts_, by_gt_, dts_, by_dt_, category, [&](Range g, Range d) { match_image(g, d); });
    std::sort(dets_.begin(), dets_.end(),
              [](const Det& a, const Det& b) { return a.score > b.score || (a.score == b.score && a.arrival < b.arrival); });
    count();
    for (size_t t = 0; t < T_; t++)
      for (size_t a = 0; a < A_; a++)
        for (size_t m = 0; m < M_; m++) {
          size_t at = ((category * T_ + t) * A_ + a) * M_ + m;
          sample(t, a, m, out.precision + at * R_, out.scores + at * R_, out.recall[at]);
        }
  }

 private:
  struct Truth {
    const double* box;
    bool crowd;
    uint64_t ignored, taken;  // ignored: a bit an area range; taken: a bit a setting
  };
  struct Det {
    double score;
    Index arrival, rank;              // among those of the class; among those of its image
    uint64_t in_range, matched, hit;  // in_range: a bit an area range; hit: matched to a truth that counts
  };
  struct Candidate {
    double iou;
    Truth* truth;
  };
  struct Hit {
    Index det, false_ones;  // the false positives up to it
  };

  uint64_t ranges_of(double area) const {
    uint64_t bits = 0;
    for (size_t a = 0; a < A_; a++) bits |= uint64_t(!(area < params_.area_from[a] || area > params_.area_to[a])) << a;
    return bits;
  }

  void match_image(Range g, Range d) {
    truths_.clear();
    for (Index i = g.begin; i < g.end; i++) {
      Index id = by_gt_.order[i];
      uint64_t ignored = gts_.flag[id] ? ~uint64_t(0) : ~ranges_of(gts_.area[id]);
      truths_.push_back({gts_.box + 4 * int64_t(id), gts_.flag[id] != 0, ignored, 0});
      for (size_t a = 0; a < A_; a++) positives_[a] += !(ignored >> a & 1);
    }
    by_score(dts_, by_dt_, d, sorted_);
    Index most = std::min<Index>(sorted_.size(), params_.most.back());
    for (Index rank = 0; rank < most; rank++) {
      Index id = sorted_[rank];
      const double* box = dts_.box + 4 * int64_t(id);
      dets_.push_back({dts_.score[id], Index(dets_.size()), rank, ranges_of(box[2] * box[3]), 0, 0});
      match(box, dets_.back());
    }
  }

  void match(const double* box, Det& det) {
    candidates_.clear();
    bool nan = false;  // from sides whose product overflows or vanishes: it matches, and after it nothing is less than the best
    for (Truth& g : truths_) {
      double iou = coco_iou(box, g.box, g.crowd);
      nan |= iou != iou;
      if (nan || iou >= at_least_[0]) candidates_.push_back({iou, &g});
    }
    for (size_t t = 0; t < T_; t++) {
      const auto reaches = [&](const Candidate& c) { return !(c.iou < at_least_[t]); };
      if (std::none_of(candidates_.begin(), candidates_.end(), reaches)) return;
      for (size_t a = 0; a < A_; a++) {
        uint64_t bit = uint64_t(1) << (a * T_ + t);
        Truth* best = nearest(t, a, bit, 0);
        det.hit |= best ? bit : 0;
        if (!best) best = nearest(t, a, bit, 1);
        if (!best) continue;
        det.matched |= bit;
        best->taken |= bit;
      }
    }
  }

  // The free truth with the largest IoU, of those that count or of those ignored; the last one of equals.
  Truth* nearest(size_t t, size_t a, uint64_t bit, uint64_t ignored) const {
    double iou = at_least_[t];
    Truth* best = nullptr;
    for (const Candidate& c : candidates_) {
      if ((c.truth->ignored >> a & 1) != ignored || ((c.truth->taken & bit) && !c.truth->crowd) || c.iou < iou) continue;
      iou = c.iou, best = c.truth;
    }
    return best;
  }

  // Lists the hits of each setting and m, with the false positives so far. A detection counts where it hits, or is unmatched and in the
  // area range: the second alone is summed for all, and put right for the few that are matched.
  void count() {
    hits_.resize(T_ * A_ * M_);
    for (auto& list : hits_) list.clear();
    in_range_.assign(A_ * M_, 0), amended_.assign(T_ * A_ * M_, 0);
    for (Index i = 0; i < Index(dets_.size()); i++) {
      const Det& det = dets_[i];
      size_t first = 0;
      while (params_.most[first] <= det.rank) first++;
      for (size_t a = 0; a < A_; a++)
        for (size_t m = first; m < M_; m++) in_range_[a * M_ + m] += det.in_range >> a & 1;
      for (uint64_t left = det.matched; left; left &= left - 1) {
        size_t s = __builtin_ctzll(left), a = s / T_;
        bool hit = det.hit >> s & 1;
        for (size_t m = first; m < M_; m++) {
          Index& amended = amended_[s * M_ + m];
          amended += hit - Index(det.in_range >> a & 1);
          std::vector<Hit>& list = hits_[s * M_ + m];
          if (hit) list.push_back({i, in_range_[a * M_ + m] + amended - Index(list.size()) - 1});
        }
      }
    }
  }

  // Precision is only looked up at hits: in between it falls, and its envelope is that of the next hit.
  void sample(size_t t, size_t a, size_t m, double* precision, double* scores, double& recall) const {
    Index positives = positives_[a];
    if (!positives) {
      std::fill(precision, precision + R_, -1.0), std::fill(scores, scores + R_, -1.0);
      recall = -1;
      return;
    }
    const std::vector<Hit>& hits = hits_[(a * T_ + t) * M_ + m];
    const auto recall_at = [&](Index hit) { return double(hit + 1) / positives; };
    recall = hits.empty() ? 0 : recall_at(hits.size() - 1);
    Index i = hits.size();
    double envelope = 0;
    for (size_t r = R_ - 1; r > 0; r--) {
      precision[r] = scores[r] = 0;
      if (recall < params_.recalls[r]) continue;
      while (i > 0 && recall_at(i - 1) >= params_.recalls[r]) envelope = std::max(envelope, precision_at(hits, --i));
      precision[r] = envelope, scores[r] = dets_[hits[i].det].score;
    }
    while (i > 0) envelope = std::max(envelope, precision_at(hits, --i));
    precision[0] = envelope, scores[0] = dets_.empty() ? 0 : dets_[0].score;  // recall 0 is reached by whatever comes first
  }

  static double precision_at(const std::vector<Hit>& hits, Index i) {
    double hit = i + 1;
    return hit / (hits[i].false_ones + hit + std::numeric_limits<double>::epsilon());
  }

  const Truths& gts_;
  const Groups& by_gt_;
  const Detections& dts_;
  const Groups& by_dt_;
  const CocoParams& params_;
  const size_t T_, A_, M_, R_;
  std::vector<double> at_least_;
  std::vector<Truth> truths_;
  std::vector<Index> sorted_, positives_, in_range_, amended_;
  std::vector<Candidate> candidates_;
  std::vector<Det> dets_;
  std::vector<std::vector<Hit>> hits_;
};

}  // namespace

void coco_ap(const Truths& gts, const Detections& dts, Index images, Index categories, const CocoParams& params, int threads,
             const CocoResult& out) {
  Groups by_gt(gts, images, categories), by_dt(dts, images, categories);
  std::vector<Index> longest(categories);
  std::iota(longest.begin(), longest.end(), 0);
  const auto dets_of = [&](Index c) { return by_dt.category_begin[c + 1] - by_dt.category_begin[c]; };
  std::stable_sort(longest.begin(), longest.end(), [&](Index a, Index b) { return dets_of(a) > dets_of(b); });
  std::atomic<Index> next{0};
  const auto work = [&] {
    CocoClass of_class(gts, by_gt, dts, by_dt, params);
    for (Index i; (i = next++) < categories;) of_class.run(longest[i], out);
  };
  std::vector<std::future<void>> others;
  for (int i = 1; i < std::min<int64_t>(threads, categories); i++) others.push_back(std::async(std::launch::async, work));
  work();
  for (auto& other : others) other.get();
}

void voc_match(const Truths& gts, const Detections& dts, Index images, Index categories, double iou, double extent, int8_t* outcome) {
  Groups by_gt(gts, images, categories), by_dt(dts, images, categories);
  std::vector<Index> sorted;
  std::vector<char> taken;
  const auto overlap = [&](const double* d, const double* g) {  // -1: none
    double w = std::min(d[2], g[2]) - std::max(d[0], g[0]) + extent, h = std::min(d[3], g[3]) - std::max(d[1], g[1]) + extent;
    if (!(w > 0 && h > 0)) return -1.0;
    double all = (d[2] - d[0] + extent) * (d[3] - d[1] + extent) + (g[2] - g[0] + extent) * (g[3] - g[1] + extent) - w * h;
    return w * h / all;
  };
  for (Index category = 0; category < categories; category++)
    Groups::each_image(gts, by_gt, dts, by_dt, category, [&](Range g, Range d) {
      by_score(dts, by_dt, d, sorted);
      taken.assign(g.end - g.begin, 0);
      for (Index id : sorted) {
        double largest = -1;
        Index best = -1;
        for (Index i = g.begin; i < g.end; i++) {
          double o = overlap(dts.box + 4 * int64_t(id), gts.box + 4 * int64_t(by_gt.order[i]));
          if (o > largest) largest = o, best = i;  // the first of equals
        }
        bool found = best >= 0 && largest >= iou;
        if (found && gts.flag[by_gt.order[best]])
          outcome[id] = -1;
        else
          outcome[id] = found && !taken[best - g.begin];
        if (found) taken[best - g.begin] = 1;
      }
    });
}

}  // namespace minkernels

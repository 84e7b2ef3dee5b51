// Softmax losses on one level. exp(z - max) and not exp2(z * log2e - ...): two logits of 2**24 must stay equal.
// Source: Online normalizer calculation for softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.

constexpr int COEFFICIENTS = 5;
constexpr int PAD = 64;  // elements that a vector loop may pass the end by

// What the first pass leaves of a row, in the order of stats: m the largest z; d = sum exp(z - m); T = sum c; rel = m - z[label];
// U = sum c (m - z); E = sum exp(z - m) (m - z). c are the weights, times the probabilities where the targets are such.
template <class A>
struct Row {
  A m = -__builtin_inf(), d = 0, T = 0, rel = 0, U = 0, E = 0;
  int64_t argmax = 0;
};

// d loss / dz[j] = exp(z[j] - m) (P + Q (m - z[j])) - S c[j] - H [j == label].
template <class A>
struct Coefficients {
  A m, P, Q, H, S;
};

template <class A>
INLINE vec<A> exp_of(vec<A> x) {
#if LEVEL_BYTES == 64
  if constexpr (sizeof(A) == 4) return exp_by_table<false>(x);
#endif
  return exp2(x * splat(A(LOG2E)));
}
template <class A>
INLINE A exp_of(A x) {
  return exp_of<A>(splat(x))[0];
}

// Logits to z, n of them and up to a register more.
template <class A>
static void transform(const Softmax& a, A* z, int64_t n) {
  constexpr int L = vector<A>::lanes;
  if (a.softcap > 0) {
    A in = A(a.scale / a.softcap), out = A(a.softcap);
    for (int64_t i = 0; i < n; i += L) store(z + i, tanh<vec<A>>(load(z + i) * in) * out);
  } else if (a.scale != 1) {
    for (int64_t i = 0; i < n; i += L) store(z + i, load(z + i) * A(a.scale));
  }
}
template <class A>
static A transformed(const Softmax& a, A x) {
  A z[vector<A>::lanes] = {x};
  transform(a, z, 1);
  return z[0];
}

// d z / d logit, but for a.scale.
template <class A>
INLINE vec<A> slope(const Softmax& a, vec<A> z) {
  vec<A> t = z * A(1 / a.softcap);
  return 1 - t * t;
}

// n targets that are probabilities, smoothed.
template <class A>
static void read_probs(const Softmax& a, int64_t offset, int64_t stride, int64_t n, A* to) {
  switch (a.probs.dtype) {
    case Dtype::f16: widen_row(to, (const half*)a.probs.data + offset, stride, n); break;
    case Dtype::bf16: widen_row(to, (const bfloat16*)a.probs.data + offset, stride, n); break;
    case Dtype::f32: widen_row(to, (const float*)a.probs.data + offset, stride, n); break;
    case Dtype::f64: widen_row(to, (const double*)a.probs.data + offset, stride, n); break;
  }
  A keep = A(1 - a.smoothing), add = A(a.smoothing / double(a.V));
  if (a.smoothing > 0)
    for (int64_t i = 0; i < n; i++) to[i] = to[i] * keep + add;
}

INLINE bool weighs_all(const Softmax& a) { return a.probs.data || a.smoothing > 0; }  // whether T, U and S are of use

template <class A>
INLINE A weight_of(const Softmax& a, int64_t label) {
  return a.weight && a.target ? ((const A*)a.weight)[label] : A(1);
}

template <class A>
static double row_loss(const Softmax& a, const Row<A>& r, A w) {
  double log_d = __builtin_log(double(r.d)), lse = double(r.m) + log_d;
  double loss = a.probs.data ? double(r.T) * log_d + r.U : (1 - a.smoothing) * w * (log_d + r.rel);
  if (!a.probs.data && a.smoothing > 0) loss += a.smoothing / double(a.V) * (a.weight_sum * log_d + r.U);
  return a.z_loss != 0 ? loss + a.z_loss * w * lse * lse : loss;
}

template <class A>
static Coefficients<A> row_coefficients(const Softmax& a, const Row<A>& r, A w) {
  double total = a.probs.data ? double(r.T) : (1 - a.smoothing) * w + a.smoothing / double(a.V) * a.weight_sum;
  if (a.z_loss != 0) total += 2 * a.z_loss * w * (double(r.m) + __builtin_log(double(r.d)));
  double H = a.probs.data ? 0 : (1 - a.smoothing) * w, S = a.probs.data ? 1 : a.smoothing / double(a.V);
  return {r.m, A(a.factor * total / r.d), 0, A(a.factor * H), A(a.factor * S)};
}

template <class A>
static void write_stats(const Softmax& a, int64_t row, const Row<A>& r) {
  const A all[] = {r.m, r.d, r.T, r.rel, r.U, r.E};
  for (int64_t i = 0; i < a.stats_columns; i++) ((A*)a.stats)[row * a.stats_columns + i] = all[i];
  if (a.argmax) a.argmax[row] = r.argmax;
}

#include "transpose.h"
#include "cross_entropy_rows.h"
#include "cross_entropy_positions.h"

template <class T>
constexpr SoftmaxKernels softmax_kernels{all_rows<T>, all_positions<T>};

// BCE, focal and Dice losses on one level: blocks of elements are widened into the L1 cache, and everything that an element needs comes
// from one exponential: e = exp(-|x|) gives sigmoid(|x|) = 1 / (1 + e), sigmoid(-|x|) = e / (1 + e) and softplus(-|x|) = log1p(e). None
// of them cancels, so a loss of 1e-30 is as right as one of 1.
// Sources: Focal Loss for Dense Object Detection, Lin et al. 2017, arXiv:1708.02002; V-Net, Milletari et al. 2016, arXiv:1606.04797.

namespace {  // the templates too: another family may have a Sum of its own

// e**x for x <= 0, relative error under 1.3e-7; exactly 0 for -200, and below -87.7 where there is no vscalefps.
INLINE f32 exp_of_negative(f32 x) {
#if LEVEL_BYTES == 64
  return exp_by_table<true>(x);
#else
  const f32 magic = splat(12582912.0f);  // 1.5 * 2**23, as in exp2
  x = max(splat(-88.0f), x);             // in this order a NaN stays
  f32 t = x * splat(1.44269504f) + magic, n = t - magic;
  f32 r = x - n * splat(0.693359375f);
  r = r + n * splat(2.12194440e-4f);
  f32 p = splat(1.381462985e-3f);  // minimax (Remez) with the first two coefficients 1: relative error 3.1e-9
  p = p * r + splat(8.368709951e-3f);
  p = p * r + splat(4.166838708e-2f);
  p = p * r + splat(1.666652069e-1f);
  p = p * r + splat(4.999999345e-1f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  return p * (f32)(((i32)t << 23) + 0x3f800000);
#endif
}
INLINE f64 exp_of_negative(f64 x) { return exp2(x * splat(1.4426950408889634)); }

// x as m * 2**n, with m from sqrt(1/2) to sqrt(2); x a normal number above 0.
template <class A>
struct Split {
  vec<A> n, m;
};
template <class A>
INLINE Split<A> split(vec<A> x) {
  using I = lane_t<A>;
  constexpr int bits = sizeof(A) == 4 ? 23 : 52;
  vec<I> n = ((vec<I>)x - (vec<I>)splat(A(0.70710678118654752))) >> bits;
  return {__builtin_convertvector(n, vec<A>), (vec<A>)((vec<I>)x - (n << bits))};
}
template <class A>
INLINE vec<A> log_of_mantissa(vec<A> m) {  // |(m - 1) / (m + 1)| < 0.172: what is left out is under 5e-9, or 1e-18
  return atanh_twice<A>((m - splat(A(1))) / (m + splat(A(1))), sizeof(A) == 4 ? 4 : 10);
}

// s**gamma for 0 <= s <= 1 and gamma > 0; 0 below the smallest normal number. Relative error a few roundings of 1 + gamma |log2 s|.
template <class A>
INLINE vec<A> power(vec<A> s, A gamma) {
  constexpr A normal = sizeof(A) == 4 ? A(0x1p-126) : A(0x1p-1022);
  Split<A> of = split<A>(s);
  vec<A> log2_m = log_of_mantissa<A>(of.m) * splat(A(1.4426950408889634));
  vec<A> result = exp2(of.n * splat(gamma) + log2_m * splat(gamma));
  return s < splat(normal) ? vec<A>{} : result;
}

// log(1 + y) for any y >= 0, however small: the logarithm of the rounded 1 + y, and what the rounding took.
template <class A>
INLINE vec<A> log1p_of_any(vec<A> y) {
  vec<A> u = y + splat(A(1)), lost = y - (u - splat(A(1)));
  Split<A> of = split<A>(u);
  return of.n * splat(A(0.69314718055994531)) + (log_of_mantissa<A>(of.m) + lost / u);
}

INLINE f64 reciprocal(f64 x) { return splat(1.0) / x; }
INLINE f32 reciprocal(f32 x) {
#if LEVEL_BYTES == 64
  f32 r = (f32)_mm512_rcp14_ps((__m512)x);  // and a Newton step: a division takes twice as long
  return r + r * (splat(1.0f) - x * r);
#else
  return splat(1.0f) / x;
#endif
}

template <class A>
struct Sigmoid {
  vec<A> p, q;         // sigmoid(x), sigmoid(-x)
  vec<A> negative, e;  // -|x|, exp(-|x|): softplus(x) = max(x, 0) + log1p(e)
  vec<lane_t<A>> positive;
};
template <class A>
INLINE Sigmoid<A> sigmoid(vec<A> x) {
  Sigmoid<A> s;
  s.positive = x > vec<A>{};
  s.negative = (vec<A>)((vec<lane_t<A>>)x | (vec<lane_t<A>>)splat(A(-0.0)));
  s.e = exp_of_negative(s.negative);
  vec<A> large = reciprocal(s.e + splat(A(1))), small = s.e * large;
  s.p = s.positive ? large : small, s.q = s.positive ? small : large;
  return s;
}

// BCE, -pos_weight t log p - (1 - t) log q, is linear + of_log log1p(e); and its derivative by x.
template <class A, bool POS_WEIGHT>
INLINE void bce(const Sigmoid<A>& s, vec<A> t, vec<A> pos_weight, vec<A>& linear, vec<A>& of_log, vec<A>& derivative) {
  vec<A> u = splat(A(1)) - t, pt = POS_WEIGHT ? pos_weight * t : t;
  linear = -(s.negative * (s.positive ? u : pt)), of_log = POS_WEIGHT ? u + pt : splat(A(1));
  derivative = u * s.p - pt * s.q;
}

// Reading and writing blocks.

template <class T, class A>
INLINE void read_run(A* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 0)
    for (int64_t i = 0; i < n; i++) to[i] = A(widen(*from));
  else
    widen_row(to, from, stride, n);
}
#define READ_INTEGERS(T)                                                  \
  template <class A>                                                      \
  INLINE void read_run(A* to, const T* from, int64_t stride, int64_t n) { \
    if (stride == 1)                                                      \
      for (int64_t i = 0; i < n; i++) to[i] = A(from[i]);                 \
    else                                                                  \
      for (int64_t i = 0; i < n; i++) to[i] = A(from[i * stride]);        \
  }
READ_INTEGERS(uint8_t)
READ_INTEGERS(int32_t)
READ_INTEGERS(int64_t)
#undef READ_INTEGERS

// f(offset, i, n) for each run of elements first + i to first + i + n that lies in one row of the walk.
template <class F>
INLINE void each_run(const Walk& walk, const int64_t* stride, int64_t first, int64_t n, F f) {
  int last = walk.dims - 1;
  int64_t index[MAX_DIMS], row = first / walk.size[last], column = first % walk.size[last], offset = 0;
  for (int d = last - 1; d >= 0; d--) {
    index[d] = row % walk.size[d], row /= walk.size[d];
    offset += index[d] * stride[d];
  }
  for (int64_t i = 0;;) {
    int64_t left = walk.size[last] - column, run = left < n - i ? left : n - i;
    f(offset + column * stride[last], i, run);
    i += run, column = 0;
    if (i == n) return;
    for (int d = last - 1;; d--) {
      offset += stride[d];
      if (++index[d] < walk.size[d]) break;
      offset -= index[d] * stride[d], index[d] = 0;
    }
  }
}

template <class A>
constexpr Element element_of = sizeof(A) == 4 ? Element::f32 : Element::f64;

// Where n elements from `first` on lie one after the other as A and fill whole registers, so that they need no copy; else null.
template <class A>
INLINE A* in_place(const Walk& walk, const Operand& o, int64_t base, int64_t first, int64_t n) {
  int last = walk.dims - 1;
  if (o.type != element_of<A> || o.stride[last] != 1 || n % vector<A>::lanes) return nullptr;
  if (last == 0) return (A*)o.data + base + first;
  if (first % walk.size[last] + n > walk.size[last]) return nullptr;
  A* at = nullptr;
  each_run(walk, o.stride, first, n, [&](int64_t offset, int64_t, int64_t) { at = (A*)o.data + base + offset; });
  return at;
}

// n elements of an operand, widened into the buffer unless they can be read where they lie, and `rest` up to a whole register.
template <class A>
static const A* read_block(const Walk& walk, const Operand& o, int64_t base, int64_t first, int64_t n, A* buffer, A rest) {
  if (const A* at = in_place<A>(walk, o, base, first, n)) return at;
  store(buffer + n, splat(rest));
  const auto read = [&](auto type) {
    using T = decltype(type);
    each_run(walk, o.stride, first, n, [&](int64_t offset, int64_t i, int64_t run) {
      read_run(buffer + i, (const T*)o.data + base + offset, o.stride[walk.dims - 1], run);
    });
  };
  switch (o.type) {
    case Element::f16: read(half{}); break;
    case Element::bf16: read(bfloat16{}); break;
    case Element::f32: read(float{}); break;
    case Element::f64: read(double{}); break;
    case Element::u8: read(uint8_t{}); break;
    case Element::i32: read(int32_t{}); break;
    case Element::i64: read(int64_t{}); break;
  }
  return buffer;
}

template <class A>
static void write_block(const Walk& walk, const Operand& o, int64_t base, int64_t first, int64_t n, const A* buffer) {
  const auto write = [&](auto type) {
    using T = decltype(type);
    each_run(walk, o.stride, first, n, [&](int64_t offset, int64_t i, int64_t run) {
      narrow_row((T*)o.data + base + offset, o.stride[walk.dims - 1], buffer + i, run, A(1));
    });
  };
  if constexpr (sizeof(A) == 8)
    write(double{});
  else if (o.type == Element::f16)
    write(half{});
  else if (o.type == Element::bf16)
    write(bfloat16{});
  else
    write(float{});
}

template <class A>
struct Buffer {
  alignas(64) A at[BLOCK + vector<A>::lanes];
};

template <class A>
constexpr A padding = A(-2000);  // a logit whose p, and whose BCE with a target of 0, are exactly 0

template <class A>
INLINE vec<lane_t<A>> counts(const A* mask, int64_t i) {
  return mask ? load(mask + i) != vec<A>{} : ~vec<lane_t<A>>{};
}

// Whether one of n integers that count is not among 0 .. end - 1.
template <class A>
static bool out_of_range(const A* t, const A* mask, int64_t n, A end) {
  vec<lane_t<A>> bad = {};
  for (int64_t i = 0; i < n; i += vector<A>::lanes) {
    vec<A> v = load(t + i);
    bad |= ~((v >= vec<A>{}) & (v < splat(end))) & counts(mask, i);
  }
  return lanes_max((f32)((i32)bad & (i32)splat(1.0f))) > 0;
}

constexpr int64_t PART = 32;  // registers

// A sum over a block, in parts, so that no lane adds up many numbers in a row.
template <class A>
struct Sum {
  vec<A> all = {}, part = {};
  void add(vec<A> v) { part += v; }
  void next_part() { all += part, part = vec<A>{}; }
  double total() const { return lanes_sum(all + part); }
};

// The same of log1p(e) for e of 0 to 1, from one logarithm a part: the product of all 1 + e, less 1, which forgets no small e.
template <class A>
struct LogSum {
  vec<A> all = {}, product = {};
  void add(vec<A> e) { product = (product * e + product) + e; }
  void next_part() { all += log1p_of_any<A>(product), product = vec<A>{}; }
  double total() const { return lanes_sum(all); }
};

#include "segmentation_pointwise.h"
#include "segmentation_dice.h"

template <class A>
constexpr SegmentationKernels segmentation_kernels{count_task<A>,
                                                   {pointwise_task<A, 0>, pointwise_task<A, 1>, pointwise_task<A, 2>, pointwise_task<A, 3>},
                                                   dice_sums<A>,
                                                   dice_grad<A>,
                                                   sizeof(DiceBlock<A>)};

}  // namespace

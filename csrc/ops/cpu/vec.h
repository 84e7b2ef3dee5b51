// One level's vectors, in compiler vector extensions: included by levels.h inside the level's namespace, with LEVEL_BYTES, LEVEL_VECS
// and LEVEL_BF16_DOT defined. Everything here is static: no level sees another's.
// clang-format off
#define INLINE static inline __attribute__((always_inline))
// clang-format on

template <class C>
struct vector {
  static constexpr int lanes = LEVEL_BYTES / sizeof(C);
  typedef C type __attribute__((vector_size(LEVEL_BYTES)));
  typedef C loose __attribute__((vector_size(LEVEL_BYTES), aligned(1), may_alias));  // at any address
};
template <class C>
using vec = typename vector<C>::type;
using f32 = vec<float>;
using f64 = vec<double>;
using i32 = vec<int32_t>;
using i64 = vec<int64_t>;
using u32 = vec<uint32_t>;

template <class T>
using acc_t = typename accumulator<T>::type;

template <class C>
INLINE vec<C> load(const C* p) {
  return *(const typename vector<C>::loose*)p;
}
template <class C>
INLINE void store(C* p, vec<C> v) {
  *(typename vector<C>::loose*)p = v;
}
template <class C>
INLINE vec<C> splat(C x) {
  return x - vec<C>{};  // x - 0 is x for every x, -0 and NaN too: one broadcast
}

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Of lanes of which one is a NaN, min and max give the second. bits_above: a bit for each lane in which a > b.
#if LEVEL_BYTES == 64
INLINE f32 min(f32 a, f32 b) { return (f32)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE f64 min(f64 a, f64 b) { return (f64)_mm512_min_pd((__m512d)a, (__m512d)b); }
INLINE f32 max(f32 a, f32 b) { return (f32)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f64 max(f64 a, f64 b) { return (f64)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE uint32_t bits_above(f32 a, f32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
INLINE uint32_t bits_above(f64 a, f64 b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
#elif LEVEL_BYTES == 32
INLINE f32 min(f32 a, f32 b) { return (f32)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE f64 min(f64 a, f64 b) { return (f64)_mm256_min_pd((__m256d)a, (__m256d)b); }
INLINE f32 max(f32 a, f32 b) { return (f32)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE f64 max(f64 a, f64 b) { return (f64)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE uint32_t bits_above(f32 a, f32 b) { return uint32_t(_mm256_movemask_ps((__m256)(a > b))); }
INLINE uint32_t bits_above(f64 a, f64 b) { return uint32_t(_mm256_movemask_pd((__m256d)(a > b))); }
#else
INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }
INLINE f64 min(f64 a, f64 b) { return a < b ? a : b; }
INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
INLINE f64 max(f64 a, f64 b) { return a > b ? a : b; }
template <class V>
INLINE uint32_t bits_above(V a, V b) {
  const auto above = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < int(sizeof(V) / sizeof(a[0])); i++) bits |= uint32_t(above[i] & 1) << i;
  return bits;
}
#endif

template <class C>
struct lane {
  using type = int32_t;
};
template <>
struct lane<double> {
  using type = int64_t;
};
template <class C>
using lane_t = typename lane<C>::type;
template <class C>
INLINE vec<lane_t<C>> lane_numbers() {
  constexpr lane_t<C> n[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(n);
}

// Across the lanes: halves against halves, so in the same order at every call.
template <class C, class V>
INLINE C fold_sum(V v) {
  C x[vector<C>::lanes];
  store(x, v);
  for (int n = vector<C>::lanes / 2; n; n /= 2)
    for (int i = 0; i < n; i++) x[i] += x[i + n];
  return x[0];
}
template <class C, class V>
INLINE C fold_max(V v) {
  C x[vector<C>::lanes];
  store(x, v);
  for (int n = vector<C>::lanes / 2; n; n /= 2)
    for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
}
INLINE double lanes_sum(f64 v) { return fold_sum<double>(v); }
INLINE double lanes_max(f64 v) { return fold_max<double>(v); }
#if LEVEL_BYTES == 64
INLINE float lanes_sum(f32 v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float lanes_max(f32 v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float lanes_sum(f32 v) { return fold_sum<float>(v); }
INLINE float lanes_max(f32 v) { return fold_max<float>(v); }
#endif

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// 2**x, relative error under 1.5e-7; 0 for -inf, and NaN stays. A minimax polynomial of degree 6 (Remez, relative error 1.9e-9) on x - n,
// times 2**n: by vscalefps, or, for x <= 127 and exactly 0 below -126.5, through the magic number whose addition rounds x to n.
INLINE f32 exp2(f32 x) {
#if LEVEL_BYTES == 64
  f32 r = (f32)_mm512_reduce_ps((__m512)x, 0);  // x - n; 0 for infinities
#else
  const f32 magic = splat(12582912.0f);  // 1.5 * 2**23
  x = max(splat(-127.0f), x);            // in this order a NaN stays
  f32 t = x + magic, r = x - (t - magic);
#endif
  f32 p = splat(1.53458122e-4f);
  p = p * r + splat(1.33999312e-3f);
  p = p * r + splat(9.61848896e-3f);
  p = p * r + splat(5.55032878e-2f);
  p = p * r + splat(2.40226469e-1f);
  p = p * r + splat(6.93147206e-1f);
  p = p * r + splat(1.0f);
#if LEVEL_BYTES == 64
  return (f32)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
  return p * (f32)(((u32)t << 23) + 0x3f800000u);
#endif
}
INLINE f64 exp2(f64 x) {                        // the same in double: degree 12, relative error 4e-20 before rounding; 0 below -1022.5
  const f64 magic = splat(6755399441055744.0);  // 1.5 * 2**52
  x = max(splat(-1023.0), x);
  f64 t = x + magic, r = x - (t - magic);
  f64 p = splat(2.56234174200681033e-11);
  p = p * r + splat(4.45662775975349394e-10);
  p = p * r + splat(7.0549768671866159e-9);
  p = p * r + splat(1.01780515198054171e-7);
  p = p * r + splat(1.32154865844770647e-6);
  p = p * r + splat(1.52527338554772187e-5);
  p = p * r + splat(1.54035303936621421e-4);
  p = p * r + splat(1.33335581467912443e-3);
  p = p * r + splat(9.61812910762830819e-3);
  p = p * r + splat(5.5504108664821695e-2);
  p = p * r + splat(2.40226506959100716e-1);
  p = p * r + splat(6.93147180559945308e-1);
  p = p * r + splat(1.0);
  return p * (f64)(((vec<uint64_t>)t << 52) + 0x3ff0000000000000u);
}

#if LEVEL_BYTES == 64
// e**x for x of at most 10000, and exactly 0 below -200: a power of 2 in sixteenths, of which a register holds a table, times a short
// polynomial. EXACT: n ln 2 is taken from x in two steps, the first of which is exact, and the relative error is under 1.3e-7. Else in one,
// and it is up to 3e-9 |x| more.
template <bool EXACT>
INLINE f32 exp_by_table(f32 x) {
  constexpr float powers[] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                              1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  const f32 magic = splat(786432.0f);  // 1.5 * 2**19: its addition rounds to sixteenths, and leaves k in the lowest four bits
  x = max(splat(-200.0f), x);          // in this order a NaN stays
  f32 t = x * splat(1.44269504f) + magic, n = t - magic;
  f32 r = (f32)_mm512_fnmadd_ps((__m512)n, _mm512_set1_ps(0.693147182f), (__m512)x);  // one rounding, also where the compiler fuses nothing
  if (EXACT) r = r + n * splat(1.9046543e-9f);
  f32 power = (f32)_mm512_permutexvar_ps((__m512i)t, (__m512)load(powers));
  f32 p = r * splat(0.16666667f) + splat(0.5f);  // |r| < 0.0217: what is left out is under 1e-8
  p = p * r + splat(1.0f);
  p = p * r;
  return (f32)_mm512_scalef_ps((__m512)(power * p + power), (__m512)n);
}
#endif

// tanh, relative error of a few roundings: Lambert's continued fraction near 0, where 1 - 2 / (exp(2 x) + 1) would cancel.
template <class V>
INLINE V tanh(V x) {
  constexpr bool wide = sizeof(x[0]) == 8;
  V y = x * x, magnitude = x < 0 ? -x : x, numerator, denominator;
  if constexpr (wide) {
    numerator = (((y + 990.0) * y + 135135.0) * y + 4729725.0) * y + 34459425.0;
    denominator = (((y * 45.0 + 13860.0) * y + 945945.0) * y + 16216200.0) * y + 34459425.0;
  } else {
    numerator = ((y + 105.0f) * y) + 945.0f;
    denominator = (y * 15.0f + 420.0f) * y + 945.0f;
  }
  V top = V{} + 30, far = magnitude > top ? top : magnitude;  // 1 from there on
  far = 1 - 2 / (exp2(far * decltype(x[0] + x[0])(2 * LOG2E)) + 1);
  return magnitude < decltype(x[0] + x[0])(0.625) ? x * numerator / denominator : (x < 0 ? -far : far);
}

// The natural logarithm of x >= 1 or NaN (what a sum of exponentials is), within 1.5 roundings: the exponent, and Cephes' polynomial
// in r = x / 2**n - 1.
INLINE f32 log(f32 x) {
  i32 bits = (i32)x - 0x3f3504f3;  // of sqrt(1/2): r is -0.293 to 0.414
  f32 n = __builtin_convertvector(bits >> 23, f32), r = (f32)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, y = r * r;
  f32 p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  p = p * r * y - n * 2.12194440e-4f - y * 0.5f + r + n * 0.693359375f;
  return p + (x - x);  // NaN for inf and NaN
}
INLINE f64 log(f64 x) {
  f64 y;
  for (int i = 0; i < vector<double>::lanes; i++) y[i] = __builtin_log(x[i]);
  return y;
}
// log(1 + e) for 0 <= e <= 1, relative error under 2e-7 however small e is.
INLINE f32 log1p(f32 e) {
  f32 p = splat(-3.318467578e-3f);  // minimax (Remez) of log1p(e) / e with the first coefficient 1: relative error 5.2e-9
  p = p * e + splat(2.020456281e-2f);
  p = p * e + splat(-5.766440397e-2f);
  p = p * e + splat(1.068055168e-1f);
  p = p * e + splat(-1.535539427e-1f);
  p = p * e + splat(1.969539996e-1f);
  p = p * e + splat(-2.495858734e-1f);
  p = p * e + splat(3.333051132e-1f);
  p = p * e + splat(-4.999993276e-1f);
  p = p * e;
  return p * e + e;
}

template <class A>
INLINE vec<A> atanh_twice(vec<A> s, int terms) {  // 2 atanh(s) = 2 (s + s**3 / 3 + s**5 / 5 + ...)
  vec<A> square = s * s, p = splat(A(0));
  for (int k = terms; k >= 0; k--) p = p * square + splat(A(2) / A(2 * k + 1));
  return p * s;
}
INLINE f64 log1p(f64 e) { return atanh_twice<double>(e / (e + splat(2.0)), 16); }  // s <= 1/3: what is left out is under 4e-18
// To base 2, of normal x > 0, relative error under 5e-16: 2 atanh(t) log2(e) of t = (r - 1) / (r + 1), t**2 < 0.03, by its series. NaN for
// inf and NaN, anything for 0.
INLINE f64 log2(f64 x) {
  i64 bits = (i64)x - 0x3fe6a09e667f3bcd;  // of sqrt(1/2)
  f64 n = __builtin_convertvector(bits >> 52, f64), r = (f64)((bits & 0xfffffffffffff) + 0x3fe6a09e667f3bcd);
  f64 t = (r - 1.0) / (r + 1.0), y = t * t, p = splat(2 * LOG2E / 21);
  for (int i = 19; i > 0; i -= 2) p = p * y + 2 * LOG2E / i;
  return p * t + n + (x - x);
}

// Conversions of one element, without branches, so that loops over them become vector code. To 16 bits: nearest, ties to even.
template <class To, class From>
INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
INLINE float widen(half x) {  // no subnormal float on the way, which a thread may take for 0; and no branch, so that loops become vectors
  uint32_t u = uint32_t(x.bits & 0x7fff), tiny = u < 0x400 ? ~0u : 0, special = u >= 0x7c00 ? ~0u : 0;
  float f = bits_as<float>((u << 13) + 0x38000000u + (tiny & 0x800000u) + (special & 0x38000000u));  // tiny: 2**-14 too much
  return bits_as<float>(bits_as<uint32_t>(f - bits_as<float>(tiny & 0x38800000u)) | uint32_t(x.bits & 0x8000) << 16);
}
// A register of elements in their own order, widened.
typedef uint16_t u16 __attribute__((vector_size(LEVEL_BYTES / 2), aligned(2), may_alias));
INLINE f32 load_wide(const float* p) { return load(p); }
INLINE f64 load_wide(const double* p) { return load(p); }
INLINE f32 load_wide(const bfloat16* p) { return (f32)(__builtin_convertvector(*(const u16*)p, u32) << 16); }
INLINE f32 load_wide(const half* p) {
#if LEVEL_BYTES == 64
  return (f32)_mm512_cvtph_ps((__m256i) * (const u16*)p);
#elif LEVEL_BYTES == 32
  return (f32)_mm256_cvtph_ps((__m128i) * (const u16*)p);
#elif defined(__aarch64__)
  return (f32)vcvt_f32_f16((float16x4_t) * (const u16*)p);
#else  // as widen()
  u32 x = __builtin_convertvector(*(const u16*)p, u32), u = x & 0x7fff, tiny = (u32)(u < 0x400), special = (u32)(u >= 0x7c00);
  f32 f = (f32)((u << 13) + 0x38000000u + (tiny & 0x800000u) + (special & 0x38000000u)) - (f32)(tiny & 0x38800000u);
  return (f32)((u32)f | (x & 0x8000) << 16);
#endif
}
INLINE void narrow(float x, float& y) { y = x; }
INLINE void narrow(double x, double& y) { y = x; }
INLINE void narrow(float x, bfloat16& y) {
  uint32_t u = bits_as<uint32_t>(x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  y.bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t(rounded);
}
INLINE void narrow(float x, half& y) {
  uint32_t u = bits_as<uint32_t>(x), a = u & 0x7fffffff;
  uint32_t normal = (a + 0xfff + (a >> 13 & 1) - (112u << 23)) >> 13;
  uint32_t tiny = bits_as<uint32_t>(bits_as<float>(a) + 0.5f) - 0x3f000000;  // below 2**-14: the addition rounds to multiples of 2**-24
  uint32_t special = a > 0x7f800000 ? 0x7e00u : 0x7c00u;
  y.bits = uint16_t((a >= 0x47800000 ? special : a < 0x38800000 ? tiny : normal) | (u >> 16 & 0x8000));
}

// And back: a register, narrowed to what lies at the pointer.
INLINE f32 narrowed(f32 x, const float*) { return x; }
INLINE f64 narrowed(f64 x, const double*) { return x; }
INLINE u32 rounded_bf16(f32 x) {  // in the upper half
  u32 u = (u32)x;
  return x == x ? u + 0x7fff + (u >> 16 & 1) : u | 0x400000;
}
INLINE u16 narrowed(f32 x, const bfloat16*) {
#if LEVEL_BF16_DOT
  return (u16)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(rounded_bf16(x) >> 16, u16);
#endif
}
INLINE u16 narrowed(f32 x, const half*) {
#if LEVEL_BYTES == 64
  return (u16)_mm512_cvtps_ph((__m512)x, 0);
#elif LEVEL_BYTES == 32
  return (u16)_mm256_cvtps_ph((__m256)x, 0);
#elif defined(__aarch64__)
  return (u16)vcvt_f16_f32((float32x4_t)x);
#else  // as narrow()
  u32 u = (u32)x, a = u & 0x7fffffff, tiny = (u32)((f32)a + 0.5f) - 0x3f000000, normal = (a + 0xfff + (a >> 13 & 1) - (112u << 23)) >> 13;
  u32 special = a > 0x7f800000 ? u32{} + 0x7e00u : u32{} + 0x7c00u;
  return __builtin_convertvector((a >= 0x47800000 ? special : a < 0x38800000 ? tiny : normal) | (u >> 16 & 0x8000), u16);
#endif
}

template <class T, class A>
INLINE void widen_row(A* to, const T* from, int64_t stride, int64_t n) {
  constexpr int L = vector<A>::lanes;
  int64_t i = 0;
  if constexpr (std::is_same_v<acc_t<T>, A>)
    for (; stride == 1 && i + L <= n; i += L) store(to + i, load_wide(from + i));
  for (; i < n; i++) to[i] = widen(from[i * stride]);
}
template <class T, class A>
INLINE void narrow_row(T* to, int64_t stride, const A* from, int64_t n, A factor) {
  constexpr int L = vector<A>::lanes;
  int64_t i = 0;
  if constexpr (std::is_same_v<acc_t<T>, A>)
    for (; stride == 1 && i + L <= n; i += L) {
      auto x = narrowed(load(from + i) * factor, to);
      __builtin_memcpy(to + i, &x, sizeof x);
    }
  for (; i < n; i++) narrow(from[i] * factor, to[i * stride]);
}

// What the options do to a tile of scores: which keys a query sees, softcap, bias, mask, dropout. Rows are a query's, columns packed keys.

// fp32 probabilities cannot be rebuilt from an fp32 lse: at lse = 8 its rounding alone is four of theirs.
template <class T>
struct lse_of {
  using type = float;
};
template <>
struct lse_of<float> {
  using type = double;
};
template <>
struct lse_of<double> {
  using type = double;
};
template <class T>
using lse_t = typename lse_of<T>::type;

template <class T>
INLINE T* row_of(const View& x, int64_t b, int64_t h, int64_t row) {
  return (T*)x.data + b * x.b + h * x.h + row * x.row;
}

// Between positions of keys and packed keys.
INLINE int64_t position(const Sequence& s, int64_t packed) { return s.keys ? s.keys[packed] : packed; }
INLINE int64_t seen_before(const Sequence& s, int64_t position) { return s.keys ? s.count[position] : position; }

// Query i sees packed keys first_key() to last_key() - 1, as far as band and lengths tell.
INLINE int64_t first_key(const Attention& a, const Sequence& s, int64_t i) { return seen_before(s, max(0, min(i + s.off - a.left, s.N))); }
INLINE int64_t last_key(const Attention& a, const Sequence& s, int64_t i) {
  return seen_before(s, max(0, min(i + s.off + a.right + 1, s.N)));
}

// f(packed key relative to j0, pointer) for each element of a row of bias, mask or dbias that one of these keys has.
template <class T, class F>
INLINE void for_row(const View& x, const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t keys, F f) {
  T* row = row_of<T>(x, s.b, h, i);
  if (s.keys || x.d != 1)
    for (int64_t j = 0; j < keys; j++) f(j, row + position(s, j0 + j) * x.d);
  else
    for (int64_t j = 0; j < keys; j++) f(j, row + j0 + j);
}

// In log2 units. What is finite stays so, and with it a row that is hidden by nothing but the least of numbers.
template <class A>
INLINE void bias_row(const Attention& a, const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t keys, A* to) {
  constexpr A least = std::is_same_v<A, double> ? A(-0x1p1022) : A(-0x1p126);
  auto read = [&](int64_t j, const auto* from) {
    const A bias = A(widen(*from)), scaled = bias * A(LOG2E);
    to[j] = scaled < least && bias > -__builtin_inf() ? least : scaled > -least && bias < __builtin_inf() ? -least : scaled;
  };
  switch (a.bias_dtype) {
    case Dtype::f16: return for_row<const half>(a.bias, s, h, i, j0, keys, read);
    case Dtype::bf16: return for_row<const bfloat16>(a.bias, s, h, i, j0, keys, read);
    case Dtype::f32: return for_row<const float>(a.bias, s, h, i, j0, keys, read);
    case Dtype::f64: return for_row<const double>(a.bias, s, h, i, j0, keys, read);
  }
}

// A row of products q k, softcap and bias: scores in log2 units. by: what the products are multiplied by to become so; slopes: softcap's.
template <class A>
static void curve_row(const Attention& a, const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t keys, A by, A* row, A* slopes) {
  constexpr int L = vector<A>::lanes;
  if (a.softcap > 0) {
    A in = A(by / (LOG2E * a.softcap)), out = A(a.softcap * LOG2E);
    for (int64_t j = 0; j < keys; j += L) {
      const vec<A> capped = tanh<vec<A>>(load(row + j) * in);
      store(row + j, capped * out);
      if (slopes) store(slopes + j, 1 - capped * capped);
    }
    by = 1;
  }
  if (a.bias.data) {
    A bias[2 * PACKED_KEYS];  // of the longest step; what lies beyond its keys is not seen
    bias_row(a, s, h, i, j0, keys, bias);
    for (int64_t j = 0; j < keys; j += L) store(row + j, load(row + j) * by + load(bias + j));
  }
}

// Whether the mask shows any of these keys to any row of the block.
template <class B>
static bool some_seen(const Attention& a, const Sequence& s, const B& block, int64_t j0, int64_t keys) {
  for (int64_t r = 0; r < block.rows; r++) {
    int any = 0;
    for_row<const char>(a.mask, s, block.head(r), block.query(r), j0, keys, [&](int64_t, const char* seen) { any |= *seen; });
    if (any) return true;
    if (!a.mask.row && !block.fold) break;
  }
  return false;
}

INLINE void wide_product(u32 x, uint32_t by, u32& high, u32& low) {
#if LEVEL_BYTES == 64
  __m512i b = _mm512_set1_epi32(int(by)), even = _mm512_mul_epu32((__m512i)x, b),
          odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), b);
  high = (u32)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif LEVEL_BYTES == 32
  __m256i b = _mm256_set1_epi32(int(by)), even = _mm256_mul_epu32((__m256i)x, b),
          odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), b);
  high = (u32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int l = 0; l < vector<uint32_t>::lanes; l++) high[l] = uint32_t(uint64_t(x[l]) * by >> 32);
#endif
  low = x * by;
}

// Four times lanes multipliers of dropout, for keys position to ...: 0 or 1 / (1 - p). Word j % 4 of Philox 4x32-10 (Salmon et al. 2011)
// with key seed and counter (j / 4, i, number of the head, 0) is at least p 2**32 where key j is kept.
template <class A>
INLINE void drop_block(const Attention& a, int64_t number, int64_t i, int64_t position, A* to) {
  constexpr int L = vector<uint32_t>::lanes;
  u32 c[4] = {(u32)lane_numbers<float>() + uint32_t(position / 4), u32{} + uint32_t(i), u32{} + uint32_t(number), u32{}};
  uint32_t key[2] = {uint32_t(a.seed), uint32_t(a.seed >> 32)};
  for (int round = 0; round < 10; round++) {
    u32 high0, low0, high2, low2;
    wide_product(c[0], 0xD2511F53, high0, low0), wide_product(c[2], 0xCD9E8D57, high2, low2);
    c[0] = high2 ^ c[1] ^ key[0], c[1] = low2, c[2] = high0 ^ c[3] ^ key[1], c[3] = low0;
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  double scaled = __builtin_nearbyint(a.dropout_p * 4294967296.0);
  uint32_t threshold = scaled > 4294967295.0 ? 0xFFFFFFFF : uint32_t(scaled), words[4][L];
  A kept = A(1 / (1 - a.dropout_p));
  for (int w = 0; w < 4; w++) store(words[w], c[w]);
  for (int l = 0; l < L; l++)
    for (int w = 0; w < 4; w++) to[4 * l + w] = words[w][l] >= threshold ? kept : A(0);
}

// What dropout multiplies the probabilities of a row by; to has room for keys rounded up to 4 registers.
template <class A>
static void drop_row(const Attention& a, const Sequence& s, int64_t h, int64_t i, int64_t j0, int64_t keys, A* to) {
  constexpr int64_t AT_ONCE = 4 * vector<uint32_t>::lanes;
  int64_t number = (&s - a.sequences) * a.H + h;
  if (!s.keys) {
    for (int64_t j = 0; j < keys; j += AT_ONCE) drop_block(a, number, i, j0 + j, to + j);
    return;
  }
  A block[AT_ONCE];
  for (int64_t j = 0, start = -1; j < keys; j++) {
    int64_t at = position(s, j0 + j);
    if (at / AT_ONCE != start) start = at / AT_ONCE, drop_block(a, number, i, start * AT_ONCE, block);
    to[j] = block[at % AT_ONCE];
  }
  for (int64_t j = keys; j < round_up(keys, AT_ONCE); j++) to[j] = 0;
}

// What vec.h and the kernels may use: types and intrinsics, nothing that the linker could mix up between levels.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Around a namespace that is compiled for the features in a string.
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_LEVEL(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_LEVEL PRAGMA(clang attribute pop)
#else
#define BEGIN_LEVEL(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_LEVEL PRAGMA(GCC pop_options)
#endif

namespace minkernels {

enum class Dtype { f16, bf16, f32, f64 };  // the order of the tables of kernels
static constexpr int64_t bytes_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// Storage types; the arithmetic is float's, or double's for double.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};

template <int... E>
struct indices {};
template <int N, int... E>
struct make_indices : make_indices<N - 1, N - 1, E...> {};
template <int... E>
struct make_indices<0, E...> {
  using type = indices<E...>;
};

}  // namespace minkernels

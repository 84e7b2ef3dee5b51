// Includes KERNEL, a file name, once per instruction set, each time in a namespace of its own. LEVELS(f) lists f at every level,
// in the order of level(), which picks one at run time; WIDE_LEVELS(f) does for an f that bfloat16 does not pass through, which alone has
// a use for the last level. What neither names is not compiled. Another level is one block here and one entry in runtime.cpp.
//
// KERNEL must not include std or torch headers: their inline functions would be compiled for the level, and the linker might
// keep that copy for everybody. Pragmas and not flags, for the same reason.

#include "vec_includes.h"

#define LEVEL_BF16_DOT 0

#define LEVEL_BYTES 16  // a vector register
#if defined(__aarch64__)
#define LEVEL_VECS 4  // of a tile of the product: 6 rows x 4 registers, in 32 registers
#else
#define LEVEL_VECS 2  // 6 rows x 2 registers, in 16 registers
#endif
namespace minkernels::plain {
#include "vec.h"
#include KERNEL
}  // namespace minkernels::plain
#undef LEVEL_BYTES

#if defined(__x86_64__)
#define LEVELS(...) \
  {minkernels::plain::__VA_ARGS__, minkernels::avx2::__VA_ARGS__, minkernels::avx512::__VA_ARGS__, minkernels::avx512_bf16::__VA_ARGS__}
#define WIDE_LEVELS(...) \
  {minkernels::plain::__VA_ARGS__, minkernels::avx2::__VA_ARGS__, minkernels::avx512::__VA_ARGS__, minkernels::avx512::__VA_ARGS__}

BEGIN_LEVEL("avx2,fma,f16c")
#define LEVEL_BYTES 32
namespace minkernels::avx2 {
#include "vec.h"
#include KERNEL
}  // namespace minkernels::avx2
#undef LEVEL_BYTES
#undef LEVEL_VECS
END_LEVEL

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define LEVEL_BYTES 64
#define LEVEL_VECS 4  // 6 rows x 4 registers, in 32 registers
namespace minkernels::avx512 {
#include "vec.h"
#include KERNEL
}  // namespace minkernels::avx512
END_LEVEL

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#undef LEVEL_BF16_DOT
#define LEVEL_BF16_DOT 1
namespace minkernels::avx512_bf16 {
#include "vec.h"
#include KERNEL
}  // namespace minkernels::avx512_bf16
#undef LEVEL_BYTES
END_LEVEL

#else
#define LEVELS(...) {minkernels::plain::__VA_ARGS__}
#define WIDE_LEVELS LEVELS
#endif

#undef LEVEL_VECS
#undef LEVEL_BF16_DOT

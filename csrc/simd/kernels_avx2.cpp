// The AVX2 level; compiled with -mavx2 -mfma -mf16c.
#include "simd/levels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define ICECACHE_SIMD_WIDTH 8
// First the level's vectors, then what is written in terms of them.
#include "simd/body/vec_avx2.h"

#include "simd/body/table.h"

namespace icecache::simd {

const Kernels* avx2_table() {
  static constexpr Kernels kTable = make_table("avx2");
  return &kTable;
}

}  // namespace icecache::simd

#else

const icecache::simd::Kernels* icecache::simd::avx2_table() {
  return nullptr;
}

#endif

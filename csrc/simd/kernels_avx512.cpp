// The AVX-512 level; compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#include "simd/levels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#define ICECACHE_SIMD_WIDTH 16
// First the level's vectors, then what is written in terms of them.
#include "simd/body/vec_avx512.h"

#include "simd/body/table.h"

namespace icecache::simd {

const Kernels* avx512_table() {
  static constexpr Kernels kTable = make_table("avx512");
  return &kTable;
}

}  // namespace icecache::simd

#else

const icecache::simd::Kernels* icecache::simd::avx512_table() {
  return nullptr;
}

#endif

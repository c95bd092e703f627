// The AVX-512 level with VNNI, which multiplies codes and adds them up in one instruction; compiled
// with -mavx512vnni beside the flags of kernels_avx512.cpp.
#include "simd/levels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)

#define ICECACHE_SIMD_WIDTH 16
// First the level's vectors, then what is written in terms of them.
#include "simd/body/vec_avx512.h"

#include "simd/body/table.h"

namespace icecache::simd {

const Kernels* avx512vnni_table() {
  static constexpr Kernels kTable = make_table("avx512vnni");
  return &kTable;
}

}  // namespace icecache::simd

#else

const icecache::simd::Kernels* icecache::simd::avx512vnni_table() {
  return nullptr;
}

#endif

// The baseline level: runs on every CPU of the target.
#define ICECACHE_SIMD_WIDTH 4

// First the level's vectors, then what is written in terms of them.
#include "simd/body/vec_scalar.h"

#include "simd/body/table.h"
#include "simd/levels.h"

namespace icecache::simd {

const Kernels* scalar_table() {
  static constexpr Kernels kTable = make_table("scalar");
  return &kTable;
}

}  // namespace icecache::simd

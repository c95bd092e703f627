// The tables of the levels in this build, whether or not this CPU can run them. Only dispatch.cpp
// may call these; a table is data, so that asking for it runs no instruction of its level.
#pragma once

#include "simd/kernels.h"

namespace icecache::simd {

const Kernels* scalar_table();
const Kernels* avx2_table();        // nullptr where the compiler lacks AVX2, FMA or F16C
const Kernels* avx512_table();      // nullptr where the compiler lacks AVX-512 F, BW, DQ or VL
const Kernels* avx512vnni_table();  // the same and VNNI

}  // namespace icecache::simd

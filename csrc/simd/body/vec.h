// Vectors of one ISA level: types, loads, stores. Portable: GCC vector extensions of the width that
// the including file names in ICECACHE_SIMD_WIDTH (floats per vector). What differs between ISAs is
// in vec_scalar.h, vec_avx2.h and vec_avx512.h, one of which follows this file.
//
// Everything under simd/body/ lives in an unnamed namespace and calls no inline function or
// template of the standard library: such a function compiled here with AVX flags could be the copy
// that the linker keeps for the whole program, and would then fault on a CPU without AVX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/kernels.h"
#include "simd/prefetch.h"

#define ICECACHE_INLINE inline __attribute__((always_inline))

namespace icecache::simd {
namespace {

constexpr int kWidth = ICECACHE_SIMD_WIDTH;

typedef float VecF __attribute__((vector_size(4 * ICECACHE_SIMD_WIDTH)));
typedef std::int32_t VecI __attribute__((vector_size(4 * ICECACHE_SIMD_WIDTH)));
typedef std::uint32_t VecU __attribute__((vector_size(4 * ICECACHE_SIMD_WIDTH)));
typedef std::uint16_t VecH __attribute__((vector_size(4 * ICECACHE_SIMD_WIDTH)));  // 2 W halves
typedef std::int16_t VecS __attribute__((vector_size(4 * ICECACHE_SIMD_WIDTH)));
typedef float Vec4F __attribute__((vector_size(16)));
typedef std::int16_t Vec8S __attribute__((vector_size(16)));
typedef std::int16_t Vec16S __attribute__((vector_size(32)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLargestFloat = __FLT_MAX__;

ICECACHE_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

ICECACHE_INLINE void store(float* p, VecF v) {
  __builtin_memcpy(p, &v, sizeof v);
}

ICECACHE_INLINE VecU load_u32(const void* p) {
  VecU v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

ICECACHE_INLINE Vec4F load4(const float* p) {
  Vec4F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

ICECACHE_INLINE void store4(float* p, Vec4F v) {
  __builtin_memcpy(p, &v, sizeof v);
}

ICECACHE_INLINE Vec8S load8(const std::int16_t* p) {
  Vec8S v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// For vectors that not every level can return from a function.
template <typename Vector>
ICECACHE_INLINE void load_bytes(Vector* v, const void* p) {
  __builtin_memcpy(v, p, sizeof *v);
}

template <typename Vector>
ICECACHE_INLINE void store_bytes(void* p, const Vector* v) {
  __builtin_memcpy(p, v, sizeof *v);
}

ICECACHE_INLINE VecF max(VecF a, VecF b) {
  return a > b ? a : b;
}

template <typename T>
constexpr ICECACHE_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

ICECACHE_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

ICECACHE_INLINE float float_of(std::uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// Transposes the 4x4 block whose rows are `rows`, in place.
ICECACHE_INLINE void transpose4(Vec4F rows[4]) {
  const Vec4F a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Vec4F b = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Vec4F c = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Vec4F d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

}  // namespace
}  // namespace icecache::simd

// The AVX2 level (with FMA and F16C): vectors of eight.
#pragma once

#include <immintrin.h>

#include "simd/body/half.h"
#include "simd/body/vec.h"

namespace icecache::simd {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
constexpr int kDotRows = 3;
constexpr int kScanQueries = 4;
constexpr int kScanVectors = 2;

ICECACHE_INLINE VecF splat(float x) {
  return _mm256_set1_ps(x);
}

// Lanes below n.
ICECACHE_INLINE __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

ICECACHE_INLINE VecF load_part(const float* p, int n) {
  return _mm256_maskload_ps(p, lanes_below(n));
}

ICECACHE_INLINE void store_part(float* p, VecF v, int n) {
  _mm256_maskstore_ps(p, lanes_below(n), v);
}

ICECACHE_INLINE __m128i load_halves(const std::uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

ICECACHE_INLINE VecF load_bf16(const std::uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}

ICECACHE_INLINE VecF load_f16(const std::uint16_t* p) {
  return _mm256_cvtph_ps(load_halves(p));
}

ICECACHE_INLINE VecF load_bf16_part(const std::uint16_t* p, int n) {
  std::uint16_t padded[8] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_bf16(padded);
}

ICECACHE_INLINE VecF load_f16_part(const std::uint16_t* p, int n) {
  std::uint16_t padded[8] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_f16(padded);
}

ICECACHE_INLINE void store_bf16(std::uint16_t* p, VecF v) {
  const VecU u = reinterpret_cast<VecU>(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = (u >> 16) | 0x40u;
  const __m256i bits = reinterpret_cast<__m256i>(v == v ? rounded : quiet);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

ICECACHE_INLINE void store_f16(std::uint16_t* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

ICECACHE_INLINE float reduce_add(VecF v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

ICECACHE_INLINE float reduce_max(VecF v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

ICECACHE_INLINE Vec4F reduce4(VecF a, VecF b, VecF c, VecF d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

ICECACHE_INLINE bool any(VecI mask) {
  const __m256i m = reinterpret_cast<__m256i>(mask);
  return _mm256_testz_si256(m, m) == 0;
}

// See vec_scalar.h. One byte shuffle widens byte j of every slot.
struct Codes {
  VecU bits;
  ICECACHE_INLINE explicit Codes(VecU x) : bits(x) {}
  ICECACHE_INLINE VecF nibble(int j) const {
    const VecU nibbles = (j < 4 ? bits : bits >> 4) & 0x0f0f0f0fu;
    return Codes(nibbles).byte(j & 3);
  }
  ICECACHE_INLINE VecF byte(int j) const {
    // In each 32-bit lane: byte j at the bottom, zeros above (a set top bit asks for zero).
    const __m256i pick =
        _mm256_add_epi8(_mm256_setr_epi8(0, -128, -128, -128, 4, -128, -128, -128, 8, -128, -128,
                                         -128, 12, -128, -128, -128, 0, -128, -128, -128, 4, -128,
                                         -128, -128, 8, -128, -128, -128, 12, -128, -128, -128),
                        _mm256_set1_epi32(j));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(bits), pick));
  }
};

}  // namespace
}  // namespace icecache::simd

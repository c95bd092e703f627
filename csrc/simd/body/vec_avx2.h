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

ICECACHE_INLINE VecF load_i8(const std::int8_t* p) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

ICECACHE_INLINE VecF load_i8_part(const std::int8_t* p, int n) {
  std::int8_t padded[8] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_i8(padded);
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

ICECACHE_INLINE VecF add_lanes4(VecF a, VecF b, VecF c, VecF d) {
  return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
}

ICECACHE_INLINE Vec4F reduce4(VecF a, VecF b, VecF c, VecF d) {
  const __m256 sums = add_lanes4(a, b, c, d);
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

ICECACHE_INLINE bool any(VecI mask) {
  const __m256i m = reinterpret_cast<__m256i>(mask);
  return _mm256_testz_si256(m, m) == 0;
}

// See vec_scalar.h. The partial sums are pairs of 16 bits: 8 x 2 x 15 x 127 < 2^15.
constexpr int kDot4Adds = 8;

ICECACHE_INLINE VecI dot4_add(VecI acc, VecU codes, VecU query) {
  const __m256i products =
      _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(query));
  __m256i sum = _mm256_add_epi16(reinterpret_cast<__m256i>(acc), products);
  // One sum after the other: GCC would keep every product and add them as a tree, on the stack.
  __asm__("" : "+x"(sum));
  return reinterpret_cast<VecI>(sum);
}

ICECACHE_INLINE VecI dot4_sum(VecI acc) {
  return reinterpret_cast<VecI>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(acc), _mm256_set1_epi16(1)));
}

ICECACHE_INLINE void store_i16(std::int16_t* p, VecI a, VecI b) {
  const __m256i packed =
      _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

}  // namespace
}  // namespace icecache::simd

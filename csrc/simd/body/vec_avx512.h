// The AVX-512 level (F, BW, DQ, VL): vectors of sixteen.
#pragma once

// GCC 12's own intrinsics read a variable that they leave undefined on purpose (GCC bug 105593),
// and are reported where they are inlined. The same kernels keep these warnings at the other
// levels.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "simd/body/half.h"
#include "simd/body/vec.h"

namespace icecache::simd {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
constexpr int kDotRows = 4;
constexpr int kScanQueries = 4;

ICECACHE_INLINE VecF splat(float x) {
  return _mm512_set1_ps(x);
}

ICECACHE_INLINE __mmask16 lanes_below(int n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}

ICECACHE_INLINE VecF load_part(const float* p, int n) {
  return _mm512_maskz_loadu_ps(lanes_below(n), p);
}

ICECACHE_INLINE void store_part(float* p, VecF v, int n) {
  _mm512_mask_storeu_ps(p, lanes_below(n), v);
}

ICECACHE_INLINE VecF widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

ICECACHE_INLINE VecF load_bf16(const std::uint16_t* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

ICECACHE_INLINE VecF load_f16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

ICECACHE_INLINE VecF load_bf16_part(const std::uint16_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}

ICECACHE_INLINE VecF load_f16_part(const std::uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}

ICECACHE_INLINE VecF widen_i8(__m128i codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}

ICECACHE_INLINE VecF load_i8(const std::int8_t* p) {
  return widen_i8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

ICECACHE_INLINE VecF load_i8_part(const std::int8_t* p, int n) {
  return widen_i8(_mm_maskz_loadu_epi8(lanes_below(n), p));
}

ICECACHE_INLINE void store_bf16(std::uint16_t* p, VecF v) {
  const VecU u = reinterpret_cast<VecU>(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = (u >> 16) | 0x40u;
  const __m512i bits = reinterpret_cast<__m512i>(v == v ? rounded : quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}

ICECACHE_INLINE void store_f16(std::uint16_t* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

ICECACHE_INLINE float reduce_add(VecF v) {
  return _mm512_reduce_add_ps(v);
}

ICECACHE_INLINE float reduce_max(VecF v) {
  return _mm512_reduce_max_ps(v);
}

ICECACHE_INLINE VecF add_lanes4(VecF a, VecF b, VecF c, VecF d) {
  const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
  const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
  return _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) +
         _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
}

ICECACHE_INLINE Vec4F reduce4(VecF a, VecF b, VecF c, VecF d) {
  const __m512 lanes = add_lanes4(a, b, c, d);
  const __m256 half = _mm512_castps512_ps256(lanes) + _mm512_extractf32x8_ps(lanes, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

ICECACHE_INLINE bool any(VecI mask) {
  const __m512i m = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi32_mask(m, m) != 0;
}

// See vec_scalar.h. Without VNNI the partial sums are pairs of 16 bits: 8 x 2 x 15 x 127 < 2^15.
constexpr int kDot4Adds = 8;

ICECACHE_INLINE VecI dot4_add(VecI acc, VecU codes, VecU query) {
  const __m512i weights = reinterpret_cast<__m512i>(query);
#ifdef __AVX512VNNI__
  return reinterpret_cast<VecI>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc),
                                                    reinterpret_cast<__m512i>(codes), weights));
#else
  const __m512i products = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(codes), weights);
  __m512i sum = _mm512_add_epi16(reinterpret_cast<__m512i>(acc), products);
  __asm__("" : "+v"(sum));  // as in vec_avx2.h
  return reinterpret_cast<VecI>(sum);
#endif
}

ICECACHE_INLINE VecI dot4_sum(VecI acc) {
#ifdef __AVX512VNNI__
  return acc;
#else
  return reinterpret_cast<VecI>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(acc), _mm512_set1_epi16(1)));
#endif
}

ICECACHE_INLINE void store_i16(std::int16_t* p, VecI a, VecI b) {
  const __m512i packed =
      _mm512_packs_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi64(order, packed));
}

}  // namespace
}  // namespace icecache::simd

// The baseline level: vectors of four that the compiler lowers to what every CPU of the target has
// (SSE2, NEON, or single instructions). No intrinsics.
#pragma once

#include "simd/body/half.h"
#include "simd/body/vec.h"

namespace icecache::simd {
namespace {

typedef std::uint16_t Vec4H __attribute__((vector_size(8)));

constexpr int kTileRows = 4;  // rows x vectors of accumulators in tile.h
constexpr int kTileVectors = 2;
constexpr int kDotRows = 2;      // rows x 4 accumulators in dot_tile
constexpr int kScanQueries = 2;  // queries per pass of sketch_scan

ICECACHE_INLINE VecF splat(float x) {
  return VecF{x, x, x, x};
}

ICECACHE_INLINE VecF load_part(const float* p, int n) {
  VecF v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

ICECACHE_INLINE void store_part(float* p, VecF v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

ICECACHE_INLINE VecU load_u16(const std::uint16_t* p) {
  Vec4H h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, VecU);
}

ICECACHE_INLINE VecF load_bf16(const std::uint16_t* p) {
  return reinterpret_cast<VecF>(load_u16(p) << 16);
}

ICECACHE_INLINE VecF load_f16(const std::uint16_t* p) {
  const VecU h = load_u16(p);
  const VecU exponent = h & 0x7c00u;
  const VecU mantissa = h & 0x3ffu;
  const VecF tiny = __builtin_convertvector(reinterpret_cast<VecI>(mantissa), VecF) * 0x1p-24f;
  VecU magnitude = ((h & 0x7fffu) << 13) + (112u << 23);
  const VecU special =
      ((h & 0x7fffu) << 13) | 0x7f800000u | (mantissa != 0u ? VecU{} + 0x400000u : VecU{});
  magnitude = exponent == 0x7c00u ? special : magnitude;
  magnitude = exponent == 0u ? reinterpret_cast<VecU>(tiny) : magnitude;
  return reinterpret_cast<VecF>(magnitude | ((h & 0x8000u) << 16));
}

ICECACHE_INLINE VecF load_bf16_part(const std::uint16_t* p, int n) {
  VecF v = {};
  for (int i = 0; i < n; ++i) v[i] = bf16_to_float(p[i]);
  return v;
}

ICECACHE_INLINE VecF load_f16_part(const std::uint16_t* p, int n) {
  VecF v = {};
  for (int i = 0; i < n; ++i) v[i] = f16_to_float(p[i]);
  return v;
}

ICECACHE_INLINE VecF load_i8(const std::int8_t* p) {
  typedef std::int8_t Vec4C __attribute__((vector_size(4)));
  Vec4C c;
  __builtin_memcpy(&c, p, sizeof c);
  return __builtin_convertvector(c, VecF);
}

ICECACHE_INLINE VecF load_i8_part(const std::int8_t* p, int n) {
  VecF v = {};
  for (int i = 0; i < n; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

ICECACHE_INLINE void store_bf16(std::uint16_t* p, VecF v) {
  const VecU u = reinterpret_cast<VecU>(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = (u >> 16) | 0x40u;
  const VecU bits = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  const Vec4H h = __builtin_convertvector(bits, Vec4H);
  __builtin_memcpy(p, &h, sizeof h);
}

ICECACHE_INLINE void store_f16(std::uint16_t* p, VecF v) {
  for (int i = 0; i < kWidth; ++i) p[i] = float_to_f16(v[i]);
}

ICECACHE_INLINE float reduce_add(VecF v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

ICECACHE_INLINE float reduce_max(VecF v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// For each four floats of the vectors, the four sums, in order.
ICECACHE_INLINE VecF add_lanes4(VecF a, VecF b, VecF c, VecF d) {
  Vec4F rows[4] = {a, b, c, d};
  transpose4(rows);
  return (rows[0] + rows[2]) + (rows[1] + rows[3]);
}

// The four sums, in order.
ICECACHE_INLINE Vec4F reduce4(VecF a, VecF b, VecF c, VecF d) {
  return add_lanes4(a, b, c, d);
}

ICECACHE_INLINE bool any(VecI mask) {
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}

// Dot products of four codes (0..15) with four signed query bytes in each 32-bit lane: dot4_add()
// adds one to a partial sum, at most kDot4Adds of them; dot4_sum() makes lanes of it.
constexpr int kDot4Adds = 8;

ICECACHE_INLINE VecI dot4_add(VecI acc, VecU codes, VecU query) {
  for (int j = 0; j < 4; ++j) {
    const VecI weight = reinterpret_cast<VecI>(query << (24 - 8 * j)) >> 24;
    acc += reinterpret_cast<VecI>((codes >> (8 * j)) & 255u) * weight;
  }
  return acc;
}

ICECACHE_INLINE VecI dot4_sum(VecI acc) {
  return acc;
}

// 2 W lanes, which fit 16 bits, in order.
ICECACHE_INLINE void store_i16(std::int16_t* p, VecI a, VecI b) {
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<std::int16_t>(a[i]);
  for (int i = 0; i < kWidth; ++i) p[kWidth + i] = static_cast<std::int16_t>(b[i]);
}

}  // namespace
}  // namespace icecache::simd

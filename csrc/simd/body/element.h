// Element types of keys and values as loaders, and conversion of whole arrays.
#pragma once

#include "simd/body/half.h"
#include "simd/body/vec.h"

namespace icecache::simd {
namespace {

// load: W elements as floats; load_part: the first n < W, zeros behind, nothing read past them.
struct F32 {
  typedef float Element;
  static ICECACHE_INLINE VecF load(const float* p) { return simd::load(p); }
  static ICECACHE_INLINE VecF load_part(const float* p, int n) { return simd::load_part(p, n); }
  static ICECACHE_INLINE float one(float x) { return x; }
};

struct BF16 {
  typedef std::uint16_t Element;
  static ICECACHE_INLINE VecF load(const Element* p) { return load_bf16(p); }
  static ICECACHE_INLINE VecF load_part(const Element* p, int n) { return load_bf16_part(p, n); }
  static ICECACHE_INLINE float one(Element x) { return bf16_to_float(x); }
};

struct F16 {
  typedef std::uint16_t Element;
  static ICECACHE_INLINE VecF load(const Element* p) { return load_f16(p); }
  static ICECACHE_INLINE VecF load_part(const Element* p, int n) { return load_f16_part(p, n); }
  static ICECACHE_INLINE float one(Element x) { return f16_to_float(x); }
};

// body(F32{}), body(BF16{}) or body(F16{}).
template <typename Body>
ICECACHE_INLINE void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(F32{});
    case DType::kBFloat16:
      return body(BF16{});
    case DType::kFloat16:
      return body(F16{});
  }
}

template <typename E>
ICECACHE_INLINE void convert_row(const typename E::Element* src, float* dst, std::size_t n) {
  std::size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(dst + i, E::load(src + i));
  for (; i < n; ++i) dst[i] = E::one(src[i]);
}

void to_float(const void* src, DType dtype, float* dst, std::size_t n) {
  with_element(dtype, [&](auto e) {
    using E = decltype(e);
    convert_row<E>(static_cast<const typename E::Element*>(src), dst, n);
  });
}

void from_float(const float* src, void* dst, DType dtype, std::size_t n) {
  if (dtype == DType::kFloat32) {
    if (n > 0) __builtin_memcpy(dst, src, n * sizeof(float));
    return;
  }
  std::uint16_t* out = static_cast<std::uint16_t*>(dst);
  std::size_t i = 0;
  if (dtype == DType::kBFloat16) {
    for (; i + kWidth <= n; i += kWidth) store_bf16(out + i, load(src + i));
    for (; i < n; ++i) out[i] = float_to_bf16(src[i]);
  } else {
    for (; i + kWidth <= n; i += kWidth) store_f16(out + i, load(src + i));
    for (; i < n; ++i) out[i] = float_to_f16(src[i]);
  }
}

// True if a 32-bit word, or one of its two 16-bit halves, has every bit of `exponent` set.
template <bool kHalves>
ICECACHE_INLINE VecU saturated(VecU bits, std::uint32_t exponent) {
  if (!kHalves) return reinterpret_cast<VecU>((bits & exponent) == exponent);
  const std::uint32_t low = exponent & 0xffffu;
  const std::uint32_t high = exponent & 0xffff0000u;
  return reinterpret_cast<VecU>((bits & low) == low) |
         reinterpret_cast<VecU>((bits & high) == high);
}

template <bool kHalves>
bool all_below(const void* src, std::uint32_t exponent, std::size_t bytes) {
  constexpr std::size_t kStep = sizeof(VecU);
  constexpr std::size_t kBlock = 64 * kStep;  // early exit once per block
  const unsigned char* p = static_cast<const unsigned char*>(src);
  std::size_t i = 0;
  while (i + kStep <= bytes) {
    const std::size_t end = smaller(i + kBlock, bytes - bytes % kStep);
    VecU found = {};
    for (; i < end; i += kStep) found |= saturated<kHalves>(load_u32(p + i), exponent);
    if (any(reinterpret_cast<VecI>(found))) return false;
  }
  // The rest, padded with zeros: no zero byte makes an exponent saturate.
  unsigned char padded[kStep] = {};
  for (std::size_t j = i; j < bytes; ++j) padded[j - i] = p[j];
  return !any(reinterpret_cast<VecI>(saturated<kHalves>(load_u32(padded), exponent)));
}

bool all_finite(const void* src, DType dtype, std::size_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return all_below<false>(src, 0x7f800000u, 4 * n);
    case DType::kBFloat16:
      return all_below<true>(src, 0x7f807f80u, 2 * n);
    case DType::kFloat16:
      return all_below<true>(src, 0x7c007c00u, 2 * n);
  }
  return true;
}

}  // namespace
}  // namespace icecache::simd

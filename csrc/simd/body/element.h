// Element types of keys and values as loaders, and conversion of whole arrays.
#pragma once

#include "simd/body/half.h"
#include "simd/body/vec.h"

namespace icecache::simd {
namespace {

// load: W elements as floats; load_part: the first n < W, zeros behind, nothing read past them.
// kScaled: a row's elements are to be multiplied by the float behind them (scale_of).
struct F32 {
  static constexpr bool kScaled = false;
  typedef float Element;
  static ICECACHE_INLINE VecF load(const float* p) { return simd::load(p); }
  static ICECACHE_INLINE VecF load_part(const float* p, int n) { return simd::load_part(p, n); }
  static ICECACHE_INLINE float one(float x) { return x; }
};

struct BF16 {
  static constexpr bool kScaled = false;
  typedef std::uint16_t Element;
  static ICECACHE_INLINE VecF load(const Element* p) { return load_bf16(p); }
  static ICECACHE_INLINE VecF load_part(const Element* p, int n) { return load_bf16_part(p, n); }
  static ICECACHE_INLINE float one(Element x) { return bf16_to_float(x); }
};

struct F16 {
  static constexpr bool kScaled = false;
  typedef std::uint16_t Element;
  static ICECACHE_INLINE VecF load(const Element* p) { return load_f16(p); }
  static ICECACHE_INLINE VecF load_part(const Element* p, int n) { return load_f16_part(p, n); }
  static ICECACHE_INLINE float one(Element x) { return f16_to_float(x); }
};

struct I8 {
  static constexpr bool kScaled = true;
  typedef std::int8_t Element;
  static ICECACHE_INLINE VecF load(const Element* p) { return load_i8(p); }
  static ICECACHE_INLINE VecF load_part(const Element* p, int n) { return load_i8_part(p, n); }
  static ICECACHE_INLINE float one(Element x) { return static_cast<float>(x); }
};

ICECACHE_INLINE float scale_of(const void* row, int dim) {
  float scale;
  __builtin_memcpy(&scale, static_cast<const char*>(row) + dim, sizeof scale);
  return scale;
}

template <typename E>
constexpr ICECACHE_INLINE std::size_t bytes_of_row(int dim) {
  return static_cast<std::size_t>(dim) * sizeof(typename E::Element) +
         (E::kScaled ? sizeof(float) : 0);
}

// body(F32{}), body(BF16{}), body(F16{}) or body(I8{}).
template <typename Body>
ICECACHE_INLINE void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(F32{});
    case DType::kBFloat16:
      return body(BF16{});
    case DType::kFloat16:
      return body(F16{});
    case DType::kInt8:
      return body(I8{});
  }
}

template <typename E>
ICECACHE_INLINE void convert_row(const typename E::Element* src, float* dst, std::size_t n) {
  const float scale = E::kScaled ? scale_of(src, static_cast<int>(n)) : 1.0f;
  std::size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(dst + i, E::kScaled ? E::load(src + i) * scale : E::load(src + i));
  }
  for (; i < n; ++i) dst[i] = E::kScaled ? E::one(src[i]) * scale : E::one(src[i]);
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

// The largest of the words of `bytes` bytes, or of their 16-bit halves, without the sign bit: as
// magnitudes are ordered, NaN above all.
template <typename Vector, typename Word>
Word largest_word(const void* src, Word magnitude, std::size_t bytes) {
  constexpr std::size_t kStep = sizeof(Vector);
  const unsigned char* p = static_cast<const unsigned char*>(src);
  Vector found = {}, words;
  std::size_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    load_bytes(&words, p + i);
    words &= magnitude;
    found = words > found ? words : found;
  }
  unsigned char padded[kStep] = {};
  for (std::size_t j = i; j < bytes; ++j) padded[j - i] = p[j];
  load_bytes(&words, padded);
  words &= magnitude;
  found = words > found ? words : found;
  Word lanes[kStep / sizeof(Word)], best = 0;
  store_bytes(lanes, &found);
  for (const Word lane : lanes) best = lane > best ? lane : best;
  return best;
}

float largest(const void* src, DType dtype, std::size_t n) {
  float found = 0.0f;
  if (dtype == DType::kFloat32) {
    found = float_of(
        static_cast<std::uint32_t>(largest_word<VecI, std::int32_t>(src, 0x7fffffff, 4 * n)));
  } else {
    const auto bits =
        static_cast<std::uint16_t>(largest_word<VecS, std::int16_t>(src, 0x7fff, 2 * n));
    found = dtype == DType::kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
  }
  return found <= kLargestFloat ? found : kInfinity;
}

bool all_finite(const void* src, DType dtype, std::size_t n) {
  return largest(src, dtype, n) <= kLargestFloat;
}

}  // namespace
}  // namespace icecache::simd

// Numbers that leave no room for products: how far they are from one, in powers of two, which
// multiply without rounding.
#pragma once

#include <cmath>
#include <cstdint>

#include "icecache/types.h"
#include "simd/kernels.h"
#include "simd/row_format.h"

namespace icecache {

// Up to this far from 1 numbers are left as they are: products of three, thousands of them added
// up, are normal floats.
constexpr int kOrdinaryExponent = 40;
// What coordinates are clamped to, so that thousands of their squares add up.
constexpr float kFarthest = 0x1p50f;

// The exponent e such that numbers of magnitude `largest` times 2^-e are near 1; 0 for those that
// need no scaling. REQUIRES: largest is finite.
inline int far_exponent(double largest, int ordinary = kOrdinaryExponent) {
  if (!(largest > 0.0)) return 0;
  const int exponent = std::ilogb(largest);
  return exponent > ordinary || exponent < -ordinary ? exponent : 0;
}

inline float largest_of(const float* x, std::int64_t n) {
  return simd::kernels().largest(x, DType::kFloat32, static_cast<std::size_t>(n));
}

// x[i] *= 2^exponent
inline void scale_by(float* x, std::int64_t n, int exponent) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = std::ldexp(x[i], exponent);
}

}  // namespace icecache

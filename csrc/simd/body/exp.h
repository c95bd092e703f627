// exp of a vector, relative error below 2e-7 where the result is a normal number.
//
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2. The polynomial 1 + r + r^2 Q(r),
// Q of degree 4, was fitted for the least relative error on that interval (3e-9). 2^n is added to
// the exponent field as an integer, which is exact over the whole range of normal numbers. Below
// ln(FLT_MIN) the result is 0, above ln(FLT_MAX) +inf; NaN stays NaN.
#pragma once

#include "simd/body/vec.h"

namespace icecache::simd {
namespace {

ICECACHE_INLINE VecF exp(VecF x) {
  constexpr float kLowest = -87.336540f;
  constexpr float kHighest = 88.722839f;
  constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: adding it rounds to an integer
  VecF y = x < kLowest ? splat(kLowest) : x;
  y = y > kHighest ? splat(kHighest) : y;
  const VecF shifted = y * 1.44269504088896341f + kRound;
  const VecF n = shifted - kRound;
  VecF r = y - n * 0.693359375f;  // ln 2 in two parts: the first product is exact
  r = r - n * -2.12194440e-4f;
  VecF p = splat(0x1.6a23cep-10f);
  p = p * r + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const VecU exponent = (reinterpret_cast<VecU>(shifted) - 0x4b400000u) << 23;
  const VecF result = reinterpret_cast<VecF>(reinterpret_cast<VecU>(p) + exponent);
  const VecF bounded = x < kLowest ? VecF{} : result;
  return x <= kHighest ? bounded : x + kInfinity;
}

ICECACHE_INLINE float exp(float x) {
  return exp(splat(x))[0];
}

}  // namespace
}  // namespace icecache::simd

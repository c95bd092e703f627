// Sums of weights that are known by their logarithms; -inf is a weight of 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd/kernels.h"

namespace icecache {

// log(exp(a) + exp(b))
inline float log_add(float a, float b) {
  const float high = std::max(a, b);
  if (high == -INFINITY) return high;
  return high + std::log(std::exp(a - high) + std::exp(b - high));
}

// log sum exp(x[i])
inline float log_sum(const float* x, std::int64_t n) {
  float max, sum;
  simd::kernels().softmax_stats(x, n, &max, &sum);
  return sum > 0.0f ? max + std::log(sum) : -INFINITY;
}

}  // namespace icecache

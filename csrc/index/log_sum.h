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

// cap tanh(logit / cap); cap 0: the logit.
inline float soft_cap(float logit, float cap) {
  return cap > 0.0f ? cap * std::tanh(logit / cap) : logit;
}

// A sum of weights exp(x) as the largest x and the sum of exp(x - max): exact to rounding however
// large x is. Its logarithm as one float is not: weights relative to it are off by a factor of
// exp(x / 2^24), 1.06 at 10^6 and anything from 10^8 on.
struct WeightSum {
  float max = -INFINITY;
  float sum = 0.0f;

  float log() const { return sum > 0.0f ? max + std::log(sum) : -INFINITY; }
  // Over exp(shift). REQUIRES: shift >= max, or there is no weight.
  float over(float shift) const { return sum > 0.0f ? sum * std::exp(max - shift) : 0.0f; }
};

inline WeightSum weight_sum(const float* x, std::int64_t n) {
  WeightSum result;
  simd::kernels().softmax_stats(x, n, &result.max, &result.sum);
  return result;
}

// log sum exp(x[i])
inline float log_sum(const float* x, std::int64_t n) {
  return weight_sum(x, n).log();
}

}  // namespace icecache

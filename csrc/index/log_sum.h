// Sums of weights, and of weights that are known by their logarithms; -inf is a weight of 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>

#include "simd/kernels.h"

namespace icecache {

// Sixteen lanes side by side, which compilers turn into vectors.
inline float largest(std::span<const float> x) {
  constexpr std::size_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -INFINITY);
  std::size_t i = 0;
  for (; i + kLanes <= x.size(); i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (; i < x.size(); ++i) lanes[0] = std::max(lanes[0], x[i]);
  return *std::max_element(lanes, lanes + kLanes);
}
inline float sum(std::span<const float> x) {
  constexpr std::size_t kLanes = 16;
  float lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= x.size(); i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  }
  for (; i < x.size(); ++i) lanes[0] += x[i];
  return std::accumulate(lanes, lanes + kLanes, 0.0f);
}

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

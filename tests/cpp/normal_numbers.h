// Random numbers for tests of what is done to rows.
#pragma once

#include <random>
#include <vector>

namespace icecache::testing {

inline std::vector<float> normal(int n, unsigned seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> x(n);
  for (float& value : x) value = distribution(random);
  return x;
}

}  // namespace icecache::testing

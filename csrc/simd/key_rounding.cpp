#include "simd/key_rounding.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "icecache/types.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// L of x = L L^T, in the lower triangle of x [D, D], which is positive definite.
void factorize(std::vector<double>& x, std::size_t d) {
  for (std::size_t i = 0; i < d; ++i) {
    double* row = &x[i * d];
    for (std::size_t k = 0; k <= i; ++k) {
      const double* other = &x[k * d];
      double sum = row[k];
      for (std::size_t j = 0; j < k; ++j) sum -= row[j] * other[j];
      row[k] = i == k ? std::sqrt(sum) : sum / other[k];
    }
  }
}

}  // namespace

std::int8_t nearest_code(double x) {
  constexpr float kMagic = 0x1.8p23f;  // the lowest bits of a sum with it are a whole number's
  const float sum = static_cast<float>(x) + kMagic;
  return static_cast<std::int8_t>(std::bit_cast<std::int32_t>(sum) -
                                  std::bit_cast<std::int32_t>(kMagic));
}

KeyRounding::KeyRounding(std::span<const double> second, std::span<const float> step) {
  const std::size_t d = step.size();
  std::vector<double> moments(d * d);
  double trace = 0.0;
  for (std::size_t i = 0; i < d; ++i) {
    for (std::size_t k = 0; k < d; ++k) {
      moments[i * d + k] = second[i * d + k] * step[i] * step[k];
    }
    trace += moments[i * d + i];
  }
  carry_.resize(d * d, 0.0f);
  const double mean = trace / static_cast<double>(d);
  if (!(mean > 0.0) || !std::isfinite(mean)) return;  // one by one
  for (double& x : moments) x /= mean;
  for (std::size_t i = 0; i < d; ++i) moments[i * d + i] += 1.0;
  factorize(moments, d);
  for (std::size_t i = 0; i < d; ++i) {
    for (std::size_t k = 0; k < i; ++k) {
      carry_[i * d + k] = static_cast<float>(moments[i * d + k] / moments[k * d + k]);
    }
  }
}

void KeyRounding::round(std::span<const double> x, double most, std::int8_t* codes) const {
  const std::size_t d = x.size();
  float carried[kMaxHeadDim] = {};
  for (std::size_t i = d; i-- > 0;) {
    codes[i] = nearest_code(std::clamp(x[i] + carried[i], -most, most));
    const auto error = static_cast<float>(x[i] - codes[i]);
    simd::kernels().axpy(error, &carry_[i * d], carried, i);
  }
}

}  // namespace icecache

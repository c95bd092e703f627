#include "index/covariance.h"

#include <algorithm>
#include <cmath>

#include "index/magnitude.h"
#include "simd/kernels.h"

namespace icecache {

std::int64_t sample_stride(std::int64_t count) {
  constexpr std::int64_t kSampleRows = 4096;
  return std::max<std::int64_t>(1, count / kSampleRows);
}

std::vector<double> covariance_of(const float* x, std::int64_t count, std::int64_t stride, int d,
                                  const std::vector<float>& mean) {
  // Some rows at a time, so that they stay in the caches; a power of two of them would lie in few
  // sets of these.
  constexpr std::int64_t kTogether = 136;
  const std::int64_t rows = (count + stride - 1) / stride;
  std::vector<float> transposed(static_cast<std::size_t>(kTogether) * d);
  std::vector<float> centred(transposed.size()), product(static_cast<std::size_t>(d) * d);
  std::vector<double> result(product.size(), 0.0);
  float largest = largest_of(mean.data(), d);
  for (std::int64_t r = 0; r < rows; ++r) {
    largest = std::max(largest, largest_of(x + r * stride * d, d));
  }
  const int exponent = std::isinf(largest) ? 0 : far_exponent(largest);
  for (std::int64_t first = 0; first < rows; first += kTogether) {
    const std::int64_t here = std::min(kTogether, rows - first);
    if (here < kTogether) {
      std::fill(transposed.begin(), transposed.end(), 0.0f);
      std::fill(centred.begin(), centred.end(), 0.0f);
    }
    for (std::int64_t r = 0; r < here; ++r) {
      const float* row = x + (first + r) * stride * d;
      for (int i = 0; i < d; ++i) {
        const float delta = exponent == 0
                                ? row[i] - mean[i]
                                : std::ldexp(row[i], -exponent) - std::ldexp(mean[i], -exponent);
        transposed[i * kTogether + r] = centred[r * d + i] = delta;
      }
    }
    simd::kernels().matmul(transposed.data(), centred.data(), product.data(), d, kTogether, d);
    for (std::size_t i = 0; i < result.size(); ++i) result[i] += product[i];
  }
  for (double& value : result) {
    value = std::ldexp(value / static_cast<double>(rows), 2 * exponent);
  }
  return result;
}

}  // namespace icecache

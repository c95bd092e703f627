#include "index/covariance.h"

#include <algorithm>

#include "simd/kernels.h"

namespace icecache {

std::int64_t sample_stride(std::int64_t count) {
  constexpr std::int64_t kSampleRows = 4096;
  return std::max<std::int64_t>(1, count / kSampleRows);
}

std::vector<double> covariance_of(const float* x, std::int64_t count, std::int64_t stride, int d,
                                  const std::vector<float>& mean) {
  const std::int64_t rows = (count + stride - 1) / stride;
  std::vector<float> transposed(static_cast<std::size_t>(rows) * d);
  std::vector<float> centred(static_cast<std::size_t>(rows) * d);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (int i = 0; i < d; ++i) {
      const float difference = x[r * stride * d + i] - mean[i];
      centred[r * d + i] = difference;
      transposed[i * rows + r] = difference;
    }
  }
  std::vector<float> product(static_cast<std::size_t>(d) * d);
  simd::kernels().matmul(transposed.data(), centred.data(), product.data(), d, rows, d);
  std::vector<double> result(product.begin(), product.end());
  for (double& value : result) value /= static_cast<double>(rows);
  return result;
}

}  // namespace icecache

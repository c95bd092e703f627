#include "index/token_space.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "index/covariance.h"
#include "index/magnitude.h"
#include "index/symmetric_eigen.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

constexpr int kValueRank = 16;
constexpr std::int64_t kRows = 256;  // whose coordinates are made at once, in the L2 cache

const std::byte* row_of(const void* values, DType dtype, std::int64_t row, int d) {
  return static_cast<const std::byte*>(values) +
         static_cast<std::size_t>(row) * static_cast<std::size_t>(d) * size_of(dtype);
}

// The directions in which values vary most, [D, V], scaled to vary as much as `spread`, the mean
// squared distance of keys to their mean. Zeros where values do not vary, or not by a number.
std::vector<float> value_directions(const void* values, DType dtype, std::int64_t count, int d,
                                    int rank, double spread) {
  std::vector<float> directions(static_cast<std::size_t>(d) * rank, 0.0f);
  const std::int64_t stride = sample_stride(count);
  const std::int64_t rows = (count + stride - 1) / stride;
  std::vector<float> sample(static_cast<std::size_t>(rows) * d), mean(d, 0.0f);
  for (std::int64_t r = 0; r < rows; ++r) {
    float* to = sample.data() + r * d;
    simd::kernels().to_float(row_of(values, dtype, r * stride, d), dtype, to, d);
    simd::kernels().axpy(1.0f / static_cast<float>(rows), to, mean.data(), d);
  }
  const std::vector<double> covariance = covariance_of(sample.data(), rows, 1, d, mean);
  double total = 0.0, at_mean = 0.0;
  for (int i = 0; i < d; ++i) {
    total += covariance[i * d + i];
    at_mean += static_cast<double>(mean[i]) * mean[i];
  }
  for (double x : covariance) {
    if (!std::isfinite(x)) return directions;
  }
  constexpr double kRounding = 1e-10;  // of values that are all the same
  if (!(total > kRounding * at_mean)) return directions;
  const SymmetricEigen eigen = symmetric_eigen(covariance, d);
  const double scale = std::min(std::sqrt(spread / total), 0x1p100);
  for (int i = 0; i < d; ++i) {
    for (int j = 0; j < rank; ++j) {
      directions[i * rank + j] = static_cast<float>(scale * eigen.vectors[i * d + j]);
    }
  }
  return directions;
}

}  // namespace

int TokenSpace::value_rank_of(const Config& config, int head_dim) {
  return config.tail == "on" ? std::min(kValueRank, head_dim) : 0;
}

TokenSpace TokenSpace::fit(const float* keys, const void* values, DType dtype, std::int64_t count,
                           int head_dim, const QueryMoments& queries, int rank, int value_rank) {
  TokenSpace space;
  space.metric = QueryMetric::fit(keys, count, head_dim, queries, rank);
  space.value_rank = value_rank;
  if (value_rank == 0) return space;
  space.from_value =
      value_directions(values, dtype, count, head_dim, value_rank, space.metric.spread);
  return space;
}

void TokenSpace::coordinates(const float* keys, const void* values, DType dtype, std::int64_t n,
                             float* out) const {
  if (value_rank == 0) return metric.coordinates(keys, n, out);
  const int d = metric.head_dim, rank = metric.rank;
  const simd::Kernels& kernels = simd::kernels();
  float one[3 * kMaxHeadDim];
  std::vector<float> many;
  if (n > 1) many.resize(static_cast<std::size_t>(std::min(n, kRows)) * (d + rank + value_rank));
  float* const floats = n > 1 ? many.data() : one;
  float* const of_keys = floats + std::min(n, kRows) * d;
  float* const of_values = of_keys + std::min(n, kRows) * rank;
  for (std::int64_t first = 0; first < n; first += kRows) {
    const std::int64_t here = std::min(kRows, n - first);
    metric.coordinates(keys + first * d, here, of_keys);
    kernels.to_float(row_of(values, dtype, first, d), dtype, floats,
                     static_cast<std::size_t>(here * d));
    kernels.matmul(floats, from_value.data(), of_values, here, d, value_rank);
    for (std::int64_t r = 0; r < here; ++r, out += width()) {
      std::copy_n(of_keys + r * rank, rank, out);
      for (int j = 0; j < value_rank; ++j) {
        const float x = of_values[r * value_rank + j];
        out[rank + j] = std::isfinite(x) ? std::clamp(x, -kFarthest, kFarthest) : 0.0f;
      }
    }
  }
}

}  // namespace icecache

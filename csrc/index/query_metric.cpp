#include "index/query_metric.h"

#include <algorithm>
#include <cmath>

#include "index/covariance.h"
#include "index/symmetric_eigen.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Directions that no query was seen in keep this share of the mean variance, so that a new kind of
// query still finds its keys.
constexpr double kFloor = 1e-4;

}  // namespace

QueryMetric QueryMetric::fit(const float* keys, std::int64_t count, int head_dim,
                             const QueryMoments& queries, int rank) {
  const int d = head_dim;
  QueryMetric metric;
  metric.head_dim = d;
  metric.rank = rank;
  std::vector<double> sum(d, 0.0);
  for (std::int64_t n = 0; n < count; ++n) {
    for (int i = 0; i < d; ++i) sum[i] += keys[n * d + i];
  }
  for (double x : sum) metric.mean.push_back(static_cast<float>(x / static_cast<double>(count)));

  // root = U diag(sqrt(lambda)) serves as well as the symmetric root: distances are the same.
  std::vector<double> root(static_cast<std::size_t>(d) * d, 0.0), inverse(root);
  if (queries.count() > 0) {
    std::vector<double> second = queries.second();
    for (double& x : second) x /= static_cast<double>(queries.count());
    const SymmetricEigen eigen = symmetric_eigen(second, d);
    double trace = 0.0;
    for (double x : eigen.values) trace += std::max(0.0, x);
    const double floor = std::max(kFloor * trace / d, 1e-30);
    for (int j = 0; j < d; ++j) {
      const double scale = std::sqrt(std::max(eigen.values[j], floor));
      for (int i = 0; i < d; ++i) {
        root[i * d + j] = eigen.vectors[i * d + j] * scale;
        inverse[i * d + j] = eigen.vectors[i * d + j] / scale;
      }
    }
  } else {
    for (int i = 0; i < d; ++i) root[i * d + i] = inverse[i * d + i] = 1.0;
  }

  const std::vector<double> spread =
      covariance_of(keys, count, sample_stride(count), d, metric.mean);
  std::vector<double> half(root.size(), 0.0), seen(root.size(), 0.0);
  for (int i = 0; i < d; ++i) {
    for (int k = 0; k < d; ++k) {
      const double x = spread[i * d + k];
      for (int j = 0; j < d; ++j) half[i * d + j] += x * root[k * d + j];
    }
  }
  for (int k = 0; k < d; ++k) {
    for (int i = 0; i < d; ++i) {
      const double x = root[k * d + i];
      for (int j = 0; j < d; ++j) seen[i * d + j] += x * half[k * d + j];
    }
  }
  const SymmetricEigen main = symmetric_eigen(seen, d);
  for (int j = 0; j < rank; ++j) metric.spread += std::max(0.0, main.values[j]);
  metric.from_key.assign(static_cast<std::size_t>(d) * rank, 0.0f);
  metric.from_query.assign(static_cast<std::size_t>(d) * rank, 0.0f);
  std::vector<double> key(rank), query(rank);
  for (int i = 0; i < d; ++i) {
    std::fill(key.begin(), key.end(), 0.0);
    std::fill(query.begin(), query.end(), 0.0);
    for (int k = 0; k < d; ++k) {
      const double to_key = root[i * d + k], to_query = inverse[i * d + k];
      for (int j = 0; j < rank; ++j) {
        key[j] += to_key * main.vectors[k * d + j];
        query[j] += to_query * main.vectors[k * d + j];
      }
    }
    for (int j = 0; j < rank; ++j) {
      metric.from_key[i * rank + j] = static_cast<float>(key[j]);
      metric.from_query[i * rank + j] = static_cast<float>(query[j]);
    }
  }
  return metric;
}

void QueryMetric::coordinates(const float* keys, std::int64_t n, float* out) const {
  simd::kernels().matmul(keys, from_key.data(), out, n, head_dim, rank);
  float shift[kMaxHeadDim];
  simd::kernels().matmul(mean.data(), from_key.data(), shift, 1, head_dim, rank);
  for (std::int64_t i = 0; i < n; ++i) {
    for (int j = 0; j < rank; ++j) out[i * rank + j] -= shift[j];
  }
}

}  // namespace icecache

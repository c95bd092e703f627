#include "index/query_metric.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "index/covariance.h"
#include "index/magnitude.h"
#include "index/symmetric_eigen.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// All directions get this share of the mean variance, so that a new kind of query still finds its
// keys.
constexpr double kFloor = 0.03;

// What unit coordinates need so that these and the matrices are numbers of ordinary size: all are
// compared with each other alone. `largest`: of the keys.
int unit_exponent(const std::vector<double>& from_key, int d, int rank, double largest) {
  constexpr int kMost = 100;  // of an element of the matrices
  double reach = 0.0;         // of a key of elements 1
  for (int j = 0; j < rank; ++j) {
    double sum = 0.0;
    for (int i = 0; i < d; ++i) sum += std::abs(from_key[i * rank + j]);
    reach = std::max(reach, sum);
  }
  if (!(reach > 0.0)) return 0;
  const int own = std::ilogb(reach);
  const int exponent = far_exponent(largest > 0.0 ? 2.0 * largest * reach : reach);
  return std::clamp(exponent, own - kMost, own + kMost);
}

// A matrix R [D, D] with R R^T = the queries' second moments (and a floor), and its inverse; the
// identity if there are no queries. R is U diag(sqrt(lambda)), from the eigenvectors U and the
// eigenvalues lambda: distances between rows of K R are those that the symmetric root would give.
struct Roots {
  std::vector<double> root, inverse;
};
Roots roots_of(const QueryMoments& queries, int d) {
  std::vector<double> root(static_cast<std::size_t>(d) * d, 0.0), inverse(root);
  if (queries.empty()) {
    for (int i = 0; i < d; ++i) root[i * d + i] = inverse[i * d + i] = 1.0;
    return {std::move(root), std::move(inverse)};
  }
  const SymmetricEigen eigen = symmetric_eigen(queries.second(), d);
  double trace = 0.0;
  for (double x : eigen.values) trace += std::max(0.0, x);
  const double floor = std::max(kFloor * trace / d, 1e-30);
  for (int j = 0; j < d; ++j) {
    const double scale = std::sqrt(std::max(eigen.values[j], 0.0) + floor);
    for (int i = 0; i < d; ++i) {
      root[i * d + j] = eigen.vectors[i * d + j] * scale;
      inverse[i * d + j] = eigen.vectors[i * d + j] / scale;
    }
  }
  return {std::move(root), std::move(inverse)};
}

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

  const auto [root, inverse] = roots_of(queries, d);
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
  std::vector<double> from_key(static_cast<std::size_t>(d) * rank, 0.0), from_query(from_key);
  for (int i = 0; i < d; ++i) {
    double* const key = from_key.data() + static_cast<std::size_t>(i) * rank;
    double* const query = from_query.data() + static_cast<std::size_t>(i) * rank;
    for (int k = 0; k < d; ++k) {
      const double to_key = root[i * d + k], to_query = inverse[i * d + k];
      for (int j = 0; j < rank; ++j) {
        key[j] += to_key * main.vectors[k * d + j];
        query[j] += to_query * main.vectors[k * d + j];
      }
    }
  }
  const int exponent = unit_exponent(from_key, d, rank, largest_of(keys, count * d));
  for (double x : from_key) metric.from_key.push_back(static_cast<float>(std::ldexp(x, -exponent)));
  for (double x : from_query) {
    metric.from_query.push_back(static_cast<float>(std::ldexp(x, exponent)));
  }
  metric.spread = std::ldexp(metric.spread, -2 * exponent);
  return metric;
}

// In double, and no farther than kFarthest.
void QueryMetric::far_coordinates(const float* key, float* out) const {
  for (int j = 0; j < rank; ++j) {
    double sum = 0.0;
    for (int i = 0; i < head_dim; ++i) {
      sum += (static_cast<double>(key[i]) - mean[i]) * from_key[i * rank + j];
    }
    out[j] = static_cast<float>(std::clamp<double>(sum, -kFarthest, kFarthest));
  }
}

void QueryMetric::coordinates(const float* keys, std::int64_t n, float* out) const {
  simd::kernels().matmul(keys, from_key.data(), out, n, head_dim, rank);
  float shift[kMaxHeadDim];
  simd::kernels().matmul(mean.data(), from_key.data(), shift, 1, head_dim, rank);
  for (std::int64_t i = 0; i < n; ++i) {
    for (int j = 0; j < rank; ++j) out[i * rank + j] -= shift[j];
    if (!(largest_of(out + i * rank, rank) <= kFarthest)) {
      far_coordinates(keys + i * head_dim, out + i * rank);
    }
  }
}

}  // namespace icecache

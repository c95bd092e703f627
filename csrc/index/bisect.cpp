#include "index/bisect.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "index/magnitude.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

constexpr int kIterations = 4;
// Rows that a direction is estimated from; the split itself orders all rows.
constexpr std::size_t kDirectionRows = 2048;

// Any multiple of a direction is one: one whose square is a number.
void make_ordinary(std::vector<float>& direction) {
  const auto n = static_cast<std::int64_t>(direction.size());
  scale_by(direction.data(), n, -far_exponent(largest_of(direction.data(), n)));
}

}  // namespace

void principal_projection(const float* x, int rank, std::span<const std::int32_t> rows,
                          std::vector<float>& out) {
  const simd::Kernels& kernels = simd::kernels();
  const std::size_t stride = std::max<std::size_t>(1, rows.size() / kDirectionRows);
  const auto row = [&](std::size_t i) {
    return x + static_cast<std::size_t>(rows[i]) * static_cast<std::size_t>(rank);
  };
  const simd::SomeRowsArgs sample{x, rows.data(), static_cast<std::int64_t>(rows.size()),
                                  static_cast<std::int64_t>(stride), rank};
  std::vector<float> mean(rank, 0.0f), direction(rank), next(rank), centred(rank);
  // The sum of all rows, each times 0 + 1.
  const float sampled = kernels.power_step(sample, next.data(), -1.0f, mean.data());
  for (float& m : mean) m /= sampled;
  float farthest = -1.0f;
  for (std::size_t i = 0; i < rows.size(); i += stride) {
    for (int j = 0; j < rank; ++j) centred[j] = row(i)[j] - mean[j];
    const float distance = kernels.dot(centred.data(), centred.data(), rank);
    if (distance > farthest) {
      farthest = distance;
      direction = centred;
    }
  }
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    make_ordinary(direction);
    const float length = std::sqrt(kernels.dot(direction.data(), direction.data(), rank));
    if (!(length > 0.0f)) break;
    for (float& d : direction) d /= length;
    const float offset = kernels.dot(mean.data(), direction.data(), rank);
    std::fill(next.begin(), next.end(), 0.0f);
    const float total = kernels.power_step(sample, direction.data(), offset, next.data());
    kernels.axpy(-total, mean.data(), next.data(), rank);
    direction = next;
  }
  make_ordinary(direction);
  out.resize(rows.size());
  kernels.project_rows({x, rows.data(), sample.count, 1, rank}, direction.data(), out.data());
}

void bisect(const float* x, int rank, std::span<std::int32_t> order, int page_size,
            int node_pages) {
  const std::size_t pages = (order.size() + page_size - 1) / page_size;
  if (pages <= 1) return;
  const std::size_t unit = pages > static_cast<std::size_t>(node_pages) ? node_pages : 1;
  const std::size_t left = std::max(unit, pages / 2 / unit * unit) * page_size;
  std::vector<float> projection;
  principal_projection(x, rank, order, projection);
  std::vector<std::int32_t> ranking(order.size());
  std::iota(ranking.begin(), ranking.end(), 0);
  std::nth_element(ranking.begin(), ranking.begin() + static_cast<std::ptrdiff_t>(left),
                   ranking.end(), [&](std::int32_t a, std::int32_t b) {
                     return projection[a] != projection[b] ? projection[a] < projection[b] : a < b;
                   });
  for (std::int32_t& r : ranking) r = order[r];
  std::copy(ranking.begin(), ranking.end(), order.begin());
  bisect(x, rank, order.first(left), page_size, node_pages);
  bisect(x, rank, order.subspan(left), page_size, node_pages);
}

std::uint32_t upper_half(const float* x, int rank, int n) {
  std::vector<std::int32_t> rows(n);
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<float> projection;
  principal_projection(x, rank, rows, projection);
  std::sort(rows.begin(), rows.end(), [&](std::int32_t a, std::int32_t b) {
    return projection[a] != projection[b] ? projection[a] < projection[b] : a < b;
  });
  std::uint32_t mask = 0;
  for (int i = n / 2; i < n; ++i) mask |= 1u << rows[i];
  return mask;
}

}  // namespace icecache

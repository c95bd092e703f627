#include "index/bisect.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <random>

namespace icecache::bisect_test {
namespace {

std::vector<float> normal_rows(int n, int rank, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(n) * rank);
  for (float& value : x) value = normal(random);
  return x;
}

std::vector<std::int32_t> identity(int n) {
  std::vector<std::int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// Mean squared distance of a row to the mean of its page.
double spread(const std::vector<float>& x, int rank, const std::vector<std::int32_t>& order,
              int page_size) {
  double total = 0.0;
  for (std::size_t begin = 0; begin < order.size(); begin += page_size) {
    const std::size_t end = std::min(order.size(), begin + page_size);
    std::vector<double> mean(rank, 0.0);
    for (std::size_t i = begin; i < end; ++i) {
      for (int j = 0; j < rank; ++j)
        mean[j] += x[order[i] * rank + j] / static_cast<double>(end - begin);
    }
    for (std::size_t i = begin; i < end; ++i) {
      for (int j = 0; j < rank; ++j) {
        const double delta = x[order[i] * rank + j] - mean[j];
        total += delta * delta;
      }
    }
  }
  return total / static_cast<double>(order.size());
}

TEST(Bisect, IsAPermutationForAnyLength) {
  for (int n : {1, 2, 15, 16, 17, 63, 64, 65, 1000, 1024}) {
    SCOPED_TRACE(n);
    const std::vector<float> x = normal_rows(n, 8, 1);
    std::vector<std::int32_t> order = identity(n);
    bisect(x.data(), 8, order, 16, 4);
    std::sort(order.begin(), order.end());
    EXPECT_EQ(order, identity(n));
  }
}

TEST(Bisect, FindsSeparatedClusters) {
  // 32 clusters of 16: every page must hold exactly one.
  const int clusters = 32, size = 16, rank = 8;
  const std::vector<float> centres = normal_rows(clusters, rank, 2);
  std::vector<float> x = normal_rows(clusters * size, rank, 3);
  for (int n = 0; n < clusters * size; ++n) {
    for (int j = 0; j < rank; ++j) {
      x[n * rank + j] = 1e-3f * x[n * rank + j] + 10.0f * centres[(n % clusters) * rank + j];
    }
  }
  std::vector<std::int32_t> order = identity(clusters * size);
  bisect(x.data(), rank, order, size, 4);
  int pure = 0;
  for (int page = 0; page < clusters; ++page) {
    const int cluster = order[page * size] % clusters;
    pure += std::all_of(order.begin() + page * size, order.begin() + (page + 1) * size,
                        [&](std::int32_t row) { return row % clusters == cluster; });
  }
  EXPECT_EQ(pure, clusters);
}

TEST(Bisect, PagesAreTighterThanConsecutiveRowsAndNodesTighterThanAll) {
  const int n = 4096, rank = 8;
  const std::vector<float> x = normal_rows(n, rank, 4);
  std::vector<std::int32_t> order = identity(n);
  const double consecutive = spread(x, rank, order, 16);
  bisect(x.data(), rank, order, 16, 4);
  EXPECT_LT(spread(x, rank, order, 16), 0.45 * consecutive);
  EXPECT_LT(spread(x, rank, order, 64), 0.6 * consecutive);  // aligned runs are subtrees
}

TEST(Bisect, IsDeterministicAndAcceptsEqualRows) {
  const std::vector<float> x = normal_rows(500, 8, 5);
  std::vector<std::int32_t> first = identity(500), second = identity(500);
  bisect(x.data(), 8, first, 16, 4);
  bisect(x.data(), 8, second, 16, 4);
  EXPECT_EQ(first, second);
  const std::vector<float> equal(500 * 8, 1.0f);
  bisect(equal.data(), 8, first, 16, 4);
  std::sort(first.begin(), first.end());
  EXPECT_EQ(first, identity(500));
}

TEST(UpperHalf, SplitsInTwoAlongTheSpread) {
  std::vector<float> x(32 * 8, 0.0f);
  for (int n = 0; n < 32; ++n) x[n * 8 + 3] = n % 2 == 0 ? 5.0f : -5.0f;
  const std::uint32_t mask = upper_half(x.data(), 8, 32);
  EXPECT_TRUE(mask == 0x55555555u || mask == 0xaaaaaaaau) << std::hex << mask;
  const std::vector<float> equal(17 * 8, 2.0f);
  for (int n : {2, 3, 17}) {
    EXPECT_EQ(std::popcount(upper_half(equal.data(), 8, n)), n - n / 2);
  }
}

}  // namespace
}  // namespace icecache::bisect_test

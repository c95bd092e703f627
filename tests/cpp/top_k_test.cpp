#include "index/top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <random>

#include "simd/kernels.h"

namespace icecache::top_k_test {
namespace {

using Ranks = std::vector<std::int16_t>;
constexpr std::int16_t kLowest = std::numeric_limits<std::int16_t>::min();
constexpr std::int16_t kHighest = std::numeric_limits<std::int16_t>::max();

// The maxima that simd::ScoreRankArgs defines.
Ranks block_maxima(const Ranks& rank) {
  const std::size_t blocks = (rank.size() + simd::kRankBlock - 1) / simd::kRankBlock;
  Ranks maxima(blocks * simd::kRankLanes, kLowest);
  for (std::size_t i = 0; i < rank.size(); ++i) {
    std::int16_t& max = maxima[i / simd::kRankBlock * simd::kRankLanes + i % simd::kRankLanes];
    max = std::max(max, rank[i]);
  }
  return maxima;
}

std::vector<std::int32_t> by_sorting(const Ranks& rank, std::int16_t floor, std::int64_t k) {
  std::vector<std::int32_t> order;
  for (std::size_t i = 0; i < rank.size(); ++i) {
    if (rank[i] > floor) order.push_back(static_cast<std::int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return rank[a] > rank[b]; });
  order.resize(std::min(order.size(), static_cast<std::size_t>(std::max<std::int64_t>(0, k))));
  std::sort(order.begin(), order.end());
  return order;
}

void expect_agrees(const Ranks& rank, std::int16_t floor = -16384) {
  const Ranks maxima = block_maxima(rank);
  const auto n = static_cast<std::int64_t>(rank.size());
  const auto blocks = static_cast<std::int64_t>(maxima.size());
  std::vector<std::int32_t> got{1, 2, 3};
  Ranks scratch{4, 5};
  // Also around the number of block maxima, where the bound they give begins to hold.
  for (const std::int64_t k : {std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}, std::int64_t{2},
                               blocks - 1, blocks, blocks + 1, n / 3, n - 1, n, n + 5}) {
    top_k(rank, maxima, floor, k, scratch, got);
    EXPECT_EQ(got, by_sorting(rank, floor, k)) << "k = " << k << " of " << n;
  }
}

Ranks uniform(int n, int low, int high, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> distribution(low, high);
  Ranks rank(n);
  for (std::int16_t& x : rank) x = static_cast<std::int16_t>(distribution(random));
  return rank;
}

TEST(TopK, AgreesWithSorting) {
  for (const int n : {0, 16, 32, 240, 256, 272, 1008, 1024, 5008, 40000}) {
    expect_agrees(uniform(n, -9000, 9000, 1));
    expect_agrees(uniform(n, -9000, 9000, 2), 0);
    expect_agrees(uniform(n, -16384, -16000, 3));
  }
}

TEST(TopK, TiesGoToTheLowerIndex) {
  expect_agrees(uniform(3008, 0, 3, 2));
  expect_agrees(uniform(3008, 0, 1, 3));
  expect_agrees(Ranks(512, 77));
}

TEST(TopK, NothingAtOrBelowTheFloorIsTaken) {
  expect_agrees(Ranks(64, -16384));
  expect_agrees(uniform(640, -3, 3, 4), 2);
  expect_agrees(uniform(640, -3, 3, 4), 3);
  Ranks rank(512, -16384);
  rank[0] = rank[17] = rank[300] = rank[511] = -16383;
  expect_agrees(rank);
}

TEST(TopK, TakesTheWholeRange) {
  Ranks rank = uniform(528, kLowest, kHighest, 5);
  rank[3] = kLowest;
  rank[18] = kHighest;
  rank[527] = kHighest;
  for (const std::int16_t floor :
       {kLowest, std::int16_t{0}, std::int16_t{kHighest - 1}, kHighest}) {
    expect_agrees(rank, floor);
  }
}

// The best ranks share lanes and blocks: the k-th largest block maximum is far below them.
TEST(TopK, FindsWhatIsCrowdedInOneLaneOrBlock) {
  for (const bool lane : {true, false}) {
    Ranks rank = uniform(4096, -5000, 0, 6);
    for (int i = 0; i < 4096; ++i) {
      if (lane ? i % 16 == 5 : i / 256 == 9) rank[i] = static_cast<std::int16_t>(100 + i % 37);
    }
    expect_agrees(rank);
    std::vector<std::int32_t> got;
    Ranks scratch;
    top_k(rank, block_maxima(rank), -16384, 256, scratch, got);
    ASSERT_EQ(got.size(), 256u);
    for (const std::int32_t i : got) EXPECT_GE(rank[i], 100);
  }
}

TEST(TopK, AscendingAndDescending) {
  Ranks rank(2048);
  for (int i = 0; i < 2048; ++i) rank[i] = static_cast<std::int16_t>(4 * i - 4000);
  expect_agrees(rank);
  std::reverse(rank.begin(), rank.end());
  expect_agrees(rank);
}

TEST(KthLargest, AgreesWithSorting) {
  for (const Ranks& x : {Ranks{7}, Ranks{kLowest, kHighest},
                         Ranks{-1, 0, 1, -256, 255, 256, -257, kLowest, kHighest}, Ranks(100, -1),
                         uniform(1000, kLowest, kHighest, 7), uniform(1000, -2, 2, 8),
                         uniform(777, 250, 260, 9), uniform(777, -260, -250, 10)}) {
    Ranks sorted = x;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    for (std::size_t k = 1; k <= x.size(); k += 1 + x.size() / 97) {
      EXPECT_EQ(kth_largest(x, static_cast<std::int64_t>(k)), sorted[k - 1]) << k;
    }
    EXPECT_EQ(kth_largest(x, static_cast<std::int64_t>(x.size())), sorted.back());
  }
}

}  // namespace
}  // namespace icecache::top_k_test

#include "index/top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

namespace icecache {
namespace {

std::vector<std::int32_t> by_sorting(const std::vector<float>& scores, std::int64_t k) {
  std::vector<std::int32_t> order;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > 0.0f) order.push_back(static_cast<std::int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return scores[a] > scores[b]; });
  order.resize(
      std::min<std::size_t>(order.size(), static_cast<std::size_t>(std::max<std::int64_t>(0, k))));
  std::sort(order.begin(), order.end());
  return order;
}

void expect_agrees(const std::vector<float>& scores) {
  const std::int64_t n = static_cast<std::int64_t>(scores.size());
  std::vector<std::int32_t> got{1, 2, 3};
  for (const std::int64_t k : {std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}, std::int64_t{2},
                               n / 3, n - 1, n, n + 5}) {
    top_k(scores.data(), n, k, got);
    EXPECT_EQ(got, by_sorting(scores, k)) << "k = " << k;
  }
}

TEST(TopK, AgreesWithSorting) {
  std::mt19937 random(1);
  for (const int n : {0, 1, 2, 17, 1000, 5000}) {
    std::vector<float> scores(n);
    for (float& x : scores) x = std::exp(static_cast<float>(random() % 2000) / 50.0f - 20.0f);
    expect_agrees(scores);
  }
}

TEST(TopK, TiesGoToTheLowerIndex) {
  std::mt19937 random(2);
  std::vector<float> scores(3000);
  for (float& x : scores) x = static_cast<float>(random() % 4);
  expect_agrees(scores);
  expect_agrees(std::vector<float>(500, 0.25f));
}

// Scores that share their leading bits fall into one bucket.
TEST(TopK, TellsScoresApartThatDifferInTheLastBit) {
  std::vector<float> scores(400);
  float x = 1.0f;
  for (float& score : scores) score = x = std::nextafter(x, 2.0f);
  std::shuffle(scores.begin(), scores.end(), std::mt19937(3));
  expect_agrees(scores);
}

TEST(TopK, TakesTheWholeRangeOfFloats) {
  using Limits = std::numeric_limits<float>;
  expect_agrees({0.0f, Limits::denorm_min(), Limits::min(), 1e-30f, 1.0f, Limits::max(),
                 Limits::infinity(), 0.0f, 3e-40f});
}

TEST(TopK, ScoresOfZeroAreNeverTaken) {
  expect_agrees(std::vector<float>(64, 0.0f));
  expect_agrees({0.0f, 1.0f, 0.0f, 2.0f});
}

}  // namespace
}  // namespace icecache

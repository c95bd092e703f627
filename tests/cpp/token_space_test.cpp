// Where tokens lie: keys in the query metric, values beside them on the same scale.
#include "index/token_space.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace icecache::token_space_test {
namespace {

constexpr int kDim = 24, kRank = 8, kValues = 16;
constexpr std::int64_t kCount = 300;

std::vector<float> normal(std::size_t n, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> x(n);
  for (float& one : x) one = distribution(random);
  return x;
}

TokenSpace fitted(const std::vector<float>& keys, const std::vector<float>& values,
                  int value_rank = kValues) {
  return TokenSpace::fit(keys.data(), values.data(), DType::kFloat32, kCount, kDim, {}, kRank,
                         value_rank);
}

std::vector<float> placed(const TokenSpace& space, const std::vector<float>& keys,
                          const std::vector<float>& values) {
  std::vector<float> out(kCount * space.width());
  space.coordinates(keys.data(), values.data(), DType::kFloat32, kCount, out.data());
  return out;
}

// Summed variance of the columns from `first` to before `end`.
double spread(const std::vector<float>& rows, int width, int first, int end) {
  double total = 0.0;
  for (int j = first; j < end; ++j) {
    double sum = 0.0, squares = 0.0;
    for (std::int64_t i = 0; i < kCount; ++i) {
      sum += rows[i * width + j];
      squares += static_cast<double>(rows[i * width + j]) * rows[i * width + j];
    }
    total += squares / kCount - sum / kCount * (sum / kCount);
  }
  return total;
}

TEST(TokenSpaceTest, ValuesCountOnlyWithAFarField) {
  Config config;
  EXPECT_EQ(TokenSpace::value_rank_of(config, 128), kValues);
  EXPECT_EQ(TokenSpace::value_rank_of(config, 8), 8);
  config.tail = "off";
  EXPECT_EQ(TokenSpace::value_rank_of(config, 128), 0);
}

TEST(TokenSpaceTest, WithoutValuesItIsTheQueryMetric) {
  const auto keys = normal(kCount * kDim, 1.0f, 1), values = normal(kCount * kDim, 1.0f, 2);
  const TokenSpace space = fitted(keys, values, 0);
  EXPECT_EQ(space.width(), kRank);
  std::vector<float> alone(kCount * kRank);
  space.metric.coordinates(keys.data(), kCount, alone.data());
  EXPECT_EQ(placed(space, keys, values), alone);
}

TEST(TokenSpaceTest, ValuesVaryAsMuchAsKeysWhateverTheirScale) {
  for (const float scale : {1e-3f, 1.0f, 1e3f}) {
    const auto keys = normal(kCount * kDim, 2.0f, 1), values = normal(kCount * kDim, scale, 2);
    const TokenSpace space = fitted(keys, values);
    const auto rows = placed(space, keys, values);
    const double of_keys = spread(rows, space.width(), 0, kRank);
    const double of_values = spread(rows, space.width(), kRank, space.width());
    // 16 of 24 alike directions hold two thirds of the values' variance and a little more.
    EXPECT_GT(of_values, 0.6 * of_keys) << scale;
    EXPECT_LT(of_values, 1.1 * of_keys) << scale;
    // The key's coordinates are the metric's own.
    std::vector<float> alone(kCount * kRank);
    space.metric.coordinates(keys.data(), kCount, alone.data());
    for (int j = 0; j < kRank; ++j) EXPECT_EQ(rows[7 * space.width() + j], alone[7 * kRank + j]);
  }
}

TEST(TokenSpaceTest, ValuesThatAreNoNumbersOrDoNotVaryLieAtZero) {
  const auto keys = normal(kCount * kDim, 1.0f, 1);
  auto values = normal(kCount * kDim, 1.0f, 2);
  const TokenSpace good = fitted(keys, values);
  values[5 * kDim] = NAN;
  values[9 * kDim + 3] = INFINITY;
  const std::vector<float> same(kCount * kDim, 3.0f);
  const auto rows = placed(good, keys, values);
  for (float x : rows) EXPECT_TRUE(std::isfinite(x));
  for (const auto& bad : {values, same}) {
    const TokenSpace space = fitted(keys, bad);
    for (float x : space.from_value) EXPECT_EQ(x, 0.0f);
    for (float x : placed(space, keys, bad)) EXPECT_TRUE(std::isfinite(x));
  }
}

}  // namespace
}  // namespace icecache::token_space_test

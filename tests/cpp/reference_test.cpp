// The reference against cases with a known answer and against its own algebra.
#include "reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace icecache::reference::reference_test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Data {
  Data(std::int64_t n, int dim, int rows, unsigned seed) : dim(dim) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (auto* part : {&keys, &values}) {
      part->resize(static_cast<std::size_t>(n * dim));
      for (float& x : *part) x = normal(random);
    }
    queries.resize(static_cast<std::size_t>(rows * dim));
    for (float& x : queries) x = normal(random) / std::sqrt(static_cast<float>(dim));
  }
  Tokens tokens() const {
    return {keys.data(), values.data(), static_cast<std::int64_t>(keys.size()) / dim, dim};
  }
  int dim;
  std::vector<float> keys, values, queries;
};

void expect_equal(const Attention& a, const Attention& b, double tolerance = 1e-12) {
  ASSERT_EQ(a.out.size(), b.out.size());
  ASSERT_EQ(a.lse.size(), b.lse.size());
  for (std::size_t i = 0; i < a.out.size(); ++i) EXPECT_NEAR(a.out[i], b.out[i], tolerance) << i;
  for (std::size_t i = 0; i < a.lse.size(); ++i) {
    if (a.lse[i] != b.lse[i]) {
      EXPECT_NEAR(a.lse[i], b.lse[i], tolerance) << i;
    }
  }
}

TEST(ReferenceTest, EqualKeysAverageTheValues) {
  const std::vector<float> keys(4 * 2, 0.5f);
  const std::vector<float> values = {1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<float> query = {2.0f, -1.0f};
  const Attention a = attend(query.data(), 1, {keys.data(), values.data(), 4, 2});
  EXPECT_NEAR(a.out[0], 4.0, 1e-14);
  EXPECT_NEAR(a.out[1], 5.0, 1e-14);
  EXPECT_NEAR(a.lse[0], 0.5 + std::log(4.0), 1e-14);
}

TEST(ReferenceTest, NoTokensAreZeroWithoutWeight) {
  const Data data(3, 8, 2, 1);
  const Attention a = attend(data.queries.data(), 2, data.tokens(), {false, false, false});
  for (const double x : a.out) EXPECT_EQ(x, 0.0);
  for (const double x : a.lse) EXPECT_EQ(x, -kInf);
}

TEST(ReferenceTest, DisjointSubsetsMergeToTheWhole) {
  for (const std::int64_t n : {1, 15, 16, 17, 50}) {
    const Data data(n, 16, 3, 2);
    std::vector<bool> even(static_cast<std::size_t>(n)), odd(even.size());
    for (std::int64_t i = 0; i < n; ++i) (i % 2 == 0 ? even : odd)[i] = true;
    const Attention a = attend(data.queries.data(), 3, data.tokens(), even);
    const Attention b = attend(data.queries.data(), 3, data.tokens(), odd);
    expect_equal(merge(a, b), attend(data.queries.data(), 3, data.tokens()));
  }
}

TEST(ReferenceTest, CausalRowsSeeTheirPast) {
  const int group = 2, tokens = 5;
  const std::int64_t first = 7;
  const Data data(12, 8, group * tokens, 3);
  const Attention a = attend_causal(data.queries.data(), tokens, group, first, data.tokens());
  for (int t = 0; t < tokens; ++t) {
    std::vector<bool> past(12);
    for (std::int64_t i = 0; i <= first + t; ++i) past[i] = true;
    const Attention row = attend(data.queries.data() + t * group * 8, group, data.tokens(), past);
    for (int i = 0; i < group * 8; ++i) EXPECT_EQ(a.out[t * group * 8 + i], row.out[i]);
  }
}

// Logits [rows, N] of the tokens: the weights that make a far field exact.
std::vector<double> exact_weights(const Data& data) {
  const std::size_t n = data.keys.size() / data.dim, rows = data.queries.size() / data.dim;
  std::vector<double> logits(rows * n, 0.0);
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t i = 0; i < n; ++i) {
      for (int d = 0; d < data.dim; ++d) {
        logits[r * n + i] +=
            static_cast<double>(data.queries[r * data.dim + d]) * data.keys[i * data.dim + d];
      }
    }
  }
  return logits;
}

TEST(ReferenceTest, NodesOfOneTokenAreExactAttention) {
  const Data data(20, 8, 3, 4);
  std::vector<std::int32_t> node(20);
  std::vector<bool> picked(20), rest(20);
  for (int i = 0; i < 20; ++i) {
    node[i] = i;
    picked[i] = i % 3 == 0;
    rest[i] = !picked[i];
  }
  const std::vector<double> weights = exact_weights(data);
  const FarAttention far = attend_far(3, data.tokens(), {node, picked, weights});
  expect_equal(far.attention, attend(data.queries.data(), 3, data.tokens(), rest));
  EXPECT_EQ(far.node_lse[0], -kInf) << "picked";
}

TEST(ReferenceTest, WeightOfTheFarFieldIsExactWithExactWeights) {
  const Data data(64, 16, 2, 5);
  std::vector<std::int32_t> node(64);
  for (int i = 0; i < 64; ++i) node[i] = i / 16;
  std::vector<bool> picked(64), rest(64, true);
  for (const int i : {0, 5, 17, 40, 41}) {
    picked[i] = true;
    rest[i] = false;
  }
  const std::vector<double> weights = exact_weights(data);
  const FarAttention far = attend_far(2, data.tokens(), {node, picked, weights});
  const Attention exact = attend(data.queries.data(), 2, data.tokens(), rest);
  for (int r = 0; r < 2; ++r) EXPECT_NEAR(far.attention.lse[r], exact.lse[r], 1e-12);
}

TEST(ReferenceTest, NodesOfEqualValuesAreExactAttention) {
  Data data(30, 8, 2, 6);
  std::vector<std::int32_t> node(30);
  for (int i = 0; i < 30; ++i) {
    node[i] = i % 3;
    for (int d = 0; d < 8; ++d) data.values[i * 8 + d] = data.values[i % 3 * 8 + d];
  }
  const std::vector<double> weights = exact_weights(data);
  const FarAttention far = attend_far(2, data.tokens(), {node, {}, weights});
  expect_equal(far.attention, attend(data.queries.data(), 2, data.tokens()));
}

// Two nodes by hand: weights 1 + 3 with values 2, 6; weight 4, and one picked, with value 10.
TEST(ReferenceTest, ANodeWeighsTheSumAndIsWorthTheMean) {
  const std::vector<float> keys(5, 0.0f), values = {2.0f, 6.0f, 10.0f, 99.0f, 77.0f};
  const std::vector<std::int32_t> node = {0, 0, 1, 1, -1};
  const std::vector<double> weights = {0.0, std::log(3.0), std::log(4.0), 5.0, 5.0};
  const Tokens tokens{keys.data(), values.data(), 5, 1};
  const FarAttention far =
      attend_far(1, tokens, {node, {false, false, false, true, false}, weights});
  ASSERT_EQ(far.node_lse.size(), 2u);
  EXPECT_NEAR(far.node_lse[0], std::log(4.0), 1e-14);
  EXPECT_NEAR(far.node_lse[1], std::log(4.0), 1e-14);
  EXPECT_NEAR(far.attention.lse[0], std::log(8.0), 1e-14);
  EXPECT_NEAR(far.attention.out[0], (4.0 * 4.0 + 4.0 * 10.0) / 8.0, 1e-13);
}

TEST(ReferenceTest, FarFieldOfNothing) {
  const Data data(4, 8, 2, 7);
  const std::vector<std::int32_t> node = {0, 0, 1, 1}, none(4, -1);
  const std::vector<double> weights = exact_weights(data);
  const FarAttention picked =
      attend_far(2, data.tokens(), {node, {true, true, true, true}, weights});
  for (const double x : picked.node_lse) EXPECT_EQ(x, -kInf);
  const FarAttention outside = attend_far(2, data.tokens(), {none, {}, weights});
  EXPECT_TRUE(outside.node_lse.empty());
  const std::vector<double> nothing(8, -kInf);
  const FarAttention weightless = attend_far(2, data.tokens(), {node, {}, nothing});
  for (const FarAttention* far : {&picked, &outside, &weightless}) {
    for (const double x : far->attention.out) EXPECT_EQ(x, 0.0);
    for (const double x : far->attention.lse) EXPECT_EQ(x, -kInf);
  }
}

TEST(ReferenceTest, FarFieldSurvivesHugeWeights) {
  const Data data(32, 8, 2, 6);
  const std::vector<std::int32_t> node(32, 0);
  std::vector<double> weights(64);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = i % 2 == 0 ? 1e5 : -1e5;
  const FarAttention far = attend_far(2, data.tokens(), {node, {}, weights});
  for (const double x : far.attention.out) EXPECT_TRUE(std::isfinite(x));
  for (const double x : far.attention.lse) EXPECT_NEAR(x, 1e5 + std::log(16.0), 1e-9);
}

}  // namespace
}  // namespace icecache::reference::reference_test

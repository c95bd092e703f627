// The reference against cases with a known answer and against its own algebra.
#include "cpu/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace icecache::reference {
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

TEST(ReferenceTest, NodesOfOneTokenAreExactAttention) {
  // No variance: the expansion has no error, whatever mu is.
  const Data data(20, 8, 3, 4);
  std::vector<std::int32_t> node(20);
  std::vector<bool> picked(20), rest(20);
  for (int i = 0; i < 20; ++i) {
    node[i] = i;
    picked[i] = i % 3 == 0;
    rest[i] = !picked[i];
  }
  const std::vector<float> mu(8, 0.3f);
  const FarAttention far =
      attend_far(data.queries.data(), 3, data.tokens(), {node, picked, mu.data(), 0.0});
  expect_equal(far.attention, attend(data.queries.data(), 3, data.tokens(), rest), 1e-11);
  EXPECT_EQ(far.node_lse[0], -kInf) << "picked";
}

TEST(ReferenceTest, FarFieldIsExactAtMu) {
  // At q = mu both terms of the expansion vanish: weight and value are exact for any node.
  const Data data(64, 16, 1, 5);
  std::vector<std::int32_t> node(64);
  for (int i = 0; i < 64; ++i) node[i] = i / 16;
  std::vector<bool> picked(64), rest(64, true);
  for (const int i : {0, 5, 17, 40, 41}) {
    picked[i] = true;
    rest[i] = false;
  }
  const FarAttention far =
      attend_far(data.queries.data(), 1, data.tokens(), {node, picked, data.queries.data(), 0.0});
  expect_equal(far.attention, attend(data.queries.data(), 1, data.tokens(), rest), 1e-11);
}

TEST(ReferenceTest, SecondOrderTermIsHalfTheVarianceAndClamped) {
  // Two keys +a and -a in one dim, mu = 0: k~ = 0, var~ = a^2, log weight log 2 + min(1, (q a)^2 /
  // 2).
  const std::vector<float> keys = {2.0f, -2.0f}, values = {1.0f, 5.0f};
  const std::vector<std::int32_t> node = {0, 0};
  const float mu = 0.0f;
  for (const float q : {0.1f, 0.5f, 0.7f, 0.8f, 4.0f}) {
    const FarAttention far =
        attend_far(&q, 1, {keys.data(), values.data(), 2, 1}, {node, {}, &mu, 0.0});
    EXPECT_NEAR(far.node_lse[0], std::log(2.0) + std::min(1.0, 2.0 * q * static_cast<double>(q)),
                1e-12);
    EXPECT_NEAR(far.attention.out[0], 3.0, 1e-12);
  }
}

TEST(ReferenceTest, FarFieldSurvivesHugeNorms) {
  Data data(32, 8, 2, 6);
  for (float& k : data.keys) k *= 1e4f;
  const std::vector<std::int32_t> node(32, 0);
  const std::vector<float> mu(8, 1.0f);
  const FarAttention far =
      attend_far(data.queries.data(), 2, data.tokens(), {node, {}, mu.data(), 0.0});
  for (const double x : far.attention.out) EXPECT_TRUE(std::isfinite(x));
  for (const double x : far.attention.lse) EXPECT_TRUE(std::isfinite(x));
}

TEST(ReferenceTest, GuardLeavesOutWhatIsAlmostAllPicked) {
  // Weights exp(30) (picked) and exp(0): the rest holds 1e-13 of its node.
  const std::vector<float> keys = {30.0f, 0.0f}, values = {1.0f, 2.0f};
  const std::vector<std::int32_t> node = {0, 0};
  const float mu = 1.0f, q = 1.0f;
  const Tokens tokens{keys.data(), values.data(), 2, 1};
  const FarAttention open = attend_far(&q, 1, tokens, {node, {true, false}, &mu, 0.0});
  EXPECT_NEAR(open.attention.lse[0], 0.0, 1e-12);
  EXPECT_NEAR(open.attention.out[0], 2.0, 1e-12);
  const FarAttention guarded = attend_far(&q, 1, tokens, {node, {true, false}, &mu, 1e-10});
  EXPECT_EQ(guarded.attention.lse[0], -kInf);
}

}  // namespace
}  // namespace icecache::reference

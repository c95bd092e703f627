#include "simd/attention_state.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace icecache::attention_state_test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// An AttentionState with memory of its own.
struct Owned {
  Owned(int group, int dim)
      : out(static_cast<std::size_t>(group * dim)),
        max(static_cast<std::size_t>(group)),
        sum(static_cast<std::size_t>(group)),
        group(group),
        dim(dim) {
    view().clear();
  }
  AttentionState view() { return {out.data(), max.data(), sum.data(), group, dim}; }
  std::vector<float> finished() {
    std::vector<float> result(out.size(), kNan);
    finish(view(), result.data());
    return result;
  }
  std::vector<float> out, max, sum;
  int group, dim;
};

Owned random_state(std::mt19937& random, int group, int dim, float spread) {
  std::normal_distribution<float> normal;
  Owned state(group, dim);
  for (float& x : state.out) x = normal(random);
  for (float& x : state.max) x = spread * normal(random);
  for (float& x : state.sum) x = 1.0f + std::abs(normal(random));
  return state;
}

void expect_same(Owned& a, Owned& b, float tolerance) {
  const std::vector<float> x = a.finished(), y = b.finished();
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], y[i], tolerance) << i;
  for (int g = 0; g < a.group; ++g) EXPECT_NEAR(a.view().lse(g), b.view().lse(g), tolerance) << g;
}

TEST(AttentionStateTest, EmptyIsNeutralOnBothSidesAndItsOutIsNotRead) {
  std::mt19937 random(1);
  const Owned original = random_state(random, 3, 16, 5.0f);
  Owned state = original;
  Owned empty(3, 16);
  for (float& x : empty.out) x = kNan;
  merge(state.view(), empty.view());
  EXPECT_EQ(state.out, original.out);
  EXPECT_EQ(state.max, original.max);
  EXPECT_EQ(state.sum, original.sum);

  merge(empty.view(), state.view());
  EXPECT_EQ(empty.out, original.out);
  EXPECT_EQ(empty.max, original.max);
  EXPECT_EQ(empty.sum, original.sum);
}

TEST(AttentionStateTest, EmptyMergedWithEmptyFinishesToZeros) {
  Owned a(2, 8), b(2, 8);
  merge(a.view(), b.view());
  EXPECT_EQ(a.view().lse(0), -kInf);
  EXPECT_EQ(a.view().lse(1), -kInf);
  for (const float x : a.finished()) EXPECT_EQ(x, 0.0f);
}

TEST(AttentionStateTest, MergeIsAssociativeAndCommutative) {
  std::mt19937 random(2);
  for (const float spread : {0.1f, 3.0f, 60.0f}) {
    for (const int group : {1, 3, 4, 8, 16}) {
      Owned a = random_state(random, group, 24, spread);
      Owned b = random_state(random, group, 24, spread);
      Owned c = random_state(random, group, 24, spread);
      Owned left = a, right = b, reversed = c;
      merge(left.view(), b.view());  // (a b) c
      merge(left.view(), c.view());
      merge(right.view(), c.view());  // a (b c)
      Owned outer = a;
      merge(outer.view(), right.view());
      expect_same(left, outer, 2e-5f);
      merge(reversed.view(), b.view());  // (c b) a
      merge(reversed.view(), a.view());
      expect_same(left, reversed, 2e-5f);
    }
  }
}

TEST(AttentionStateTest, MergeOfDisjointSetsIsAttentionOverTheirUnion) {
  // Two tokens with logits 1 and 3, values 10 and 20, one per state.
  Owned a(1, 1), b(1, 1);
  a.out[0] = 10.0f;
  a.max[0] = 1.0f;
  a.sum[0] = 1.0f;
  b.out[0] = 20.0f;
  b.max[0] = 3.0f;
  b.sum[0] = 1.0f;
  merge(a.view(), b.view());
  const double p = std::exp(1.0) / (std::exp(1.0) + std::exp(3.0));
  EXPECT_NEAR(a.finished()[0], 10.0 * p + 20.0 * (1.0 - p), 1e-5);
  EXPECT_NEAR(a.view().lse(0), std::log(std::exp(1.0) + std::exp(3.0)), 1e-6);
}

TEST(AttentionStateTest, FarApartMaximaDoNotOverflow) {
  Owned a(1, 1), b(1, 1);
  a.out[0] = 5.0f;
  a.max[0] = 3e38f;
  a.sum[0] = 1.0f;
  b.out[0] = 7.0f;
  b.max[0] = -3e38f;
  b.sum[0] = 1.0f;
  merge(b.view(), a.view());
  EXPECT_EQ(b.finished()[0], 5.0f);
  EXPECT_EQ(b.max[0], 3e38f);
}

}  // namespace
}  // namespace icecache::attention_state_test

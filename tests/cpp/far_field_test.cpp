#include "index/far_field.h"

#include <gtest/gtest.h>

#include <bit>
#include <numeric>

#include "icecache/error.h"
#include "pool_fixture.h"

namespace icecache {
namespace {

using testing::clustered_tokens;
using testing::PoolFixture;
using testing::Tokens;

constexpr int kDim = 16, kPageSize = 8, kGroup = 2;

// Two nodes: pages 0 and 1, pages 2 and 3.
class FarFieldTest : public ::testing::Test {
 protected:
  void SetUp() override { fill(clustered_tokens(4 * kPageSize, kDim, DType::kFloat32, 5)); }

  void fill(Tokens tokens) {
    tokens_ = std::move(tokens);
    table_ = std::make_unique<PageTable>(pool_.context);
    std::vector<std::int32_t> order(tokens_.count());
    std::iota(order.begin(), order.end(), 0);
    const std::vector<std::int32_t> bounds{0, 8, 16, 24, 32};
    table_->add_pages(tokens_.block(0, tokens_.count(), 0), order, bounds);
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0.0f, 0.3f);
    mu_.resize(kDim);
    for (float& x : mu_) x = normal(random);
    queries_.resize(kGroup * kDim);
    for (int i = 0; i < kGroup * kDim; ++i) queries_[i] = mu_[i % kDim] + normal(random);
    far_.reset(mu_);
    for (int node = 0; node < 2; ++node) {
      far_.add_node();
      far_.assign(node, *table_, pages_of_node_[node]);
    }
  }

  struct Answer {
    std::vector<float> out, lse;
    std::vector<FarNodeInfo> nodes;
  };
  Answer ask(const std::vector<PagePick>& picks) {
    Answer answer;
    answer.out.resize(kGroup * kDim);
    std::vector<float> max(kGroup), sum(kGroup);
    const AttentionState state{answer.out.data(), max.data(), sum.data(), kGroup, kDim};
    state.clear();
    far_.merge_into({queries_.data(), kGroup, table_.get(), node_of_page_, pages_of_node_, picks},
                    state, &answer.nodes);
    for (int g = 0; g < kGroup; ++g) answer.lse.push_back(state.lse(g));
    finish(state, answer.out.data());
    return answer;
  }

  // The formula of the header over tokens that are not picked, in double.
  void expect_formula(const std::vector<PagePick>& picks, double tolerance) {
    const Answer answer = ask(picks);
    for (int g = 0; g < kGroup; ++g) {
      double total = 0.0;
      std::vector<double> out(kDim, 0.0);
      for (int node = 0; node < 2; ++node) {
        std::vector<int> members;
        for (const int page : pages_of_node_[node]) {
          std::uint32_t left = 0xff;
          for (const PagePick& pick : picks) {
            if (pick.local_page == page) left &= ~pick.slots;
          }
          for (; left != 0; left &= left - 1) {
            members.push_back(page * kPageSize + std::countr_zero(left));
          }
        }
        if (members.empty()) continue;
        double z = 0.0;
        std::vector<double> mean(kDim, 0.0), square(kDim, 0.0), value(kDim, 0.0);
        for (const int i : members) {
          double logit = 0.0;
          for (int j = 0; j < kDim; ++j) logit += double{mu_[j]} * tokens_.keys[i * kDim + j];
          const double w = std::exp(logit);
          z += w;
          for (int j = 0; j < kDim; ++j) {
            const double k = tokens_.keys[i * kDim + j];
            mean[j] += w * k;
            square[j] += w * k * k;
            value[j] += w * tokens_.values[i * kDim + j];
          }
        }
        double linear = 0.0, quadratic = 0.0;
        for (int j = 0; j < kDim; ++j) {
          const double dq = queries_[g * kDim + j] - mu_[j];
          linear += dq * mean[j] / z;
          quadratic += dq * dq * (square[j] / z - mean[j] * mean[j] / (z * z));
        }
        const double logit = std::log(z) + linear + std::min(1.0, quadratic / 2);
        EXPECT_NEAR(answer.nodes[node].weight[g], logit, tolerance);
        total += std::exp(logit);
        for (int j = 0; j < kDim; ++j) out[j] += std::exp(logit) * value[j] / z;
      }
      EXPECT_NEAR(answer.lse[g], std::log(total), tolerance);
      for (int j = 0; j < kDim; ++j) {
        EXPECT_NEAR(answer.out[g * kDim + j], out[j] / total, tolerance);
      }
    }
  }

  Tokens tokens_;
  PoolFixture pool_{16, kPageSize, kDim, kGroup};
  std::unique_ptr<PageTable> table_;
  std::vector<float> mu_, queries_;
  FarField far_{kDim};
  std::vector<int> node_of_page_{0, 0, 1, 1};
  std::vector<std::vector<int>> pages_of_node_{{0, 1}, {2, 3}};
};

TEST_F(FarFieldTest, NodesFollowTheFormula) {
  expect_formula({}, 1e-4);
}

TEST_F(FarFieldTest, PickedTokensAreTakenOut) {
  expect_formula({table_->pick(0, 0b0001'0010u)}, 1e-4);
  expect_formula({table_->pick(1, 0xffu), table_->pick(2, 0x0fu), table_->pick(3, 0x80u)}, 1e-4);
}

TEST_F(FarFieldTest, NearlyAllPickedIsStillExact) {
  expect_formula({table_->pick(0, 0xffu), table_->pick(1, 0x7fu)}, 1e-4);
}

TEST_F(FarFieldTest, ANodeThatIsPickedWholeDoesNotCount) {
  const Answer answer = ask({table_->pick(2, 0xffu), table_->pick(3, 0xffu)});
  for (int g = 0; g < kGroup; ++g) EXPECT_EQ(answer.lse[g], answer.nodes[0].weight[g]);
  const Answer nothing = ask({table_->pick(0, 0xffu), table_->pick(1, 0xffu),
                              table_->pick(2, 0xffu), table_->pick(3, 0xffu)});
  for (int g = 0; g < kGroup; ++g) EXPECT_EQ(nothing.lse[g], -INFINITY);
  for (const float x : nothing.out) EXPECT_EQ(x, 0.0f);
}

// Where all keys of a node are equal, and values too, there is nothing to approximate.
TEST_F(FarFieldTest, EqualTokensAreExact) {
  Tokens tokens = clustered_tokens(4 * kPageSize, kDim, DType::kFloat32, 6);
  for (std::size_t i = 0; i < tokens.keys.size(); ++i) {
    tokens.keys[i] = tokens.keys[i % kDim];
    tokens.values[i] = tokens.values[i % kDim];
  }
  tokens.encode();
  fill(std::move(tokens));
  const Answer answer = ask({});
  for (int g = 0; g < kGroup; ++g) {
    double logit = 0.0;
    for (int j = 0; j < kDim; ++j) logit += double{queries_[g * kDim + j]} * tokens_.keys[j];
    EXPECT_NEAR(answer.lse[g], logit + std::log(4.0 * kPageSize), 1e-4);
    for (int j = 0; j < kDim; ++j) EXPECT_NEAR(answer.out[g * kDim + j], tokens_.values[j], 1e-5);
  }
}

TEST_F(FarFieldTest, AddingOneByOneEqualsAssigning) {
  FarField grown(kDim);
  grown.reset(mu_);
  for (int node = 0; node < 2; ++node) {
    grown.add_node();
    for (const int page : pages_of_node_[node]) {
      for (int slot = 0; slot < kPageSize; ++slot) {
        const int i = page * kPageSize + slot;
        grown.add(node, tokens_.keys.data() + i * kDim, tokens_.values.data() + i * kDim);
      }
    }
    EXPECT_EQ(grown.tokens(node), 2 * kPageSize);
    grown.check_node(node, *table_, pages_of_node_[node]);
  }
}

TEST_F(FarFieldTest, ANodeThatDiffersFromItsMembersIsFound) {
  far_.add(0, tokens_.keys.data(), tokens_.values.data());
  EXPECT_THROW(far_.check_node(0, *table_, pages_of_node_[0]), IntegrityError);
  far_.assign(0, *table_, pages_of_node_[1]);
  EXPECT_THROW(far_.check_node(0, *table_, pages_of_node_[0]), IntegrityError);
}

TEST_F(FarFieldTest, HugeKeysGiveNoNaN) {
  Tokens tokens = clustered_tokens(4 * kPageSize, kDim, DType::kFloat32, 7);
  for (float& x : tokens.keys) x *= 1e15f;
  tokens.encode();
  fill(std::move(tokens));
  for (const auto& picks : {std::vector<PagePick>{}, std::vector{table_->pick(0, 0x11u)}}) {
    const Answer answer = ask(picks);
    for (const float x : answer.out) EXPECT_TRUE(std::isfinite(x));
  }
}

}  // namespace
}  // namespace icecache

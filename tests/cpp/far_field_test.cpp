#include "index/far_field.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "icecache/error.h"
#include "pool_fixture.h"

namespace icecache::far_field_test {
namespace {

using testing::clustered_tokens;
using testing::PoolFixture;
using testing::Tokens;

constexpr int kDim = 24, kPageSize = 8, kPages = 5, kTokens = 4 * kPageSize + 3;

// Two nodes: pages 0 and 1; pages 2, 3 and 4, which holds three tokens.
class FarFieldTest : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    fill(clustered_tokens(kTokens, kDim, GetParam(), 5));
    for (int node = 0; node < 2; ++node) {
      EXPECT_EQ(far_.add_node(), node);
      far_.assign(node, *table_, pages_of_node_[node]);
    }
  }

  void fill(Tokens tokens) {
    tokens_ = std::move(tokens);
    table_ = std::make_unique<PageTable>(pool_.context);
    std::vector<std::int32_t> order(kTokens);
    std::iota(order.begin(), order.end(), 0);
    const std::vector<std::int32_t> bounds{0, 8, 16, 24, 32, kTokens};
    table_->add_pages(tokens_.block(0, kTokens, 0), order, bounds);
  }

  const float* value(int token) const { return tokens_.values.data() + token * kDim; }

  std::vector<float> mean(const FarField& far, int node) const {
    const std::size_t row = kDim * size_of(GetParam());
    std::vector<float> mean(kDim);
    simd::kernels().to_float(far.means().data() + node * row, GetParam(), mean.data(), kDim);
    return mean;
  }
  static std::vector<std::byte> bytes(const FarField& far) {
    return {far.means().begin(), far.means().end()};
  }

  // A node against the mean, in double, over what the table holds of its pages.
  void expect_mean(const FarField& far, int node) {
    std::vector<double> sum(kDim, 0.0), size(kDim, 0.0);
    int count = 0;
    for (const int page : pages_of_node_[node]) {
      for (std::uint32_t slots = table_->mask(page); slots != 0; slots &= slots - 1, ++count) {
        const float* row = value(page * kPageSize + std::countr_zero(slots));
        for (int j = 0; j < kDim; ++j) {
          sum[j] += row[j];
          size[j] += std::abs(row[j]);
        }
      }
    }
    EXPECT_EQ(far.tokens(node), count);
    // Half a step of the dtype's mantissa, and of fp16's smallest numbers.
    const double rounding = GetParam() == DType::kFloat32    ? 0.0
                            : GetParam() == DType::kBFloat16 ? 0x1p-8
                                                             : 0x1p-11;
    const std::vector<float> held = mean(far, node);
    for (int j = 0; j < kDim; ++j) {
      const double exact = sum[j] / count;
      EXPECT_NEAR(held[j], exact, 1e-6 * size[j] / count + rounding * std::abs(exact) + 0x1p-25)
          << node << ", " << j;
    }
    far.check_node(node, *table_, pages_of_node_[node]);
  }

  Tokens tokens_;
  PoolFixture pool_{16, kPageSize, kDim, 1, GetParam()};
  std::unique_ptr<PageTable> table_;
  FarField far_{kDim, GetParam()};
  std::vector<std::vector<int>> pages_of_node_{{0, 1}, {2, 3, 4}};
};
INSTANTIATE_TEST_SUITE_P(DTypes, FarFieldTest,
                         ::testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST_P(FarFieldTest, ANodeIsTheMeanOfItsMembersValues) {
  EXPECT_EQ(far_.node_count(), 2);
  EXPECT_EQ(far_.means().size(), 2 * kDim * size_of(GetParam()));
  for (int node = 0; node < 2; ++node) expect_mean(far_, node);
}

TEST_P(FarFieldTest, AddingOneByOneEqualsAssigning) {
  FarField grown(kDim, GetParam());
  grown.add_node();
  grown.add_node();
  for (int token = 0; token < kTokens; ++token) grown.add(token < 16 ? 0 : 1, value(token));
  for (int node = 0; node < 2; ++node) expect_mean(grown, node);
  EXPECT_EQ(bytes(grown), bytes(far_)) << "in the same order: bitwise";
}

TEST_P(FarFieldTest, FreeSlotsDoNotCount) {
  table_->remove(0, 0b1001'0011u);
  table_->remove(3, 0xffu);
  pages_of_node_[1] = {2, 4};
  for (int node = 0; node < 2; ++node) {
    EXPECT_THROW(far_.check_node(node, *table_, pages_of_node_[node]), IntegrityError);
    far_.assign(node, *table_, pages_of_node_[node]);
    expect_mean(far_, node);
  }
}

TEST_P(FarFieldTest, AssigningReplacesWhatWasThere) {
  const std::vector<float> second = mean(far_, 1);
  std::swap(pages_of_node_[0], pages_of_node_[1]);
  far_.assign(0, *table_, pages_of_node_[0]);
  expect_mean(far_, 0);
  EXPECT_EQ(mean(far_, 0), second);
  EXPECT_EQ(mean(far_, 1), second) << "the other node is untouched";
  far_.assign(1, *table_, {});
  EXPECT_EQ(far_.tokens(1), 0);
  EXPECT_EQ(mean(far_, 1), std::vector<float>(kDim, 0.0f));
  far_.check_node(1, *table_, {});
}

TEST_P(FarFieldTest, ANewNodeIsEmptyAndLeavesTheOthers) {
  const std::vector<std::byte> before = bytes(far_);
  const std::size_t node_bytes =
      kDim * (sizeof(float) + size_of(GetParam())) + sizeof(std::int32_t);
  EXPECT_GE(far_.memory_bytes(), 2 * node_bytes);
  for (int node = 2; node < 40; ++node) EXPECT_EQ(far_.add_node(), node);
  EXPECT_GE(far_.memory_bytes(), 40 * node_bytes);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), far_.means().begin()));
  for (int node = 2; node < 40; ++node) {
    EXPECT_EQ(far_.tokens(node), 0);
    EXPECT_EQ(mean(far_, node), std::vector<float>(kDim, 0.0f));
    far_.check_node(node, *table_, {});
  }
}

TEST_P(FarFieldTest, ACopyIsIndependent) {
  FarField copy = far_;
  copy.add(0, value(0));
  expect_mean(far_, 0);
  EXPECT_EQ(copy.tokens(0), far_.tokens(0) + 1);
}

TEST_P(FarFieldTest, ANodeThatDiffersFromItsMembersIsFound) {
  far_.add(0, value(0));
  EXPECT_THROW(far_.check_node(0, *table_, pages_of_node_[0]), IntegrityError) << "one too many";
  far_.assign(0, *table_, std::vector{0});
  EXPECT_THROW(far_.check_node(0, *table_, pages_of_node_[0]), IntegrityError) << "too few";
  far_.assign(0, *table_, std::vector{2, 3});
  EXPECT_THROW(far_.check_node(0, *table_, pages_of_node_[0]), IntegrityError)
      << "as many, but others";
}

// One value off by 1 % in one dimension; one that is not a number.
TEST_P(FarFieldTest, OneWrongDimensionIsFound) {
  for (const bool nan : {false, true}) {
    FarField spoilt(kDim, GetParam());
    spoilt.add_node();
    for (int token = 0; token < 16; ++token) {
      std::vector<float> row(value(token), value(token) + kDim);
      if (token == 7)
        row[kDim - 1] = nan ? std::numeric_limits<float>::quiet_NaN() : 1.01f * row[kDim - 1];
      spoilt.add(0, row.data());
    }
    EXPECT_THROW(spoilt.check_node(0, *table_, pages_of_node_[0]), IntegrityError) << nan;
  }
}

// Rounding alone is no difference, whatever the sizes are.
TEST_P(FarFieldTest, RoundingIsAccepted) {
  for (const float size : {1e-4f, 1.0f, 1e4f}) {
    Tokens tokens = clustered_tokens(kTokens, kDim, GetParam(), 6);
    for (std::size_t i = 0; i < tokens.values.size(); ++i) {
      tokens.values[i] *= i / kDim % 2 == 0 ? size : -size;
    }
    tokens.encode();
    fill(std::move(tokens));
    FarField backwards(kDim, GetParam());
    backwards.add_node();
    for (int token = 16; token-- > 0;) backwards.add(0, value(token));
    backwards.check_node(0, *table_, pages_of_node_[0]);
  }
}

}  // namespace
}  // namespace icecache::far_field_test

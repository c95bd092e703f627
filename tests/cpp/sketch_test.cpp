#include "index/sketch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace icecache {
namespace {

struct Form {
  int rank, bits, page_size;
};

class SketchForms : public ::testing::TestWithParam<Form> {
 protected:
  static constexpr int kPages = 5, kDim = 64, kGroup = 3;

  SketchForms() : random_(11) {
    metric_.head_dim = kDim;
    metric_.rank = GetParam().rank;
    metric_.mean = normal(kDim);
    metric_.from_key = normal(kDim * GetParam().rank);
    metric_.from_query = normal(kDim * GetParam().rank);
    queries_ = normal(kGroup * kDim);
    coordinates_ = normal(kPages * GetParam().page_size * GetParam().rank);
  }
  std::vector<float> normal(int n) {
    std::normal_distribution<float> distribution;
    std::vector<float> x(n);
    for (float& value : x) value = distribution(random_);
    return x;
  }
  // The score of coordinates y for query g, with every coordinate off by at most `slack` steps:
  // the exact score and how far the quantised one may be from it.
  std::pair<double, double> exact(int g, const float* y, double slack) const {
    double score = 0.0, reach = 0.0;
    const float* q = queries_.data() + g * kDim;
    for (int i = 0; i < kDim; ++i) score += static_cast<double>(q[i]) * metric_.mean[i];
    for (int j = 0; j < metric_.rank; ++j) {
      double projected = 0.0;
      for (int i = 0; i < kDim; ++i)
        projected += static_cast<double>(q[i]) * metric_.from_query[i * metric_.rank + j];
      score += projected * y[j];
      reach += std::abs(projected) * slack * step_[j];
    }
    return {score, reach};
  }
  void measure_steps() {
    const int rank = GetParam().rank;
    const std::size_t rows = coordinates_.size() / rank;
    for (int j = 0; j < rank; ++j) {
      float low = INFINITY, high = -INFINITY;
      for (std::size_t n = 0; n < rows; ++n) {
        low = std::min(low, coordinates_[n * rank + j]);
        high = std::max(high, coordinates_[n * rank + j]);
      }
      step_.push_back((high - low) / static_cast<float>((1 << GetParam().bits) - 1));
    }
  }

  std::mt19937 random_;
  QueryMetric metric_;
  std::vector<float> queries_, coordinates_, step_;
};

TEST_P(SketchForms, ScoresAreWithinHalfAStepPerDirection) {
  const auto [rank, bits, page_size] = GetParam();
  measure_steps();
  Sketch sketch(rank, bits, page_size);
  sketch.fit(coordinates_.data(), kPages * page_size);
  sketch.resize(kPages);
  for (int p = 0; p < kPages; ++p) {
    for (int s = 0; s < page_size; ++s)
      sketch.write(p, s, coordinates_.data() + (p * page_size + s) * rank);
  }
  const int slots = kPages * page_size;
  std::vector<float> scores(kGroup * slots);
  const std::int64_t bytes =
      sketch.scan(metric_, queries_.data(), kGroup, kPages, scores.data(), slots);
  EXPECT_EQ(bytes, slots * rank * bits / 8);
  for (int g = 0; g < kGroup; ++g) {
    double largest_reach = 0.0;
    for (int i = 0; i < slots; ++i) {
      // The scan's query is quantised too on some levels: allow for it beside the half step.
      const auto [score, reach] = exact(g, coordinates_.data() + i * rank, 0.5);
      largest_reach = std::max(largest_reach, reach);
      EXPECT_NEAR(scores[g * slots + i], score,
                  reach + 0.02 * std::abs(reach) + 0.05 * largest_reach + 1e-3)
          << "head " << g << ", slot " << i;
    }
  }
}

TEST_P(SketchForms, CopyMovesOneSlotAndClampsOutliers) {
  const auto [rank, bits, page_size] = GetParam();
  Sketch sketch(rank, bits, page_size);
  sketch.fit(coordinates_.data(), kPages * page_size);
  sketch.resize(2);
  for (int s = 0; s < page_size; ++s) sketch.write(0, s, coordinates_.data() + s * rank);
  sketch.copy(1, page_size - 1, 0, 2);
  std::vector<float> huge(rank, 1e30f), tiny(rank, -1e30f);
  sketch.write(1, 0, huge.data());
  sketch.write(1, 1, tiny.data());
  std::vector<float> scores(kGroup * 2 * page_size);
  sketch.scan(metric_, queries_.data(), kGroup, 2, scores.data(), 2 * page_size);
  for (int g = 0; g < kGroup; ++g) {
    const float* row = scores.data() + g * 2 * page_size;
    EXPECT_EQ(row[2 * page_size - 1], row[2]);
    EXPECT_TRUE(std::isfinite(row[page_size]));
    EXPECT_TRUE(std::isfinite(row[page_size + 1]));
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, SketchForms,
                         ::testing::Values(Form{32, 4, 16}, Form{8, 4, 8}, Form{64, 4, 32},
                                           Form{32, 8, 16}, Form{16, 8, 32}, Form{40, 4, 16}),
                         [](const auto& info) {
                           return "rank" + std::to_string(info.param.rank) + "_bits" +
                                  std::to_string(info.param.bits) + "_page" +
                                  std::to_string(info.param.page_size);
                         });

TEST(Sketch, ConstantCoordinatesStayFinite) {
  QueryMetric metric;
  metric.head_dim = metric.rank = 8;
  metric.mean.assign(8, 1.0f);
  metric.from_key.assign(64, 0.1f);
  metric.from_query.assign(64, 0.1f);
  const std::vector<float> same(16 * 8, 2.5f), query(8, 1.0f);
  Sketch sketch(8, 4, 16);
  sketch.fit(same.data(), 16);
  sketch.resize(1);
  for (int s = 0; s < 16; ++s) sketch.write(0, s, same.data() + s * 8);
  std::vector<float> scores(16);
  sketch.scan(metric, query.data(), 1, 1, scores.data(), 16);
  for (float x : scores) EXPECT_NEAR(x, 8.0f + 8 * 0.8f * 2.5f, 1e-3f);
}

}  // namespace
}  // namespace icecache

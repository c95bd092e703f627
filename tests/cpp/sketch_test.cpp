#include "index/sketch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "simd/kernels.h"

namespace icecache::sketch_test {
namespace {

struct Form {
  int rank, bits, page_size;
};

// A scan of one sketch alone.
std::int64_t scan(const Sketch& sketch, const QueryMetric& metric, const float* queries, int group,
                  const std::vector<std::uint32_t>& masks, SketchScores& scores) {
  Sketch::Query query;
  sketch.prepare(metric, queries, group, query);
  scores.resize(group, sketch.page_size(), std::vector{static_cast<int>(masks.size())},
                query.octave);
  return sketch.scan(query, masks, 0, 0.0f, scores);
}

class SketchForms : public ::testing::TestWithParam<Form> {
 protected:
  static constexpr int kPages = 5, kDim = 64, kGroup = 5;

  SketchForms() : random_(11) {
    metric_.head_dim = kDim;
    metric_.rank = GetParam().rank;
    metric_.mean = normal(kDim);
    metric_.from_key = normal(kDim * GetParam().rank);
    metric_.from_query = normal(kDim * GetParam().rank);
    queries_ = normal(kGroup * kDim);
    coordinates_ = normal(kPages * GetParam().page_size * GetParam().rank);
    full_ = GetParam().page_size == 32 ? ~0u : (1u << GetParam().page_size) - 1u;
    measure_steps();
  }
  std::vector<float> normal(int n) {
    std::normal_distribution<float> distribution;
    std::vector<float> x(n);
    for (float& value : x) value = distribution(random_);
    return x;
  }
  const float* coordinates(int page, int slot) const {
    return coordinates_.data() + (page * GetParam().page_size + slot) * metric_.rank;
  }
  double projected(int g, int j) const {
    double sum = 0.0;
    for (int i = 0; i < kDim; ++i) {
      sum += double{queries_[g * kDim + i]} * metric_.from_query[i * metric_.rank + j];
    }
    return sum;
  }
  void measure_steps() {
    const int rank = metric_.rank;
    const std::size_t rows = coordinates_.size() / rank;
    for (int j = 0; j < rank; ++j) {
      float low = INFINITY, high = -INFINITY;
      for (std::size_t n = 0; n < rows; ++n) {
        low = std::min(low, coordinates_[n * rank + j]);
        high = std::max(high, coordinates_[n * rank + j]);
      }
      step_.push_back((high - low) / static_cast<float>((1 << GetParam().bits) - 1));
      for (int g = 0; g < kGroup; ++g) {
        query_step_ = std::max(query_step_, std::abs(projected(g, j)) * step_[j] / 127.0);
      }
    }
    // A power of two of the unit.
    const double octaves = std::ceil(std::log2(query_step_ / simd::kScoreUnit));
    query_step_ = simd::kScoreUnit * std::exp2(octaves);
  }
  // q.k of coordinates y for query g, and how far a score may be from it: half a step of the codes
  // and, on the scale that the group shares, half a step of the query.
  struct Exact {
    double score = 0.0, of_codes = 0.0, of_query = 0.0;
  };
  Exact exact(int g, const float* y) const {
    Exact result;
    const float* q = queries_.data() + g * kDim;
    for (int i = 0; i < kDim; ++i) result.score += double{q[i]} * metric_.mean[i];
    for (int j = 0; j < metric_.rank; ++j) {
      const double p = projected(g, j);
      result.score += p * y[j];
      result.of_codes += 0.5 * std::abs(p) * step_[j];
      result.of_query += 0.5 * query_step_ * (std::abs(y[j]) / step_[j] + 0.5);
    }
    return result;
  }
  Sketch filled() const {
    const auto [rank, bits, page_size] = GetParam();
    Sketch sketch(rank, bits, page_size);
    sketch.fit(coordinates_.data(), kPages * page_size, rank);
    sketch.resize(kPages);
    for (int p = 0; p < kPages; ++p) {
      for (int s = 0; s < page_size; ++s) sketch.write(p, s, coordinates(p, s));
    }
    return sketch;
  }

  std::mt19937 random_;
  QueryMetric metric_;
  std::vector<float> queries_, coordinates_, step_;
  double query_step_ = 0.0;
  std::uint32_t full_ = 0;
};

TEST_P(SketchForms, ScoresAreWithinHalfAStepOfCodesAndQuery) {
  const auto [rank, bits, page_size] = GetParam();
  const std::vector<std::uint32_t> masks(kPages, full_);
  SketchScores scores;
  const std::int64_t bytes = scan(filled(), metric_, queries_.data(), kGroup, masks, scores);
  const int slots = kPages * page_size;
  EXPECT_EQ(bytes, slots * rank * bits / 8);
  EXPECT_EQ(scores.group(), kGroup);
  ASSERT_GE(scores.stride(), slots);
  for (int g = 0; g < kGroup; ++g) {
    double square = 0.0, allowed = 0.0, mean = 0.0, largest = -INFINITY;
    for (int i = 0; i < slots; ++i) {
      const Exact want = exact(g, coordinates(i / page_size, i % page_size));
      const double score =
          scores.bias(0)[g] + double{scores.unit()} * scores.scores(0)[g * scores.stride() + i];
      // A unit: what shifting cuts off, which is half of that at most once it is centred.
      ASSERT_NEAR(score, want.score, want.of_codes + want.of_query + 0.5 * scores.unit() + 1e-3)
          << "head " << g << ", slot " << i;
      square += std::pow(score - want.score, 2) / slots;
      allowed += std::pow(want.of_codes + want.of_query, 2) / slots;
      mean += (score - want.score) / slots;
      largest = std::max(largest, score);
    }
    // Errors of the directions are independent: they nearly cancel.
    EXPECT_LT(std::sqrt(square), 0.4 * std::sqrt(allowed) + 0.5 * scores.unit()) << "head " << g;
    EXPECT_LT(std::abs(mean), 4.0 * std::sqrt(square / slots) + 0.25 * std::sqrt(square))
        << "head " << g;
    EXPECT_NEAR(scores.log_max(g), largest, 1e-3) << "head " << g;
  }
}

TEST_P(SketchForms, FreeSlotsHaveNoScore) {
  const int page_size = GetParam().page_size;
  const Sketch sketch = filled();
  const std::vector<std::uint32_t> all(kPages, full_);
  std::vector<std::uint32_t> masks{full_ & 0x5a5a5a5au, 0u, full_, 1u, full_ & ~1u};
  SketchScores everything, scores;
  scan(sketch, metric_, queries_.data(), kGroup, all, everything);
  scan(sketch, metric_, queries_.data(), kGroup, masks, scores);
  ASSERT_EQ(scores.stride(), everything.stride());
  EXPECT_EQ(scores.unit(), everything.unit());
  for (int g = 0; g < kGroup; ++g) {
    EXPECT_EQ(scores.bias(0)[g], everything.bias(0)[g]);
    std::int16_t best = simd::kNoScore;
    for (std::int64_t i = 0; i < kPages * page_size; ++i) {
      const bool used = (masks[i / page_size] >> i % page_size & 1u) != 0;
      const std::int64_t at = g * scores.stride() + i;
      ASSERT_EQ(scores.scores(0)[at], used ? everything.scores(0)[at] : simd::kNoScore) << i;
      best = std::max(best, scores.scores(0)[at]);
    }
    EXPECT_EQ(scores.max(0)[g], best);
  }
}

TEST_P(SketchForms, ScoresStayBelowTheLargest) {
  std::vector<float> huge = queries_;
  for (float& q : huge) q *= 1e6f;
  const std::vector<std::uint32_t> masks(kPages, full_);
  for (const float* queries : {queries_.data(), huge.data()}) {
    SketchScores scores;
    scan(filled(), metric_, queries, kGroup, masks, scores);
    for (int g = 0; g < kGroup; ++g) {
      for (int i = 0; i < kPages * GetParam().page_size; ++i) {
        const std::int16_t score = scores.scores(0)[g * scores.stride() + i];
        ASSERT_GE(score, 0);
        ASSERT_LE(score, simd::kMaxScore);
      }
    }
  }
}

TEST_P(SketchForms, CopyMovesOneSlotAndClampsOutliers) {
  const auto [rank, bits, page_size] = GetParam();
  Sketch sketch(rank, bits, page_size);
  sketch.fit(coordinates_.data(), kPages * page_size, rank);
  sketch.resize(2);
  for (int s = 0; s < page_size; ++s) sketch.write(0, s, coordinates(0, s));
  sketch.copy(1, page_size - 1, 0, 2);
  std::vector<float> huge(rank, 1e30f), tiny(rank, -1e30f), high(rank), low(rank);
  for (int j = 0; j < rank; ++j) {
    high[j] = low[j] = coordinates_[j];
    for (std::size_t i = j; i < coordinates_.size(); i += rank) {
      high[j] = std::max(high[j], coordinates_[i]);
      low[j] = std::min(low[j], coordinates_[i]);
    }
  }
  sketch.write(1, 0, huge.data());
  sketch.write(1, 1, tiny.data());
  sketch.write(1, 2, high.data());
  sketch.write(1, 3, low.data());
  SketchScores scores;
  scan(sketch, metric_, queries_.data(), kGroup, std::vector{full_, full_}, scores);
  for (int g = 0; g < kGroup; ++g) {
    const std::int16_t* row = scores.scores(0) + g * scores.stride();
    EXPECT_EQ(row[2 * page_size - 1], row[2]);
    EXPECT_EQ(row[page_size], row[page_size + 2]) << "clamped to the highest";
    EXPECT_EQ(row[page_size + 1], row[page_size + 3]) << "clamped to the lowest";
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, SketchForms,
                         ::testing::Values(Form{32, 4, 16}, Form{8, 4, 8}, Form{64, 4, 32},
                                           Form{32, 8, 16}, Form{16, 8, 32}, Form{40, 4, 16},
                                           Form{128, 8, 32}, Form{256, 4, 8}),
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
  sketch.fit(same.data(), 16, 8);
  sketch.resize(1);
  for (int s = 0; s < 16; ++s) sketch.write(0, s, same.data() + s * 8);
  SketchScores scores;
  scan(sketch, metric, query.data(), 1, std::vector{0xffffu}, scores);
  for (int i = 0; i < 16; ++i) {
    EXPECT_NEAR(scores.bias(0)[0] + scores.unit() * scores.scores(0)[i], 8.0f + 8 * 0.8f * 2.5f,
                1e-3f);
  }
}

TEST(Sketch, QueriesOfZeroScoreNothing) {
  QueryMetric metric;
  metric.head_dim = metric.rank = 8;
  metric.mean.assign(8, 1.0f);
  metric.from_key.assign(64, 0.1f);
  metric.from_query.assign(64, 0.1f);
  std::vector<float> coordinates(16 * 8);
  for (std::size_t i = 0; i < coordinates.size(); ++i) coordinates[i] = static_cast<float>(i % 11);
  const std::vector<float> zeros(2 * 8, 0.0f);
  Sketch sketch(8, 4, 16);
  sketch.fit(coordinates.data(), 16, 8);
  sketch.resize(1);
  for (int s = 0; s < 16; ++s) sketch.write(0, s, coordinates.data() + s * 8);
  SketchScores scores;
  scan(sketch, metric, zeros.data(), 2, std::vector{0xffffu}, scores);
  for (int g = 0; g < 2; ++g) {
    for (int i = 0; i < 16; ++i) {
      EXPECT_NEAR(scores.bias(0)[g] + scores.unit() * scores.scores(0)[g * scores.stride() + i],
                  0.0f, 1e-6f);
    }
  }
}

// A weight is an approximation that depends on what it is relative to, and a long scan learns the
// largest score as it goes: what is left of a page must be what its other tokens weigh, not what
// the page weighed less what those taken out weigh.
TEST(Sketch, WhatIsLeftOfAPageIsWhatItsOtherTokensWeigh) {
  constexpr int kPages = 300, kRank = 32, kPageSize = 16;
  QueryMetric metric;
  metric.head_dim = metric.rank = kRank;
  metric.mean.assign(kRank, 0.0f);
  metric.from_key.assign(kRank * kRank, 0.0f);
  for (int j = 0; j < kRank; ++j) metric.from_key[j * kRank + j] = 1.0f;
  metric.from_query = metric.from_key;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> coordinates(kPages * kPageSize * kRank), query(2 * kRank);
  for (float& x : query) x = 0.5f * normal(random);
  for (int token = 0; token < kPages * kPageSize; ++token) {
    // Later tokens score higher, and the first of a page highest.
    const float along = 0.002f * static_cast<float>(token) + (token % kPageSize == 0 ? 4.0f : 0.0f);
    for (int j = 0; j < kRank; ++j) {
      coordinates[token * kRank + j] = 0.3f * normal(random) + along * query[j] / kRank;
    }
  }
  Sketch sketch(kRank, 4, kPageSize);
  sketch.fit(coordinates.data(), kPages * kPageSize, kRank);
  sketch.resize(kPages);
  for (int token = 0; token < kPages * kPageSize; ++token) {
    sketch.write(token / kPageSize, token % kPageSize, coordinates.data() + token * kRank);
  }
  SketchScores scores;
  scan(sketch, metric, query.data(), 2, std::vector<std::uint32_t>(kPages, 0xffffu), scores);
  std::vector<std::int32_t> best(kPages);
  for (int page = 0; page < kPages; ++page) best[page] = page * kPageSize;
  scores.exclude(best);
  for (int g = 0; g < 2; ++g) {
    const std::int16_t* of_head = scores.scores(0) + g * scores.stride();
    for (int page = 0; page < kPages; ++page) {
      double exact = 0.0;
      for (int slot = 1; slot < kPageSize; ++slot) {
        exact +=
            std::exp(double{scores.unit()} * (of_head[page * kPageSize + slot] - scores.max(0)[g]));
      }
      EXPECT_LE(scores.page_mass(0, page)[g], 1.022 * exact) << page;
      EXPECT_GE(scores.page_mass(0, page)[g], 0.958 * exact) << page;
    }
  }
}

}  // namespace
}  // namespace icecache::sketch_test

// score_mass against sums of powers in double; score_rank, scale_columns and round_rows against
// their definitions.
#include <algorithm>
#include <cmath>

#include "simd/kernels.h"
#include "simd_levels.h"

namespace icecache::simd::simd_score_test {
namespace {

// What kernels.h promises of a term, with rounding.
constexpr double kMost = 1.0215, kLeast = 1.0 - 0.0415;

class SimdScoreTest : public SimdLevel {
 protected:
  // Scores of pages with free slots, from a normal distribution; some pages and heads hold no
  // token. Slots behind the last page hold none either.
  void make(int group, int page_size, std::int64_t pages, float spread) {
    group_ = group;
    page_size_ = page_size;
    slots_ = (pages * page_size + kScoreSlots - 1) / kScoreSlots * kScoreSlots;
    pages_ = slots_ / page_size;
    stride_ = slots_ + 3;
    scores_.assign(static_cast<std::size_t>(group * stride_), kMaxScore);
    max_.assign(group, kNoScore);
    std::normal_distribution<float> normal(7000.0f, spread);
    for (int g = 0; g < group; ++g) {
      for (std::int64_t i = 0; i < slots_; ++i) {
        std::int16_t& score = scores_[g * stride_ + i];
        const std::int64_t page = i / page_size;
        if (page >= pages || g == 13 || page % 7 == 5 || (page % 2 == 1 && i % 3 == 0)) {
          score = kNoScore;
          continue;
        }
        score = static_cast<std::int16_t>(std::clamp(normal(random_), 0.0f, float{kMaxScore}));
        max_[g] = std::max(max_[g], score);
      }
    }
  }

  std::vector<float> mass(int coarse) const {
    const std::size_t size = static_cast<std::size_t>(pages_) * mass_stride(group_);
    std::vector<float> mass(size + 4, 77.0f);
    k().score_mass(
        {scores_.data(), max_.data(), mass.data(), stride_, slots_, coarse, group_, page_size_});
    for (int i = 0; i < 4; ++i) EXPECT_EQ(mass[size + i], 77.0f) << "wrote past the end";
    mass.resize(size);
    return mass;
  }

  static double weight(int score, int max, int coarse) {
    return std::exp2(std::ldexp(1.0 / 128.0, coarse) * (score - max));
  }
  double exact_mass(std::int64_t page, int g, int coarse) const {
    double sum = 0.0;
    for (int s = 0; s < page_size_; ++s) {
      const std::int16_t score = scores_[g * stride_ + page * page_size_ + s];
      if (score != kNoScore) sum += weight(score, max_[g], coarse);
    }
    return sum;
  }

  void check(int coarse) {
    const std::vector<float> got = mass(coarse);
    const int columns = mass_stride(group_);
    for (std::int64_t p = 0; p < pages_; ++p) {
      for (int g = 0; g < columns; ++g) {
        const float found = got[p * columns + g];
        const double exact = g < group_ ? exact_mass(p, g, coarse) : 0.0;
        // Below the smallest normal float a term is what the bits of a denormal make of it.
        ASSERT_LE(found, kMost * exact + 1e-36) << where(coarse, p, g);
        ASSERT_GE(found, kLeast * exact - 1e-36) << where(coarse, p, g);
        if (exact == 0.0) {
          ASSERT_EQ(found, 0.0f) << where(coarse, p, g);
        }
      }
    }
  }

  ::testing::Message where(int coarse, std::int64_t page, int g) const {
    return ::testing::Message() << "coarse " << coarse << ", G " << group_ << ", S " << page_size_
                                << ", P " << pages_ << ", page " << page << ", query " << g;
  }

  int group_ = 0, page_size_ = 0;
  std::int64_t pages_ = 0, slots_ = 0, stride_ = 0;
  std::vector<std::int16_t> scores_, max_;
};
INSTANTIATE_TEST_SUITE_P(Levels, SimdScoreTest, all_levels(), level_name);

TEST_P(SimdScoreTest, MassIsWithinItsBoundsOfTheExponentials) {
  for (const int group : all_groups()) {
    for (const int page_size : {8, 16, 32}) {
      for (const std::int64_t pages : {0, 1, 2, 3, 65}) {
        for (const int coarse : {0, 1, 4, kMaxCoarse}) {
          make(group, page_size, pages, 500.0f);
          check(coarse);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(SimdScoreTest, TheMeanOfManyTermsIsWithinAPerMille) {
  for (const int coarse : {0, 1, 2}) {
    for (const int page_size : {8, 32}) {
      make(4, page_size, 2000, 900.0f);
      const std::vector<float> got = mass(coarse);
      for (int g = 0; g < 4; ++g) {
        // Term by term, so that no large one hides the others.
        double sum = 0.0, count = 0.0;
        for (std::int64_t p = 0; p < pages_; ++p) {
          const double exact = exact_mass(p, g, coarse);
          if (exact < 1e-30) continue;
          sum += got[p * 4 + g] / exact;
          ++count;
        }
        EXPECT_NEAR(sum / count, 1.0, 1e-3 + 2.0 / std::sqrt(count) * 0.018)
            << where(coarse, 0, g) << " over " << count;
      }
    }
  }
}

// One score a page, so that each term is seen: every fraction of an octave.
TEST_P(SimdScoreTest, EveryTermIsWithinItsBounds) {
  make(1, 8, 4000, 0.0f);
  std::fill(scores_.begin(), scores_.end(), kNoScore);
  max_[0] = 5000;
  for (int p = 0; p < 4000; ++p) scores_[p * 8 + p % 8] = static_cast<std::int16_t>(5000 - p);
  const std::vector<float> got = mass(0);
  double least = 2.0, most = 0.0, mean = 0.0;
  for (int p = 0; p < 4000; ++p) {
    const double ratio = got[p * 4] / weight(-p, 0, 0);
    least = std::min(least, ratio);
    most = std::max(most, ratio);
    mean += ratio / 4000;
  }
  EXPECT_GE(least, kLeast);
  EXPECT_LE(most, kMost);
  EXPECT_NEAR(mean, 1.0, 2e-3);
}

// Whatever the unit, a weight is finite, the largest score weighs about 1, and one that is a
// hundred octaves below or more weighs nothing.
TEST_P(SimdScoreTest, AnyUnitIsFine) {
  for (const std::int16_t top : {kMaxScore, std::int16_t{1}}) {
    for (int coarse = 0; coarse <= kMaxCoarse; ++coarse) {
      make(1, 8, 4, 0.0f);
      std::fill(scores_.begin(), scores_.end(), kNoScore);
      max_[0] = scores_[3] = top;
      scores_[8] = scores_[9] = static_cast<std::int16_t>(top - 1);
      scores_[16] = 0;
      const std::vector<float> got = mass(coarse);
      ASSERT_GE(got[0], kLeast) << coarse << " at " << top;
      ASSERT_LE(got[0], kMost) << coarse << " at " << top;
      for (const int page : {1, 2}) {
        const double exact = exact_mass(page, 0, coarse);
        ASSERT_GE(got[4 * page], kLeast * exact - 1e-36) << coarse << " at " << top;
        ASSERT_LE(got[4 * page], kMost * exact + 1e-36) << coarse << " at " << top;
      }
      ASSERT_EQ(got[12], 0.0f) << coarse << " at " << top;
    }
  }
}

TEST_P(SimdScoreTest, Rank) {
  for (const int group : all_groups()) {
    for (const std::int64_t slots : {0, 16, 32, 240, 256, 272, 512, 1040}) {
      const std::int64_t stride = slots + 7;
      std::vector<std::int16_t> scores(static_cast<std::size_t>(group * stride)), offset(group);
      const auto from = [&](int least) {
        return static_cast<std::int16_t>(least +
                                         static_cast<int>(random_() % (kMaxScore - least + 1)));
      };
      for (std::int16_t& x : scores) x = random_() % 5 == 0 ? kNoScore : from(0);
      for (std::int16_t& x : offset) x = from(-kMaxScore);
      // Both ends of the range at once.
      offset[0] = kMaxScore;
      if (group > 1) offset[1] = -kMaxScore;
      if (slots > 0) scores[0] = kNoScore;
      if (slots > 0 && group > 1) scores[stride] = kMaxScore;
      const std::size_t maxima = (slots + kRankBlock - 1) / kRankBlock * kRankLanes;
      std::vector<std::int16_t> rank(slots + 1, 12345), block_max(maxima + 1, 12345);
      k().score_rank(
          {scores.data(), offset.data(), rank.data(), block_max.data(), stride, slots, group});
      std::vector<std::int16_t> expected(maxima, INT16_MIN);
      for (std::int64_t i = 0; i < slots; ++i) {
        int best = INT_MIN;
        for (int g = 0; g < group; ++g) best = std::max(best, scores[g * stride + i] - offset[g]);
        ASSERT_EQ(rank[i], best) << "G " << group << ", slot " << i << " of " << slots;
        std::int16_t& max = expected[i / kRankBlock * kRankLanes + i % kRankLanes];
        max = std::max(max, rank[i]);
      }
      for (std::size_t b = 0; b < maxima; ++b) {
        ASSERT_EQ(block_max[b], expected[b]) << "G " << group << ", maximum " << b << ", " << slots;
      }
      ASSERT_EQ(rank[slots], 12345) << "wrote past the end";
      ASSERT_EQ(block_max[maxima], 12345) << "wrote past the end";

      // Of other rows, beside those ranks.
      const std::vector<std::int16_t> before = rank;
      for (std::int16_t& x : offset) x = from(0);
      for (const std::int16_t higher : {std::int16_t(-kMaxScore), std::int16_t{77}, kMaxScore}) {
        rank = before;
        k().score_rank({scores.data(), offset.data(), rank.data(), block_max.data(), stride, slots,
                        group, true, higher});
        expected.assign(maxima, INT16_MIN);
        for (std::int64_t i = 0; i < slots; ++i) {
          int best = INT_MIN;
          for (int g = 0; g < group; ++g) best = std::max(best, scores[g * stride + i] - offset[g]);
          best = best > kNoScore ? std::min<int>(best + higher, kMaxScore) : kNoScore;
          best = std::max<int>(best, before[i]);
          ASSERT_EQ(rank[i], best) << "G " << group << ", slot " << i << ", higher " << higher;
          std::int16_t& max = expected[i / kRankBlock * kRankLanes + i % kRankLanes];
          max = std::max(max, rank[i]);
        }
        expected.push_back(12345);
        ASSERT_EQ(block_max, expected) << "G " << group << ", " << slots << ", higher " << higher;
      }
    }
  }
}

TEST_P(SimdScoreTest, RoundsRows) {
  for (const int dims : {8, 16, 24, 32, 40, 64, kMaxSketchRank}) {
    for (const std::int64_t n : {0, 1, 2, 5, 16}) {
      std::vector<float> rows = normal(static_cast<std::size_t>(n * dims)), expected = rows;
      const std::vector<float> factors = normal(dims), mean = normal(dims), zero = normal(dims);
      float largest = 0.0f;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        expected[i] *= factors[i % dims];
        largest = std::max(largest, std::abs(expected[i]));
      }
      rows.push_back(5.0f);
      ASSERT_EQ(k().scale_columns(rows.data(), factors.data(), n, dims), largest);
      for (std::size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(rows[i], expected[i]);

      // Ties, and both ends of the range.
      const float scale = n == 5 ? 0.25f : std::max(largest, 1.0f) / 127.0f;
      for (std::int64_t i = 0; i < n; ++i) {
        rows[i * dims] = scale * 127.0f;
        rows[i * dims + 1] = -scale * 127.0f;
        rows[i * dims + 2] = scale * 2.5f;
        rows[i * dims + 3] = -scale * 1.5f;
        if (n == 5) {
          for (int j = 4; j < dims; ++j) rows[i * dims + j] = 0.0f;
        }
      }
      std::vector<std::int8_t> rounded(static_cast<std::size_t>(n * dims) + 1, 99);
      std::vector<std::int32_t> positive(n + 1, 99), negative(n + 1, 99);
      std::vector<float> rest(n + 1, 99.0f);
      k().round_rows({rows.data(), mean.data(), zero.data(), rounded.data(), positive.data(),
                      negative.data(), rest.data(), scale, n, dims});
      for (std::int64_t i = 0; i < n; ++i) {
        int above = 0, below = 0;
        double left = 0.0, size = 0.0;
        for (int j = 0; j < dims; ++j) {
          const float x = rows[i * dims + j];
          const auto q = static_cast<int>(std::lrintf(x / scale));
          ASSERT_EQ(rounded[i * dims + j], q) << x / scale;
          (q > 0 ? above : below) += q;
          const double one = (double{x} - double{scale} * q) * mean[j], other = double{x} * zero[j];
          left += one - other;
          size += std::abs(one) + std::abs(other);
        }
        ASSERT_EQ(positive[i], above);
        ASSERT_EQ(negative[i], below);
        ASSERT_NEAR(rest[i], left, 1e-5 * size);
      }
      ASSERT_EQ(rows[n * dims], 5.0f) << "wrote past the end";
      ASSERT_EQ(rounded[n * dims], 99) << "wrote past the end";
      ASSERT_EQ(positive[n], 99) << "wrote past the end";
      ASSERT_EQ(negative[n], 99) << "wrote past the end";
      ASSERT_EQ(rest[n], 99.0f) << "wrote past the end";
    }
  }
}

}  // namespace
}  // namespace icecache::simd::simd_score_test

// sketch_scan against its definition: scores in integers, masses in double.
#include <algorithm>
#include <cmath>

#include "simd/kernels.h"
#include "simd_levels.h"

namespace icecache::simd::simd_scan_test {
namespace {

constexpr std::int16_t kUntouched = 12345;

class SimdScanTest : public SimdLevel {
 protected:
  struct Case {
    int bits, rank, page_size;
    std::int64_t pages;
  };

  // Random codes, masks (every third page full, every fifth empty) and queries.
  void make(const Case& c) {
    codes_.resize(static_cast<std::size_t>(c.pages) * c.page_size * c.rank * c.bits / 8);
    for (std::uint8_t& x : codes_) x = static_cast<std::uint8_t>(random_());
    queries_.resize(static_cast<std::size_t>(heads_) * c.rank);
    for (std::int8_t& q : queries_)
      q = static_cast<std::int8_t>(static_cast<int>(random_() % 255) - 127);
    masks_.resize(c.pages);
    const std::uint32_t full = all(c.page_size);
    for (std::int64_t p = 0; p < c.pages; ++p) {
      masks_[p] = p % 3 == 0 ? full : p % 5 == 0 ? 0 : static_cast<std::uint32_t>(random_()) & full;
    }
  }

  static std::uint32_t all(int page_size) { return page_size == 32 ? ~0u : (1u << page_size) - 1u; }

  // The codes of a slot, read as the layout's definition says.
  void slot_codes(const Case& c, std::int64_t slot, std::int32_t* out) const {
    const int per_block = 32 / c.bits;
    const std::int64_t blocks = c.rank / per_block, page = slot / c.page_size;
    for (int dim = 0; dim < c.rank; ++dim) {
      const std::uint8_t* bytes =
          codes_.data() +
          ((page * blocks + dim / per_block) * c.page_size + slot % c.page_size) * 4;
      const int within = dim % per_block;
      out[dim] = c.bits == 8  ? bytes[within]
                 : within < 4 ? bytes[within] & 15
                              : bytes[within - 4] >> 4;
    }
  }

  // Sums of all queries, the base and the shift that they need, and the weights of pages.
  void compute(const Case& c) {
    const std::int64_t slots = c.pages * c.page_size;
    sums_.assign(static_cast<std::size_t>(heads_ * slots), 0);
    std::vector<std::int32_t> codes(c.rank);
    for (std::int64_t i = 0; i < slots; ++i) {
      slot_codes(c, i, codes.data());
      for (int g = 0; g < heads_; ++g) {
        std::int32_t sum = 0;
        for (int d = 0; d < c.rank; ++d) sum += codes[d] * std::int32_t{queries_[g * c.rank + d]};
        sums_[g * slots + i] = sum;
      }
    }
    const int levels = (1 << c.bits) - 1;
    int reach = 0;
    base_.assign(heads_, 0);
    for (int g = 0; g < heads_; ++g) {
      int above = 0, below = 0;
      for (int d = 0; d < c.rank; ++d) {
        const int q = queries_[g * c.rank + d];
        (q > 0 ? above : below) += q * levels;
      }
      base_[g] = -below;
      reach = std::max(reach, above - below);
    }
    for (shift_ = 0; reach >> shift_ >= kMaxScore;) ++shift_;
    coarse_ = c.page_size == 8 ? 1 : 0;
    mass_.assign(static_cast<std::size_t>(heads_ * c.pages), 0.0);
    for (int g = 0; g < heads_; ++g) {
      std::int16_t max = kNoScore;
      for (std::int64_t i = 0; i < slots; ++i) max = std::max(max, expected_score(c, g, i));
      for (std::int64_t i = 0; i < slots; ++i) {
        if (!used(c, i)) continue;
        mass_[g * c.pages + i / c.page_size] +=
            std::exp2(std::ldexp(1.0 / 128.0, coarse_) * (expected_score(c, g, i) - max));
      }
    }
  }

  bool used(const Case& c, std::int64_t slot) const {
    return (masks_[slot / c.page_size] >> slot % c.page_size & 1u) != 0;
  }
  std::int16_t expected_score(const Case& c, int g, std::int64_t slot) const {
    const std::int32_t sum = base_[g] + sums_[g * c.pages * c.page_size + slot];
    return used(c, slot) ? static_cast<std::int16_t>(sum >> shift_) : kNoScore;
  }

  // Queries of fewer dims score as those that have zeros in the others.
  void check_fewer_dims(const Case& c, SketchScanArgs args) {
    const int dims = c.rank / 16 * 8;
    if (dims == 0) return;
    std::vector<std::int8_t> few, zeros(queries_.begin(), queries_.begin() + args.group * c.rank);
    for (int g = 0; g < args.group; ++g) {
      const auto query = zeros.begin() + static_cast<std::ptrdiff_t>(g) * c.rank;
      few.insert(few.end(), query, query + dims);
      std::fill(query + dims, query + c.rank, std::int8_t{0});
    }
    const std::size_t size = static_cast<std::size_t>(args.group * args.score_stride);
    std::vector<std::int16_t> max(args.group), expected(size, kUntouched), scores = expected;
    std::vector<float> mass(static_cast<std::size_t>(args.score_stride) * mass_stride(args.group));
    args.max = max.data();
    args.mass = mass.data();
    args.scores = expected.data();
    args.queries = zeros.data();
    k().sketch_scan(args);
    args.scores = scores.data();
    args.queries = few.data();
    args.dims = dims;
    k().sketch_scan(args);
    ASSERT_EQ(scores, expected) << c.bits << " bits, R " << c.rank << ", G " << args.group;
  }

  void check(const Case& c, int group) {
    const std::int64_t slots = c.pages * c.page_size;
    const std::int64_t rounded = (slots + kScoreSlots - 1) / kScoreSlots * kScoreSlots;
    const std::int64_t stride = rounded + 5, all_pages = rounded / c.page_size;
    std::vector<std::int16_t> scores(static_cast<std::size_t>(group * stride), kUntouched);
    std::vector<std::int16_t> max(group + 1, kUntouched);
    const int columns = mass_stride(group);
    std::vector<float> mass(static_cast<std::size_t>(all_pages * columns) + 4, 77.0f);
    SketchScanArgs args;
    args.codes = codes_.data();
    args.masks = masks_.data();
    args.queries = queries_.data();
    args.base = base_.data();
    args.scores = scores.data();
    args.max = max.data();
    args.mass = mass.data();
    args.score_stride = stride;
    args.pages = c.pages;
    args.group = group;
    args.rank = c.rank;
    args.page_size = c.page_size;
    args.bits = c.bits;
    args.shift = shift_;
    args.coarse = coarse_;
    k().sketch_scan(args);
    const auto where = [&] {
      return ::testing::Message() << c.bits << " bits, R " << c.rank << ", S " << c.page_size
                                  << ", G " << group << ", P " << c.pages << ", shift " << shift_;
    };
    for (int g = 0; g < group; ++g) {
      std::int16_t best = kNoScore;
      for (std::int64_t i = 0; i < stride; ++i) {
        const std::int16_t expected = i < slots     ? expected_score(c, g, i)
                                      : i < rounded ? kNoScore
                                                    : kUntouched;
        if (i < slots) best = std::max(best, expected);
        ASSERT_EQ(scores[g * stride + i], expected) << where() << ", query " << g << ", slot " << i;
      }
      ASSERT_EQ(max[g], best) << where() << ", query " << g;
    }
    ASSERT_EQ(max[group], kUntouched) << where();
    check_fewer_dims(c, args);
    for (std::int64_t p = 0; p < c.pages; ++p) {
      for (int g = 0; g < columns; ++g) {
        // Within the bounds of score_mass, and nothing where there is no token or no query.
        const double exact = g < group ? mass_[g * c.pages + p] : 0.0;
        // A term that is no normal float may be lost.
        ASSERT_GE(mass[p * columns + g], 0.9585 * exact - 1e-36)
            << where() << ", query " << g << ", page " << p;
        ASSERT_LE(mass[p * columns + g], 1.0215 * exact + 1e-36)
            << where() << ", query " << g << ", page " << p;
        if (exact == 0.0) {
          ASSERT_EQ(mass[p * columns + g], 0.0f) << where() << ", query " << g << ", page " << p;
        }
      }
    }
    for (int i = 0; i < 4; ++i) ASSERT_EQ(mass[all_pages * columns + i], 77.0f) << where();
  }

  std::vector<std::uint8_t> codes_;
  std::vector<std::int8_t> queries_;  // [heads, R]
  std::vector<std::uint32_t> masks_;
  std::vector<std::int32_t> sums_;  // [heads, slots]
  std::vector<double> mass_;        // [heads, P]
  std::vector<std::int32_t> base_;  // [heads]
  int heads_ = 16;                  // of queries_
  int shift_ = 0, coarse_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Levels, SimdScanTest, all_levels(), level_name);

TEST_P(SimdScanTest, EveryRankPageSizeAndGroup) {
  for (const int bits : {4, 8}) {
    for (const int rank : all_ranks()) {
      for (const int page_size : {8, 16, 32}) {
        for (const std::int64_t pages : {0, 1, 2, 3, 65}) {
          const Case c{bits, rank, page_size, pages};
          make(c);
          compute(c);
          for (int group = 1; group <= heads_; ++group) {
            check(c, group);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(SimdScanTest, ManyHeads) {
  heads_ = kMaxGroup;
  for (const int bits : {4, 8}) {
    for (const int page_size : {8, 16, 32}) {
      const Case c{bits, 64, page_size, 1200 / page_size};
      make(c);
      compute(c);
      for (const int group : all_groups()) {
        check(c, group);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Scores of which one of 0 stands for a logit far below 0, and the largest for one far above.
TEST_P(SimdScanTest, ScoresOfCappedLogits) {
  for (const int page_size : {8, 16, 32}) {
    const Case c{4, 32, page_size, 2100 / page_size};
    make(c);
    compute(c);
    const float unit = std::ldexp(kScoreUnit, coarse_);
    for (const float cap : {1.0f, 20.0f, 400.0f}) {
      constexpr int kHeads = 3;
      const std::vector<float> bias(kHeads, -unit * 5000.0f);
      std::vector<float> capped(bias);
      k().soft_cap(capped.data(), kHeads, cap);
      const std::int64_t slots = c.pages * page_size;
      const std::int64_t stride = (slots + kScoreSlots - 1) / kScoreSlots * kScoreSlots;
      const int columns = mass_stride(kHeads);
      std::vector<std::int16_t> scores(kHeads * stride), max(kHeads);
      std::vector<float> mass(stride / page_size * columns);
      k().sketch_scan({codes_.data(), masks_.data(), queries_.data(), base_.data(), scores.data(),
                       max.data(), mass.data(), stride, c.pages, kHeads, c.rank, page_size, c.bits,
                       shift_, coarse_, cap, unit, bias.data(), capped.data()});
      for (int g = 0; g < kHeads; ++g) {
        std::int16_t best = kNoScore;
        for (std::int64_t i = 0; i < slots; ++i) {
          const std::int16_t score = scores[g * stride + i], raw = expected_score(c, g, i);
          best = std::max(best, score);
          if (raw == kNoScore) {
            ASSERT_EQ(score, kNoScore);
            continue;
          }
          const double logit = double{bias[g]} + double{unit} * raw;
          const double said = double{capped[g]} + double{unit} * score;
          ASSERT_NEAR(said, cap * std::tanh(logit / cap), 0.51 * unit + 1e-6 * cap)
              << "cap " << cap << ", raw " << raw;
          ASSERT_TRUE(score >= 0 && score <= raw + 1) << score << " of " << raw;
        }
        ASSERT_EQ(max[g], best);
        for (std::int64_t p = 0; p < c.pages; ++p) {
          double exact = 0.0;
          for (std::int64_t i = p * page_size; i < (p + 1) * page_size; ++i) {
            if (!used(c, i)) continue;
            exact += std::exp2(std::ldexp(1.0 / 128.0, coarse_) * (scores[g * stride + i] - best));
          }
          ASSERT_GE(mass[p * columns + g], 0.9585 * exact - 1e-36);
          ASSERT_LE(mass[p * columns + g], 1.0215 * exact + 1e-36);
        }
      }
    }
  }
}

// More slots than are finished at once.
TEST_P(SimdScanTest, ManyPages) {
  for (const int bits : {4, 8}) {
    for (const int page_size : {8, 16, 32}) {
      const Case c{bits, 32, page_size, 4500 / page_size};  // not whole chunks
      make(c);
      compute(c);
      for (const int group : {1, 3, 4, 6}) {
        check(c, group);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A chunk may know a maximum that is far from that of all, or none at all.
TEST_P(SimdScanTest, MassesAreRelativeToTheMaximumOfAll) {
  for (const int page_size : {8, 32}) {
    for (const bool first : {true, false}) {
      const Case c{4, 16, page_size, 3200 / page_size};
      make(c);
      const std::size_t page_bytes = static_cast<std::size_t>(page_size) * 8;
      // One third of the pages scores high, one low, and one holds no token.
      for (std::int64_t p = 0; p < c.pages; ++p) {
        const std::int64_t third = first ? 3 * p / c.pages : 2 - 3 * p / c.pages;
        std::fill_n(codes_.begin() + p * page_bytes, page_bytes, third == 0 ? 0xff : 0x11);
        masks_[p] = third == 2 ? 0u : all(page_size) & ~(1u << p % 8);
      }
      std::fill(queries_.begin(), queries_.end(), static_cast<std::int8_t>(100));
      compute(c);
      for (const int group : {1, 5}) {
        check(c, group);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// So many that chunks grow.
TEST_P(SimdScanTest, VeryManyPages) {
  for (const int page_size : {8, 32}) {
    const Case c{4, 8, page_size, 140000 / page_size};
    make(c);
    compute(c);
    for (const int group : {1, 3}) {
      check(c, group);
      if (HasFatalFailure()) return;
    }
  }
}

// The largest sums that there are: partial sums of 16 bits must not wrap or saturate.
TEST_P(SimdScanTest, LargestCodesAndQueries) {
  for (const int bits : {4, 8}) {
    for (const int rank : all_ranks()) {
      for (const int page_size : {8, 16, 32}) {
        const Case c{bits, rank, page_size, 2};
        make(c);
        std::fill(codes_.begin(), codes_.end(), 0xff);
        std::fill(masks_.begin(), masks_.end(), all(page_size));
        for (int g = 0; g < heads_; ++g) {
          for (int d = 0; d < rank; ++d) {
            const bool minus = g == 1 || (g == 2 && d % 2 == 1) || (g == 3 && d >= rank / 2);
            queries_[g * rank + d] = static_cast<std::int8_t>(minus ? -127 : 127);
          }
        }
        compute(c);
        for (const int group : {1, 2, 3, 4, 8}) {
          check(c, group);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(SimdScanTest, NoTokenIsNoScore) {
  const Case c{4, 32, 16, 7};
  make(c);
  std::fill(masks_.begin(), masks_.end(), 0u);
  compute(c);
  for (const int group : {1, 5}) check(c, group);
}

}  // namespace
}  // namespace icecache::simd::simd_scan_test

// SketchScores on scores that are given, against sums of exponentials in double.
#include "index/sketch_scores.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "simd/kernels.h"

namespace icecache::sketch_scores_test {
namespace {

using simd::kNoScore;

struct Form {
  int group, pages, page_size;
};

// What Sketch::scan leaves beside scores, maxima, unit and bias.
void weigh(SketchScores& scores, int pages, int page_size) {
  for (int g = 0; g < scores.group(); ++g) {
    std::int16_t* row = scores.scores(0) + g * scores.stride();
    std::fill(row + pages * page_size, row + scores.stride(), kNoScore);
  }
  simd::kernels().score_mass({scores.scores(0), scores.max(0), scores.mass(0), scores.stride(),
                              scores.stride(), scores.coarse(), scores.group(), page_size});
}

class SketchScoresForms : public ::testing::TestWithParam<Form> {
 protected:
  // Normal scores, with a free slot in every tenth place; page 3 is empty.
  void fill(double spread_in_nats, unsigned seed = 1) {
    const auto [group, pages, page_size] = GetParam();
    std::mt19937 random(seed);
    scores_.resize(group, page_size, std::vector{pages}, 0);
    std::normal_distribution<double> normal(7000.0, spread_in_nats / scores_.unit());
    used_.assign(slots(), 0);
    for (int i = 0; i < slots(); ++i) used_[i] = random() % 10 != 0 && i / page_size != 3;
    for (int g = 0; g < group; ++g) {
      scores_.bias(0)[g] = static_cast<float>(3 * g - 5);
      scores_.max(0)[g] = kNoScore;
      for (int i = 0; i < slots(); ++i) {
        const double x = std::clamp(normal(random), 0.0, 14000.0);
        score(g, i) = used_[i] != 0 ? static_cast<std::int16_t>(x) : kNoScore;
        scores_.max(0)[g] = std::max(scores_.max(0)[g], score(g, i));
      }
    }
    weigh(scores_, pages, page_size);
    near_.assign(group, 0.0f);
    for (int g = 0; g < group; ++g) {
      near_[g] = static_cast<float>(logit(g, best(g)) + spread_in_nats * (g % 4 - 1));
    }
  }

  int slots() const { return GetParam().pages * GetParam().page_size; }
  std::int16_t& score(int g, int slot) { return scores_.scores(0)[g * scores_.stride() + slot]; }
  double logit(int g, int slot) {
    return scores_.bias(0)[g] + static_cast<double>(scores_.unit()) * score(g, slot);
  }
  int best(int g) {
    int slot = 0;
    for (int i = 1; i < slots(); ++i) {
      if (score(g, i) > score(g, slot)) slot = i;
    }
    return slot;
  }
  double log_total(int g) const {
    float totals[kMaxGroup];
    scores_.log_totals(totals);
    return totals[g];
  }
  // Over the slots that are used.
  double log_sum(int g, int first, int end) {
    double sum = 0.0;
    const double max = logit(g, best(g));
    for (int i = first; i < end; ++i) sum += used_[i] != 0 ? std::exp(logit(g, i) - max) : 0.0;
    return max + std::log(sum);
  }
  // log mass: what each slot weighs in the head that sees it best, beside totals as they are known.
  std::vector<double> log_masses() {
    std::vector<double> mass(slots(), -INFINITY);
    for (int g = 0; g < GetParam().group; ++g) {
      const double total = std::log(std::exp(double{log_total(g)}) + std::exp(double{near_[g]}));
      for (int i = 0; i < slots(); ++i) {
        if (used_[i] != 0) mass[i] = std::max(mass[i], logit(g, i) - total);
      }
    }
    return mass;
  }

  void expect_masses() {
    const auto [group, pages, page_size] = GetParam();
    for (int g = 0; g < group; ++g) {
      const double log_max = scores_.log_max(g);
      for (int p = 0; p < pages; ++p) {
        const double exact = std::exp(log_sum(g, p * page_size, (p + 1) * page_size) - log_max);
        EXPECT_LE(scores_.page_mass(0, p)[g], 1.022 * exact) << "head " << g << ", page " << p;
        EXPECT_GE(scores_.page_mass(0, p)[g], 0.958 * exact) << "head " << g << ", page " << p;
      }
    }
  }

  SketchScores scores_;
  std::vector<char> used_;
  std::vector<float> near_;
};

TEST_P(SketchScoresForms, PageMassesAreSumsOfWeights) {
  for (const double spread : {0.1, 1.0, 4.0}) {
    fill(spread);
    for (int g = 0; g < GetParam().group; ++g) {
      EXPECT_NEAR(scores_.log_max(g), logit(g, best(g)), 1e-4);
    }
    expect_masses();
  }
}

// A term is off by 1.8 % (root mean square), either way: where many share the weight it cancels.
TEST_P(SketchScoresForms, ErrorsOfTheTotalCancel) {
  double worst = 0.0;
  for (const double spread : {0.5, 1.0, 2.0}) {
    fill(spread);
    for (int g = 0; g < GetParam().group; ++g) {
      const double total = log_sum(g, 0, slots());
      double squares = 0.0;  // one over how many tokens share the weight
      for (int i = 0; i < slots(); ++i) {
        if (used_[i] != 0) squares += std::exp(2.0 * (logit(g, i) - total));
      }
      const double error = std::abs(log_total(g) - total);
      EXPECT_LT(error, std::min(0.042, 0.001 + 4.0 * 0.018 * std::sqrt(squares)))
          << "head " << g << ", spread " << spread;
      if (spread <= 1.0) worst = std::max(worst, error);
    }
  }
  if (slots() >= 1000) {
    EXPECT_LT(worst, 0.01);
  }
}

TEST_P(SketchScoresForms, TopIsTheLargestMassOfAnyHead) {
  const auto tokens = [&] { return std::count(used_.begin(), used_.end(), 1); };
  for (const double spread : {0.5, 3.0}) {
    fill(spread);
    const double slack = 2.0 * scores_.unit() + 1e-4;  // offsets are whole units, cut off
    const std::vector<double> mass = log_masses();
    for (const std::int64_t k : {std::int64_t{0}, std::int64_t{1}, std::int64_t{7}, tokens() / 3,
                                 tokens() - 1, tokens(), tokens() + 9}) {
      std::vector<std::int32_t> top{1, 2};
      scores_.top(near_.data(), k, -INFINITY, top);
      ASSERT_EQ(static_cast<std::int64_t>(top.size()), std::min<std::int64_t>(k, tokens()));
      EXPECT_TRUE(std::is_sorted(top.begin(), top.end()));
      std::vector<char> chosen(slots(), 0);
      double least = INFINITY, most = -INFINITY;
      for (const std::int32_t i : top) {
        ASSERT_LT(i, slots());
        ASSERT_TRUE(used_[i]) << "a free slot";
        ASSERT_FALSE(chosen[i]++) << "twice";
        least = std::min(least, mass[i]);
      }
      for (int i = 0; i < slots(); ++i) {
        if (chosen[i] == 0) most = std::max(most, mass[i]);
      }
      if (!top.empty()) {
        EXPECT_GE(least, most - slack) << k << " of " << tokens();
      }
    }
  }
}

TEST_P(SketchScoresForms, ExcludedSlotsWeighNothing) {
  const auto [group, pages, page_size] = GetParam();
  fill(1.0);
  std::vector<float> before;
  for (int p = 0; p < pages; ++p) {
    before.insert(before.end(), scores_.page_mass(0, p), scores_.page_mass(0, p) + group);
  }
  std::vector<std::int32_t> slots_out;
  for (int i = 0; i < slots(); ++i) {
    if (i / page_size % 2 == 0 && i % 3 != 0) slots_out.push_back(i);
  }
  for (int round = 0; round < 2; ++round) {  // again is the same
    scores_.exclude(slots_out);
    for (const std::int32_t i : slots_out) used_[i] = 0;
    for (int g = 0; g < group; ++g) {
      // The scale stays; what it refers to may be gone.
      const double log_max = scores_.log_max(g);
      double total = 0.0;
      for (int p = 0; p < pages; ++p) {
        const float mass = scores_.page_mass(0, p)[g];
        double exact = 0.0;
        for (int i = p * page_size; i < (p + 1) * page_size; ++i) {
          if (used_[i] != 0) exact += std::exp(logit(g, i) - log_max);
        }
        EXPECT_LE(mass, 1.022 * exact);
        EXPECT_GE(mass, 0.958 * exact);
        if (p % 2 == 1) {
          EXPECT_EQ(mass, before[p * group + g]) << "page " << p;
        }
        total += exact;
      }
      if (total > 0.0) {
        EXPECT_NEAR(log_total(g), log_max + std::log(total), 0.042);
      }
    }
  }
  std::vector<std::int32_t> all(slots());
  std::iota(all.begin(), all.end(), 0);
  scores_.exclude(all);
  for (int g = 0; g < group; ++g) EXPECT_EQ(log_total(g), -INFINITY);
}

INSTANTIATE_TEST_SUITE_P(Forms, SketchScoresForms,
                         ::testing::Values(Form{1, 5, 8}, Form{3, 7, 8}, Form{4, 90, 16},
                                           Form{5, 60, 32}, Form{16, 130, 8}, Form{2, 4, 32},
                                           Form{17, 9, 16}, Form{71, 40, 32}, Form{128, 5, 8}),
                         [](const auto& info) {
                           const Form& form = info.param;
                           std::string name("group");
                           name += std::to_string(form.group);
                           name.append("_pages").append(std::to_string(form.pages));
                           return name.append("_of").append(std::to_string(form.page_size));
                         });

// Scores [G, slots] of pages of 16, above a base of kBase.
constexpr int kBase = 2000;
class SketchScoresTest : public ::testing::Test {
 protected:
  void fill(int group, const std::vector<int>& values) {
    const int pages = static_cast<int>(values.size()) / group / 16;
    scores_.resize(group, 16, std::vector{pages}, 1);
    for (int g = 0; g < group; ++g) {
      scores_.max(0)[g] = kNoScore;
      scores_.bias(0)[g] = -kBase * scores_.unit();
      for (std::size_t i = 0; i < values.size() / group; ++i) {
        const int value = values[g * values.size() / group + i];
        const auto score = static_cast<std::int16_t>(value == kNoScore ? value : kBase + value);
        scores_.scores(0)[g * scores_.stride() + i] = score;
        scores_.max(0)[g] = std::max(scores_.max(0)[g], score);
      }
    }
    weigh(scores_, pages, 16);
  }
  float log_total(int g) const {
    float totals[kMaxGroup];
    scores_.log_totals(totals);
    return totals[g];
  }
  std::vector<std::int32_t> top(std::vector<float> near, int k) {
    std::vector<std::int32_t> slots;
    scores_.top(near.data(), k, -INFINITY, slots);
    return slots;
  }
  SketchScores scores_;
};

TEST_F(SketchScoresTest, EqualMassesGoToTheLowerSlots) {
  std::vector<int> values(64, 100);
  values[50] = 101;
  fill(1, values);
  EXPECT_EQ(top({-INFINITY}, 4), (std::vector<std::int32_t>{0, 1, 2, 50}));
}

// The head whose weight lies with sink and window has no say.
TEST_F(SketchScoresTest, NearWeightTellsHowMuchAHeadCaresForTheIndex) {
  std::vector<int> values(32, -2000);
  values[3] = 2000;       // head 0 sees token 3
  values[16 + 9] = 1000;  // head 1 sees token 9
  fill(2, values);
  EXPECT_EQ(top({-INFINITY, 60.0f}, 1), std::vector<std::int32_t>{3});
  EXPECT_EQ(top({60.0f, -INFINITY}, 1), std::vector<std::int32_t>{9});
  EXPECT_EQ(top({60.0f, 60.0f}, 1), std::vector<std::int32_t>{3}) << "20 nats against 10";
}

TEST_F(SketchScoresTest, AnyNearWeightIsFine) {
  std::vector<int> values(32);
  for (int i = 0; i < 32; ++i) values[i] = i % 2 == 0 ? 10 * i : -10 * i;
  for (const float near : {-INFINITY, -1e30f, -1e4f, 0.0f, 1e4f, 1e30f}) {
    fill(1, values);
    EXPECT_EQ(top({near}, 3), (std::vector<std::int32_t>{26, 28, 30})) << near;
  }
}

TEST_F(SketchScoresTest, NoTokens) {
  fill(2, std::vector<int>(64, kNoScore));
  for (int g = 0; g < 2; ++g) {
    EXPECT_EQ(scores_.log_max(g), -INFINITY);
    EXPECT_EQ(log_total(g), -INFINITY);
    for (int p = 0; p < 2; ++p) EXPECT_EQ(scores_.page_mass(0, p)[g], 0.0f);
  }
  for (const float near : {-INFINITY, 0.0f}) {
    EXPECT_TRUE(top({near, near}, 5).empty()) << near;
  }
  scores_.resize(2, 16, std::vector{0}, 0);
  scores_.max(0)[0] = scores_.max(0)[1] = kNoScore;
  EXPECT_EQ(log_total(0), -INFINITY);
  EXPECT_TRUE(top({0.0f, 0.0f}, 5).empty());
}

// Buffers are used again: nothing of a larger step stays.
TEST_F(SketchScoresTest, ASmallerStepForgetsTheLargerOne) {
  fill(4, std::vector<int>(4 * 160, 500));
  fill(1, std::vector<int>(16, 7));
  EXPECT_NEAR(log_total(0), 7 * scores_.unit() + std::log(16.0), 0.042);
  EXPECT_EQ(top({0.0f}, 100).size(), 16u);
}

}  // namespace
}  // namespace icecache::sketch_scores_test

// Drafted tokens: gone without a trace where they are taken back, be they checked exactly or within
// the budget; and calls of several tokens answer as calls of one.
#include <gtest/gtest.h>

#include <random>

#include "icecache/engine.h"
#include "icecache/error.h"

namespace icecache::engine_verify_test {
namespace {

constexpr int kDim = 32, kHeads = 2, kQueryHeads = 4, kPrompt = 400;

// An engine with one sequence, of kPrompt tokens at first. Token t has the same keys, values and
// queries in each Sequence, so that two of them can be compared.
class Sequence {
 public:
  static constexpr int kWindow = 8;

  explicit Sequence(bool exact = false, const char* index = "tree", int prompt = kPrompt,
                    int layers = 1)
      : engine_(shape(layers), config(exact, index)) {
    id_ = engine_.new_sequence();
    step(prompt, Phase::kPromptEnd);
    engine_.synchronize();
  }
  // Of the outputs of `tokens` tokens those of token t [Hq, D].
  static std::vector<float> token(const std::vector<float>& outputs, int tokens, int t) {
    std::vector<float> out;
    for (int layer_head = 0; layer_head * tokens * kDim < static_cast<int>(outputs.size());
         ++layer_head) {
      const auto row = outputs.begin() + (layer_head * tokens + t) * kDim;
      out.insert(out.end(), row, row + kDim);
    }
    return out;
  }
  // The next `tokens` tokens: the outputs of all layers [layers, Hq, T, D].
  std::vector<float> step(int tokens, Phase phase) {
    const auto first = static_cast<int>(engine_.length(id_, 0));
    const int layers = engine_.shape().num_layers;
    std::vector<float> all;
    for (int layer = 0; layer < layers; ++layer) {
      const std::vector<float> out = step(layer, first, tokens, phase);
      all.insert(all.end(), out.begin(), out.end());
    }
    return all;
  }
  void take_back(int tokens) { engine_.truncate(id_, engine_.length(id_, 0) - tokens); }
  Engine& engine() { return engine_; }
  SeqId id() const { return id_; }

 private:
  std::vector<float> step(int layer, int first, int tokens, Phase phase) {
    std::vector<float> k = rows(kHeads, first, tokens, 1 + 4 * layer),
                       v = rows(kHeads, first, tokens, 2 + 4 * layer),
                       q = rows(kQueryHeads, first, tokens, 3 + 4 * layer), o(q.size());
    const auto view = [&](std::vector<float>& x, int heads) {
      return TensorView{x.data(), DType::kFloat32, heads, tokens, kDim, tokens * kDim, kDim};
    };
    const TensorView keys = view(k, kHeads), values = view(v, kHeads),
                     queries = view(q, kQueryHeads), out = view(o, kQueryHeads);
    engine_.step({&id_, 1}, layer, {&keys, 1}, {&values, 1}, {&queries, 1}, {&out, 1}, {&phase, 1});
    return o;
  }
  static CacheShape shape(int layers) {
    CacheShape shape;
    shape.num_layers = layers;
    shape.num_q_heads = kQueryHeads;
    shape.num_kv_heads = kHeads;
    shape.head_dim = kDim;
    return shape;
  }
  static Config config(bool exact, const char* index) {
    Config config;
    config.token_budget = 32;
    config.sink_tokens = 4;
    config.window_tokens = kWindow;
    config.page_size = 8;
    config.candidates = 64;
    config.segment_tokens = 32;
    config.exact = exact;
    config.index = index;
    return config;
  }
  static std::vector<float> rows(int heads, int first, int tokens, unsigned kind) {
    std::vector<float> x(static_cast<std::size_t>(heads) * tokens * kDim);
    for (int t = 0; t < tokens; ++t) {
      for (int h = 0; h < heads; ++h) {
        std::mt19937 random(static_cast<unsigned>(first + t) * 64 + kind * 4 + h);
        std::normal_distribution<float> normal;
        for (int i = 0; i < kDim; ++i) x[(h * tokens + t) * kDim + i] = normal(random);
      }
    }
    return x;
  }

  Engine engine_;
  SeqId id_;
};

void expect_near(const std::vector<float>& got, const std::vector<float>& expected, float most) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], most) << i;
}

TEST(EngineVerify, IsExactWhateverTheNumber) {
  Sequence full(/*exact=*/true), ours;
  for (const int tokens : {1, 2, 9, 64, 100, 1}) {
    expect_near(ours.step(tokens, Phase::kVerify), full.step(tokens, Phase::kAuto), 1e-5f);
  }
  EXPECT_EQ(ours.engine().stats(0, 0).steps, 0);
  ours.engine().check_integrity();
}

TEST(EngineVerify, ASparseStepIsNoVerification) {
  Sequence full(/*exact=*/true), ours;
  const std::vector<float> exact = full.step(1, Phase::kAuto), sparse = ours.step(1, Phase::kAuto);
  float most = 0.0f;
  for (std::size_t i = 0; i < exact.size(); ++i)
    most = std::max(most, std::abs(exact[i] - sparse[i]));
  EXPECT_GT(most, 1e-3f);
}

class EngineVerifyIndexes : public ::testing::TestWithParam<const char*> {};

TEST_P(EngineVerifyIndexes, WhatIsTakenBackLeavesNoTrace) {
  Sequence touched(false, GetParam()), untouched(false, GetParam());
  for (int round = 0; round < 6; ++round) {
    for (const int drafted : {1, 5, 16}) {
      touched.step(drafted, Phase::kVerify);
      touched.take_back(drafted);
    }
    EXPECT_EQ(touched.step(1, Phase::kAuto), untouched.step(1, Phase::kAuto)) << round;
  }
  touched.engine().check_integrity();
  const MemoryStats got = touched.engine().memory(), expected = untouched.engine().memory();
  EXPECT_EQ(got.pool_bytes, expected.pool_bytes);
  EXPECT_EQ(got.index_bytes, expected.index_bytes);
  EXPECT_EQ(got.query_bytes, expected.query_bytes);
}

TEST_P(EngineVerifyIndexes, WhatIsKeptIsIndexedAsDecodedTokensAre) {
  Sequence ours(false, GetParam()), full(/*exact=*/true);
  std::mt19937 random(5);
  for (int round = 0; round < 60; ++round) {
    const int drafted = 1 + static_cast<int>(random() % 12),
              kept = 1 + static_cast<int>(random() % drafted);
    const std::vector<float> got = ours.step(drafted, Phase::kVerify);
    expect_near(got, full.step(drafted, Phase::kAuto), 1e-5f);
    ours.take_back(drafted - kept);
    full.take_back(drafted - kept);
    ours.engine().check_integrity();
  }
  const std::string index = GetParam();
  if (index != "tree" && index != "faiss") return;
  EXPECT_GT(ours.engine().stats(0, 0).seals, 0);
  EXPECT_GT(ours.engine().stats(0, 0).merges, 0);
}

INSTANTIATE_TEST_SUITE_P(Kinds, EngineVerifyIndexes, ::testing::Values("tree", "dci", "positional"),
                         [](const auto& info) { return std::string(info.param); });

void expect_same_work(const HeadStats& got, const HeadStats& expected) {
  EXPECT_GT(got.steps, 300);
  EXPECT_EQ(got.steps, expected.steps);
  EXPECT_EQ(got.dense_steps, expected.dense_steps);
  EXPECT_EQ(got.tokens_selected, expected.tokens_selected);
  EXPECT_EQ(got.pages_selected, expected.pages_selected);
  EXPECT_EQ(got.widened_steps, expected.widened_steps);
  EXPECT_EQ(got.mass, expected.mass);
  EXPECT_EQ(got.worst_mass, expected.worst_mass);
  EXPECT_GT(got.seals, 3);
  EXPECT_EQ(got.seals, expected.seals);
  EXPECT_GT(got.merges, 0);
  EXPECT_EQ(got.merges, expected.merges);
}

// Drafts of two sequences, of which some are taken back, beside sequences that never had them.
class EngineDrafts : public ::testing::TestWithParam<bool> {};

TEST_P(EngineDrafts, AnswerAsStepsOfOneToken) {
  const bool telemetry = GetParam();
  for (const int prompt : {1, 20, 31, 32, 400}) {
    Sequence drafting(false, "tree", prompt, 2), single(false, "tree", prompt, 2);
    std::mt19937 random(7);
    for (int round = 0; round < 120; ++round) {
      const int drafted = 1 + static_cast<int>(random() % Sequence::kWindow),
                kept = 1 + static_cast<int>(random() % drafted);
      const std::vector<float> got = drafting.step(drafted, Phase::kAuto);
      for (int t = 0; t < kept; ++t) {
        const std::vector<float> expected = single.step(1, Phase::kAuto);
        ASSERT_EQ(Sequence::token(got, drafted, t), expected) << prompt << " " << round << " " << t;
      }
      if (telemetry) drafting.engine().check_integrity();
      drafting.take_back(drafted - kept);
    }
    // With it all tokens before it stay.
    EXPECT_EQ(drafting.step(1, Phase::kAuto), single.step(1, Phase::kAuto));
    drafting.engine().synchronize();
    single.engine().synchronize();
    const MemoryStats got = drafting.engine().memory(), expected = single.engine().memory();
    EXPECT_EQ(got.pool_bytes, expected.pool_bytes);
    EXPECT_EQ(got.index_bytes, expected.index_bytes);
    EXPECT_EQ(got.query_bytes, expected.query_bytes);
    expect_same_work(drafting.engine().stats(1, 0), single.engine().stats(1, 0));
  }
}

INSTANTIATE_TEST_SUITE_P(Integrity, EngineDrafts, ::testing::Bool());

TEST(EngineVerify, UnknownPhasesAreRefused) {
  Sequence ours;
  EXPECT_THROW(ours.step(1, static_cast<Phase>(4)), InvalidArgument);
  EXPECT_EQ(ours.engine().length(ours.id(), 0), kPrompt);
}

}  // namespace
}  // namespace icecache::engine_verify_test

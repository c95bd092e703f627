// Layers that attend to the keys and values of another one: attend() for tokens that step() has
// appended, whatever has been indexed by then.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "engine_oracle.h"
#include "icecache/engine.h"

namespace icecache::engine_shared_test {
namespace {

using testing::OracleHead;

constexpr int kGroup = 3, kDim = 16;

class SharedTokens : public ::testing::TestWithParam<const char*> {
 protected:
  SharedTokens() {
    shape_.num_layers = 1;
    shape_.num_q_heads = kGroup;
    shape_.num_kv_heads = 1;
    shape_.head_dim = kDim;
    config_.index = GetParam();
    config_.token_budget = 48;
    config_.sink_tokens = 4;
    config_.window_tokens = 8;
    config_.decode_tokens = 24;
    config_.segment_tokens = 32;
    config_.host_memory = 64 << 20;
    config_.num_threads = 2;
    config_.telemetry = "trace";
  }

  std::vector<float> normal(int n) {
    std::normal_distribution<float> distribution(0.0f, 2.0f);
    std::vector<float> values(n);
    for (float& x : values) x = distribution(random_);
    return values;
  }
  static TensorView view(std::vector<float>& data, int heads, int tokens) {
    return {data.data(), DType::kFloat32, heads, tokens, kDim, std::int64_t{tokens} * kDim, kDim};
  }

  // The layer that appends.
  void step(Engine& engine, SeqId id, int tokens, Phase phase) {
    std::vector<float> keys = normal(tokens * kDim), values = normal(tokens * kDim);
    queries_ = normal(kGroup * tokens * kDim);
    outputs_.assign(queries_.size(), 0.0f);
    const TensorView k = view(keys, 1, tokens), v = view(values, 1, tokens);
    const TensorView q = view(queries_, kGroup, tokens), out = view(outputs_, kGroup, tokens);
    engine.step({&id, 1}, 0, {&k, 1}, {&v, 1}, {&q, 1}, {&out, 1}, {&phase, 1});
    for (int t = 0; t < tokens; ++t) {
      head_.keys.emplace_back(keys.begin() + t * kDim, keys.begin() + (t + 1) * kDim);
      head_.values.emplace_back(values.begin() + t * kDim, values.begin() + (t + 1) * kDim);
    }
  }
  // One that reads.
  void attend(Engine& engine, SeqId id, int tokens, Phase phase) {
    queries_ = normal(kGroup * tokens * kDim);
    outputs_.assign(queries_.size(), 0.0f);
    const TensorView q = view(queries_, kGroup, tokens), out = view(outputs_, kGroup, tokens);
    engine.attend({&id, 1}, 0, {&q, 1}, {&out, 1}, {&phase, 1});
  }
  std::vector<double> query(int g, int t, int tokens) const {
    std::vector<double> scaled(kDim);
    for (int x = 0; x < kDim; ++x) {
      scaled[x] = double{queries_[(g * tokens + t) * kDim + x]} * shape_.softmax_scale();
    }
    return scaled;
  }
  void expect_row(int g, int t, int tokens, const testing::OracleResult& want) const {
    for (int x = 0; x < kDim; ++x) {
      ASSERT_NEAR(outputs_[(g * tokens + t) * kDim + x], want.out[x], 1e-3)
          << "query " << t << " of " << tokens << ", head " << g;
    }
  }
  void expect_exact(int tokens) const { expect_exact(tokens, tokens); }
  // The first `some` of them.
  void expect_exact(int tokens, int some) const {
    for (int t = 0; t < some; ++t) {
      const std::size_t seen = head_.keys.size() - tokens + t + 1;
      for (int g = 0; g < kGroup; ++g) {
        expect_row(g, t, tokens, testing::full_attention(head_, query(g, t, tokens), seen));
        if (HasFatalFailure()) return;
      }
    }
  }

  CacheShape shape_;
  Config config_;
  OracleHead head_;
  std::vector<float> queries_, outputs_;
  std::mt19937 random_{11};
};

// The first call has indexed the chunk by the time of the second.
TEST_P(SharedTokens, NoQueryOfAPromptSeesATokenBehindIt) {
  Engine engine(shape_, config_);
  const SeqId id = engine.new_sequence();
  for (const int tokens : {150, 70}) {
    step(engine, id, tokens, Phase::kPromptEnd);
    engine.synchronize();
    for (const Phase phase : {Phase::kPromptEnd, Phase::kPrefill, Phase::kAuto, Phase::kVerify}) {
      attend(engine, id, tokens, phase);
      expect_exact(tokens);
      attend(engine, id, 9, phase == Phase::kAuto ? Phase::kPrefill : phase);
      expect_exact(9);
    }
  }
  engine.check_integrity();
}

// More new tokens than the window holds: an index that grows has taken in the first of them, and the
// queries before those attend exactly.
TEST_P(SharedTokens, NoQueryOfADecodeStepSeesATokenBehindIt) {
  Engine engine(shape_, config_);
  const SeqId id = engine.new_sequence();
  step(engine, id, 150, Phase::kPromptEnd);
  for (int steps = 0; steps < 6; ++steps) {
    step(engine, id, 24, Phase::kAuto);
    attend(engine, id, 24, Phase::kAuto);
    const StepTrace trace = engine.trace(id, 0, 0);
    const auto length = static_cast<std::int32_t>(head_.keys.size());
    if (std::string(GetParam()) == "tree") {
      ASSERT_EQ(trace.window.back(), length - 1);
      for (int g = 0; g < kGroup; ++g) {
        expect_row(g, 23, 24, testing::sparse_attention(head_, query(g, 23, 24), trace, g));
      }
    } else {
      const int behind = trace.window.front() - (length - 24) - 1;
      ASSERT_GT(behind, 0);
      expect_exact(24, behind);
    }
    if (HasFatalFailure()) return;
  }
}

TEST_P(SharedTokens, EachCallSelectsForItself) {
  Engine engine(shape_, config_);
  const SeqId id = engine.new_sequence();
  step(engine, id, 300, Phase::kPrefill);
  attend(engine, id, 300, Phase::kPrefill);
  expect_exact(300);
  attend(engine, id, 300, Phase::kPromptEnd);
  expect_exact(300);
  for (int steps = 0; steps < 40; ++steps) {
    step(engine, id, 1, Phase::kAuto);
    std::vector<std::int32_t> before;
    for (int layer = 0; layer < 3; ++layer) {
      if (layer > 0) attend(engine, id, 1, Phase::kAuto);
      const StepTrace trace = engine.trace(id, 0, 0);
      ASSERT_FALSE(trace.selected.empty());
      EXPECT_NE(trace.selected, before);
      before = trace.selected;
      for (int g = 0; g < kGroup; ++g) {
        expect_row(g, 0, 1, testing::sparse_attention(head_, query(g, 0, 1), trace, g));
        if (HasFatalFailure()) return;
      }
    }
  }
  EXPECT_EQ(engine.stats(0, 0).steps, 3 * 40);
  engine.check_integrity();
}

// Whatever reads drafted tokens leaves nothing of them once they are taken back.
TEST_P(SharedTokens, WhatIsTakenBackLeavesNothing) {
  std::vector<std::vector<float>> outputs;
  config_.segment_tokens = 4096;  // one index, whose metric is that of all queries
  for (const int readers : {0, 2}) {
    head_ = {};
    random_.seed(5);
    Engine engine(shape_, config_);
    const SeqId id = engine.new_sequence();
    step(engine, id, 200, Phase::kPromptEnd);
    for (int round = 0; round < 30; ++round) {
      step(engine, id, 1, Phase::kAuto);
      if (readers == 0) continue;
      std::mt19937 kept = random_;
      step(engine, id, 16, Phase::kVerify);
      for (int r = 0; r < readers; ++r) attend(engine, id, 16, Phase::kVerify);
      engine.truncate(id, 201 + round);
      random_ = kept;
    }
    engine.truncate(id, 0);
    head_ = {};
    step(engine, id, 200, Phase::kPromptEnd);
    step(engine, id, 1, Phase::kAuto);
    outputs.push_back(outputs_);
  }
  EXPECT_EQ(outputs[0], outputs[1]);
}

INSTANTIATE_TEST_SUITE_P(Indexes, SharedTokens, ::testing::Values("tree", "dci", "positional"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace icecache::engine_shared_test

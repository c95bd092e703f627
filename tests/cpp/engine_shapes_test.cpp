// Engines of wide heads, of many query heads per KV head and with a soft cap: prompts, and decode
// steps within the budget, against the oracle, for every index.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "engine_oracle.h"
#include "icecache/engine.h"

namespace icecache::engine_shapes_test {
namespace {

using testing::OracleHead;

struct Form {
  const char* index;
  int group, head_dim;
  float softcap = 0.0f;
};

class EngineShapes : public ::testing::TestWithParam<Form> {
 protected:
  static constexpr int kPrompt = 300;

  EngineShapes() {
    shape_.num_layers = 1;
    shape_.num_q_heads = GetParam().group;
    shape_.num_kv_heads = 1;
    shape_.head_dim = GetParam().head_dim;
    shape_.logit_softcap = GetParam().softcap;
    config_.index = GetParam().index;
    config_.token_budget = 64;
    config_.host_memory = 64 << 20;
    config_.num_threads = 2;
    config_.telemetry = "trace";
  }

  std::vector<float> normal(std::size_t n) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(n);
    for (float& x : values) x = distribution(random_);
    return values;
  }
  TensorView view(std::vector<float>& data, int heads, int tokens) const {
    const std::int64_t d = shape_.head_dim;
    return {data.data(), DType::kFloat32, heads, tokens, d, tokens * d, d};
  }

  void SetUp() override {
    if (config_.index == "faiss" && !build_info().faiss)
      GTEST_SKIP() << "FAISS is not in this build";
  }

  // Appends tokens and attends with each of them; returns the outputs [G, T, D].
  std::vector<float> step(Engine& engine, SeqId id, int tokens) {
    const auto d = static_cast<std::size_t>(shape_.head_dim);
    std::vector<float> keys = normal(tokens * d), values = normal(tokens * d);
    queries_ = normal(shape_.num_q_heads * tokens * d);
    // Logits far beyond the cap.
    for (float& x : queries_) x *= softcap() > 0.0 ? 5.0f : 1.0f;
    std::vector<float> outputs(queries_.size());
    lse_.assign(queries_.size() / d, NAN);
    const TensorView k = view(keys, 1, tokens), v = view(values, 1, tokens);
    const TensorView q = view(queries_, shape_.num_q_heads, tokens);
    const TensorView out = view(outputs, shape_.num_q_heads, tokens);
    const TensorView lse{lse_.data(), DType::kFloat32, shape_.num_q_heads, tokens, 1, tokens, 1};
    engine.step({&id, 1}, 0, {&k, 1}, {&v, 1}, {&q, 1}, {&out, 1}, {}, {&lse, 1});
    for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
      const auto row = [&](const std::vector<float>& from) {
        return std::vector<float>(from.begin() + t * d, from.begin() + (t + 1) * d);
      };
      head_.keys.push_back(row(keys));
      head_.values.push_back(row(values));
    }
    return outputs;
  }

  std::vector<double> query(int g, int t, int tokens) const {
    std::vector<double> scaled(shape_.head_dim);
    for (std::size_t x = 0; x < scaled.size(); ++x) {
      scaled[x] = static_cast<double>(queries_[(g * tokens + t) * scaled.size() + x]) *
                  shape_.softmax_scale();
    }
    return scaled;
  }
  void expect_near(const float* got, const std::vector<double>& want) const {
    for (std::size_t x = 0; x < want.size(); ++x) ASSERT_NEAR(got[x], want[x], 2e-4) << x;
  }

  double softcap() const { return shape_.logit_softcap; }

  CacheShape shape_;
  Config config_;
  OracleHead head_;
  std::vector<float> queries_, lse_;  // of the last step
  std::mt19937 random_{3};
};

TEST_P(EngineShapes, APromptAndStepsWithinTheBudgetAgreeWithTheOracle) {
  Engine engine(shape_, config_);
  const SeqId id = engine.new_sequence();
  const int d = shape_.head_dim;
  const std::vector<float> prompt = step(engine, id, kPrompt);
  for (int g = 0; g < GetParam().group; g += 7) {
    for (const int t : {0, 1, 63, 64, kPrompt - 1}) {
      const auto want = testing::full_attention(head_, query(g, t, kPrompt), t + 1, softcap());
      expect_near(prompt.data() + (g * kPrompt + t) * d, want.out);
      ASSERT_NEAR(lse_[g * kPrompt + t], want.near_lse, 1e-4);
    }
  }
  for (int steps = 0; steps < 3; ++steps) {
    const std::vector<float> got = step(engine, id, 1);
    const StepTrace trace = engine.trace(id, 0, 0);
    ASSERT_FALSE(trace.selected.empty());
    for (int g = 0; g < GetParam().group; ++g) {
      const auto want = testing::sparse_attention(head_, query(g, 0, 1), trace, g, softcap());
      expect_near(got.data() + g * d, want.out);
      ASSERT_NEAR(lse_[g], testing::log_sum({want.near_lse, want.rest.said}), 1e-4);
      ASSERT_NEAR(want.rest.said, want.rest.exact, 0.5) << "the sketches weigh other logits";
    }
  }
  engine.check_integrity();
}

INSTANTIATE_TEST_SUITE_P(Forms, EngineShapes,
                         ::testing::Values(Form{"tree", 1, 512}, Form{"tree", 5, 264},
                                           Form{"tree", 17, 64}, Form{"tree", 128, 64},
                                           Form{"dci", 128, 24}, Form{"dci", 2, 512},
                                           Form{"positional", 128, 24}, Form{"positional", 2, 512},
                                           Form{"tree", 3, 64, 2.0f}, Form{"tree", 4, 24, 50.0f},
                                           Form{"dci", 3, 64, 2.0f},
                                           Form{"positional", 3, 64, 2.0f},
                                           Form{"faiss", 3, 64, 2.0f}),
                         [](const auto& info) {
                           const Form& form = info.param;
                           return std::string(form.index) + "_g" + std::to_string(form.group) +
                                  "_d" + std::to_string(form.head_dim) + "_c" +
                                  std::to_string(static_cast<int>(form.softcap));
                         });

}  // namespace
}  // namespace icecache::engine_shapes_test

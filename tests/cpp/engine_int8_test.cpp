// Engine with kv_dtype = "int8": what tokens take, and that a row is rounded once, whatever becomes of
// it. That answers are right, engine_trace_test.cpp says.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "icecache/engine.h"
#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache::engine_int8_test {
namespace {

constexpr int kGroup = 2;

// One layer and KV head, and sequences whose keys and values do not depend on the engine.
class Talk {
 public:
  Talk(const char* kv_dtype, int dim, DType dtype, bool exact = false, float bias = 0.0f)
      : dim_(dim), dtype_(dtype), bias_(bias) {
    CacheShape shape;
    shape.num_layers = 1;
    shape.num_q_heads = kGroup;
    shape.num_kv_heads = 1;
    shape.head_dim = dim;
    shape.dtype = dtype;
    Config config;
    config.kv_dtype = kv_dtype;
    config.exact = exact;
    config.token_budget = 64;
    config.segment_tokens = 64;
    config.num_threads = 2;
    config.host_memory = 64 << 20;
    config.integrity = "always";
    engine = std::make_unique<Engine>(shape, config);
    id = engine->new_sequence();
  }

  // The outputs [G, T, D] of T tokens more.
  std::vector<float> step(int tokens, Phase phase = Phase::kAuto) {
    std::vector<float> keys = normal(tokens * dim_, 0.5f);
    for (int t = 0; t < tokens; ++t) {
      for (int d = 0; d < 4; ++d) {
        const auto position = static_cast<float>(engine->length(id, 0) + t);
        keys[t * dim_ + d] += bias_ * std::cos(1e-3f * position);
      }
    }
    Rows k = rows(keys, 1, tokens), v = rows(normal(tokens * dim_), 1, tokens);
    Rows q = rows(normal(kGroup * tokens * dim_), kGroup, tokens);
    Rows out = rows(std::vector<float>(kGroup * tokens * dim_), kGroup, tokens);
    engine->step({&id, 1}, 0, {&k.view, 1}, {&v.view, 1}, {&q.view, 1}, {&out.view, 1},
                 {&phase, 1});
    std::vector<float> result(kGroup * tokens * dim_);
    simd::kernels().to_float(out.bytes.data(), dtype_, result.data(), result.size());
    return result;
  }

  // Keys and values of the first `tokens` tokens as the engine gives them back.
  std::vector<std::byte> gathered(int tokens) const {
    const auto length = static_cast<int>(engine->length(id, 0));
    Rows k = rows(std::vector<float>(length * dim_), 1, length), v = k;
    v.view.data = v.bytes.data();
    k.view.data = k.bytes.data();
    engine->gather(id, 0, k.view, v.view);
    const std::size_t bytes = tokens * dim_ * size_of(dtype_);
    k.bytes.resize(bytes);
    k.bytes.insert(k.bytes.end(), v.bytes.begin(), v.bytes.begin() + bytes);
    return k.bytes;
  }

  std::unique_ptr<Engine> engine;
  SeqId id;

 private:
  struct Rows {
    std::vector<std::byte> bytes;
    TensorView view;
  };
  Rows rows(const std::vector<float>& numbers, int heads, int tokens) const {
    Rows made;
    made.bytes.resize(numbers.size() * size_of(dtype_));
    simd::kernels().from_float(numbers.data(), made.bytes.data(), dtype_, numbers.size());
    made.view = {made.bytes.data(), dtype_, heads, tokens, dim_, std::int64_t{tokens} * dim_, dim_};
    return made;
  }
  std::vector<float> normal(int n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> x(n);
    for (float& value : x) value = distribution(random_);
    return x;
  }

  int dim_;
  DType dtype_;
  float bias_;
  std::mt19937 random_{11};
};

std::int64_t bytes_of(Talk& talk) {
  return talk.engine->memory().pool_bytes;
}

// A byte for each number and four for the scale; sink and window are as they were.
TEST(EngineInt8, TokensTakeHalfTheMemory) {
  for (const bool exact : {false, true}) {
    for (const auto& [dim, least] : {std::pair{128, 1.85}, std::pair{64, 1.8}}) {
      Talk model("auto", dim, DType::kBFloat16, exact), eight("int8", dim, DType::kBFloat16, exact);
      model.step(4000);
      eight.step(4000);
      EXPECT_GT(static_cast<double>(bytes_of(model)) / static_cast<double>(bytes_of(eight)), least)
          << "D " << dim << (exact ? ", exact" : "");
    }
  }
}

// A prompt that comes in chunks never lies in memory as a whole in the model's type.
TEST(EngineInt8, ChunksOfAPromptArePackedAsTheyCome) {
  for (const bool exact : {false, true}) {
    Talk model("auto", 128, DType::kBFloat16, exact), eight("int8", 128, DType::kBFloat16, exact);
    for (int chunk = 0; chunk < 4; ++chunk) {
      const Phase phase = chunk < 3 ? Phase::kPrefill : Phase::kPromptEnd;
      const std::vector<float> want = model.step(400, phase), got = eight.step(400, phase);
      for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 0.03);
      EXPECT_LT(bytes_of(eight), 0.6 * bytes_of(model)) << "chunk " << chunk;
      eight.engine->check_integrity();
    }
    EXPECT_EQ(eight.engine->stats(0, 0).steps, 0);
    for (int t = 0; t < 8; ++t) {
      const std::vector<float> want = model.step(1), got = eight.step(1);
      for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 0.05);
    }
    EXPECT_EQ(eight.engine->stats(0, 0).steps, exact ? 0 : 8) << "within the budget";
    // Back into a chunk, and on from there.
    eight.engine->truncate(eight.id, 700);
    eight.step(300);
    eight.engine->check_integrity();
    eight.engine->release(eight.id);
    EXPECT_EQ(bytes_of(eight), 0);
  }
}

TEST(EngineInt8, RowsAreRoundedOnce) {
  for (const char* kind : {"tree", "exact"}) {
    Talk talk("int8", 32, DType::kFloat32, std::string(kind) == "exact");
    talk.step(300);
    const std::vector<std::byte> first = talk.gathered(200);
    const SeqId fork = talk.engine->fork(talk.id);
    for (int t = 0; t < 400; ++t) talk.step(1);
    EXPECT_GT(talk.engine->stats(0, 0).merges, 0);
    EXPECT_TRUE(talk.gathered(200) == first) << kind << ": merges do not change a row";
    talk.engine->release(talk.id);
    talk.id = fork;
    EXPECT_TRUE(talk.gathered(200) == first) << kind << ": a fork has the same rows";
  }
}

// Of norm 600, in elements that turn slowly with the position, as Qwen 2's keys have it.
TEST(EngineInt8, ALargeBiasOfKeysLeavesAnswersNear) {
  Talk model("auto", 64, DType::kFloat32, true, 300.0f),
      eight("int8", 64, DType::kFloat32, true, 300.0f);
  model.step(500);
  eight.step(500);
  double squares = 0.0, size = 0.0;
  for (int t = 0; t < 20; ++t) {
    const std::vector<float> want = model.step(1), got = eight.step(1);
    for (std::size_t i = 0; i < want.size(); ++i) {
      squares += (got[i] - want[i]) * (got[i] - want[i]);
      size += want[i] * want[i];
    }
  }
  EXPECT_LT(std::sqrt(squares / size), 0.05);
}

TEST(EngineInt8, WhatIsNeitherIsRefused) {
  Config config;
  EXPECT_THROW(config.set("kv_dtype", "int4"), InvalidArgument);
  CacheShape shape;
  shape.num_layers = shape.num_q_heads = shape.num_kv_heads = 1;
  shape.head_dim = 64;
  shape.dtype = DType::kInt8;
  EXPECT_THROW(Engine(shape, Config()), InvalidArgument);
}

}  // namespace
}  // namespace icecache::engine_int8_test

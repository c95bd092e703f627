// Prompts within prefill_budget: near exact attention, the same however they come in calls, and exact
// where there is little to pick of.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "icecache/engine.h"
#include "icecache/error.h"
#include "refusal.h"
#include "simd/kernels.h"

namespace icecache::engine_prefill_test {
namespace {

using testing::refusal;

constexpr int kTopics = 24;

struct Rows {
  std::vector<std::byte> bytes;
  TensorView view;
};

Rows make_rows(const std::vector<float>& numbers, DType dtype, int heads, int tokens, int dim) {
  Rows made;
  made.bytes.resize(numbers.size() * size_of(dtype));
  simd::kernels().from_float(numbers.data(), made.bytes.data(), dtype, numbers.size());
  made.view = {made.bytes.data(), dtype, heads, tokens, dim, std::int64_t{tokens} * dim, dim};
  return made;
}

// A prompt whose tokens are of some topics, which change every few tokens, as keys and queries of one
// layer and KV head.
struct Prompt {
  int tokens, group, dim;
  std::vector<float> keys, values, queries;  // [T, D], [T, D], [G, T, D]

  // `towards`: how much tokens have of their topic.
  Prompt(int tokens, int group, int dim, float towards = 1.5f)
      : tokens(tokens), group(group), dim(dim) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto draw = [&](std::size_t n) {
      std::vector<float> x(n);
      for (float& one : x) one = normal(random);
      return x;
    };
    const std::vector<float> topics = draw(static_cast<std::size_t>(kTopics) * dim);
    keys = draw(static_cast<std::size_t>(tokens) * dim);
    values = draw(static_cast<std::size_t>(tokens) * dim);
    queries = draw(static_cast<std::size_t>(group) * tokens * dim);
    int topic = 0;
    for (int t = 0; t < tokens; ++t) {
      if (t % 5 == 0) topic = static_cast<int>(random() % kTopics);
      for (int d = 0; d < dim; ++d) {
        const float own = towards * topics[topic * dim + d];
        keys[t * dim + d] += own;
        values[t * dim + d] += own;
        for (int g = 0; g < group; ++g) queries[(g * tokens + t) * dim + d] += own;
      }
    }
  }

  // Tokens [first, first + count) of heads [H, T, D].
  std::vector<float> part(const std::vector<float>& x, int heads, int first, int count) const {
    std::vector<float> taken;
    for (int h = 0; h < heads; ++h) {
      const auto at = x.begin() + (static_cast<std::ptrdiff_t>(h) * tokens + first) * dim;
      taken.insert(taken.end(), at, at + static_cast<std::ptrdiff_t>(count) * dim);
    }
    return taken;
  }
};

Config small_config() {
  Config config;
  config.token_budget = 64;
  config.segment_tokens = 64;
  config.prefill_budget = 64;
  config.prefill_chunk = 192;
  config.num_threads = 2;
  config.host_memory = 64 << 20;
  config.integrity = "always";
  return config;
}

class Reader {
 public:
  Reader(const Prompt& prompt, const Config& config, DType dtype = DType::kFloat32)
      : prompt_(prompt), dtype_(dtype) {
    CacheShape shape;
    shape.num_layers = 1;
    shape.num_q_heads = prompt.group;
    shape.num_kv_heads = 1;
    shape.head_dim = prompt.dim;
    shape.dtype = dtype;
    engine = std::make_unique<Engine>(shape, config);
    id = engine->new_sequence();
  }

  // Outputs [T, G, D] of the next tokens.
  std::vector<float> read(int count, Phase phase = Phase::kPrefill) {
    const int first = static_cast<int>(engine->length(id, 0)), g = prompt_.group, d = prompt_.dim;
    Rows k = rows(prompt_.part(prompt_.keys, 1, first, count), 1, count);
    Rows v = rows(prompt_.part(prompt_.values, 1, first, count), 1, count);
    Rows q = rows(prompt_.part(prompt_.queries, g, first, count), g, count);
    Rows out = rows(std::vector<float>(static_cast<std::size_t>(g) * count * d), g, count);
    engine->step({&id, 1}, 0, {&k.view, 1}, {&v.view, 1}, {&q.view, 1}, {&out.view, 1},
                 {&phase, 1});
    return by_token(out, count);
  }
  // The same of tokens that are there.
  std::vector<float> look(int count, Phase phase = Phase::kPrefill) {
    const int first = static_cast<int>(engine->length(id, 0)) - count, g = prompt_.group;
    Rows q = rows(prompt_.part(prompt_.queries, g, first, count), g, count);
    Rows out =
        rows(std::vector<float>(static_cast<std::size_t>(g) * count * prompt_.dim), g, count);
    engine->attend({&id, 1}, 0, {&q.view, 1}, {&out.view, 1}, {&phase, 1});
    return by_token(out, count);
  }
  // All of the prompt but `left` tokens, in calls that end at multiples of 64.
  std::vector<float> read_in_cuts(std::uint32_t seed, int left) {
    std::mt19937 random(seed);
    std::vector<float> outputs;
    const int end = prompt_.tokens - left;
    for (int at = 0; at < end;) {
      const int next = std::min(end, at + 64 * static_cast<int>(1 + random() % 8));
      const std::vector<float> more =
          read(next - at, next == end ? Phase::kPromptEnd : Phase::kPrefill);
      outputs.insert(outputs.end(), more.begin(), more.end());
      at = next;
    }
    return outputs;
  }
  HeadStats stats() const { return engine->stats(0, 0); }

  std::unique_ptr<Engine> engine;
  SeqId id;

 private:
  Rows rows(const std::vector<float>& x, int heads, int count) const {
    return make_rows(x, dtype_, heads, count, prompt_.dim);
  }
  std::vector<float> by_token(const Rows& out, int count) const {
    const int g = prompt_.group, d = prompt_.dim;
    std::vector<float> rows(static_cast<std::size_t>(g) * count * d);
    for (int t = 0; t < count; ++t) {
      for (int h = 0; h < g; ++h) {
        simd::kernels().to_float(out.view.at(h, t), dtype_, &rows[(t * g + h) * d], d);
      }
    }
    return rows;
  }

  const Prompt& prompt_;
  DType dtype_;
};

// Mean over rows of |x - y| / |y|.
double relative_error(const std::vector<float>& x, const std::vector<float>& y, int dim) {
  double sum = 0.0;
  const std::size_t rows = y.size() / dim;
  for (std::size_t r = 0; r < rows; ++r) {
    double error = 0.0, size = 0.0;
    for (int d = 0; d < dim; ++d) {
      const double a = x[r * dim + d], b = y[r * dim + d];
      error += (a - b) * (a - b);
      size += b * b;
    }
    sum += std::sqrt(error / size);
  }
  return sum / static_cast<double>(rows);
}

struct Shape {
  int group, dim;
  DType dtype = DType::kFloat32;
  const char* kv_dtype = "auto";
};

class EnginePrefill : public ::testing::TestWithParam<Shape> {};

TEST_P(EnginePrefill, IsNearExactAttentionHoweverItIsCut) {
  const Shape shape = GetParam();
  const Prompt prompt(1500, shape.group, shape.dim);
  Config config = small_config(), exact = config;
  config.kv_dtype = shape.kv_dtype;
  exact.prefill_budget = 0;
  Reader whole(prompt, config, shape.dtype), full(prompt, exact, shape.dtype);
  const std::vector<float> outputs = whole.read(1490, Phase::kPromptEnd);
  const std::vector<float> expected = full.read(1490, Phase::kPromptEnd);
  EXPECT_LT(relative_error(outputs, expected, shape.dim), 0.1);
  EXPECT_EQ(whole.stats().prompt_tokens, 1490);
  EXPECT_EQ(full.stats().sparse_prompt_tokens, 0);
  // The first chunk, of 256 tokens behind the sinks, is picked of from 576 on.
  EXPECT_EQ(whole.stats().sparse_prompt_tokens, 1490 - 576);
  const std::vector<float> next = whole.read(1, Phase::kAuto);
  for (const std::uint32_t seed : {1u, 2u}) {
    Reader cut(prompt, config, shape.dtype);
    EXPECT_EQ(cut.read_in_cuts(seed, 10), outputs) << "seed " << seed;
    EXPECT_EQ(cut.read(1, Phase::kAuto), next) << "seed " << seed;
    cut.engine->check_integrity();
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, EnginePrefill,
                         ::testing::Values(Shape{1, 64}, Shape{3, 128, DType::kBFloat16},
                                           Shape{16, 32, DType::kFloat16},
                                           Shape{4, 64, DType::kBFloat16, "int8"}),
                         [](const auto& info) {
                           return std::to_string(info.param.group) + "_of_" +
                                  std::to_string(info.param.dim) + info.param.kv_dtype;
                         });

// What is not picked weighs: without summaries a block is further off.
TEST(EnginePrefill, SummariesStandForWhatIsNotPicked) {
  const Prompt prompt(1500, 2, 64, 0.7f);
  Config config = small_config(), off = config, exact = config;
  off.tail = "off";
  exact.exact = true;
  Reader with(prompt, config), without(prompt, off), full(prompt, exact);
  const std::vector<float> expected = full.read(1500);
  const double error = relative_error(with.read(1500), expected, 64);
  EXPECT_LT(1.5 * error, relative_error(without.read(1500), expected, 64));
  EXPECT_EQ(full.stats().sparse_prompt_tokens, 0) << "exact wins";
}

// A query that looks for one token of long ago finds it.
TEST(EnginePrefill, ANeedleIsFound) {
  Prompt prompt(1500, 2, 64);
  for (const int hidden : {100, 333, 700}) {
    const int asked = 1300 + hidden / 7;
    for (int d = 0; d < 64; ++d) {
      const float direction = (d * 7 + hidden) % 11 < 5 ? 2.0f : -2.0f;
      prompt.keys[hidden * 64 + d] = direction;
      for (int g = 0; g < 2; ++g) prompt.queries[(g * 1500 + asked) * 64 + d] = 4.0f * direction;
    }
  }
  Reader reader(prompt, small_config());
  const std::vector<float> outputs = reader.read(1500);
  for (const int hidden : {100, 333, 700}) {
    const int asked = 1300 + hidden / 7;
    for (int d = 0; d < 64; ++d) {
      EXPECT_NEAR(outputs[asked * 2 * 64 + d], prompt.values[hidden * 64 + d], 1e-2);
    }
  }
}

TEST(EnginePrefill, ShortPromptsAndDenseLayersAreExact) {
  const Prompt prompt(700, 2, 64);
  Config config = small_config(), exact = config, dense = config;
  exact.prefill_budget = 0;
  dense.dense_layers = "0";
  Reader short_one(prompt, config), full(prompt, exact), dense_one(prompt, dense);
  EXPECT_EQ(short_one.read(575), full.read(575));
  EXPECT_EQ(short_one.stats().sparse_prompt_tokens, 0);
  Reader again(prompt, exact);
  EXPECT_EQ(dense_one.read(700), again.read(700));
}

// Queries that floats have no room for, and such that are none.
TEST(EnginePrefill, QueriesBeyondEstimatesAttendToEverything) {
  Prompt prompt(1024, 1, 64);
  for (int d = 0; d < 64; ++d) prompt.queries[900 * 64 + d] = 1e30f;
  Config exact = small_config();
  exact.prefill_budget = 0;
  Reader reader(prompt, small_config()), full(prompt, exact);
  const std::vector<float> outputs = reader.read(1024), expected = full.read(1024);
  for (int i = 896 * 64; i < 960 * 64; ++i) ASSERT_EQ(outputs[i], expected[i]);
  EXPECT_LT(relative_error(outputs, expected, 64), 0.1);

  for (int d = 0; d < 64; ++d) prompt.queries[900 * 64 + d] = std::nanf("");
  Reader other(prompt, small_config());
  const std::vector<float> with_nan = other.read(1024);
  for (int i = 0; i < 64; ++i) {
    ASSERT_TRUE(std::isnan(with_nan[900 * 64 + i]));
    ASSERT_FALSE(std::isnan(with_nan[901 * 64 + i]));
  }
}

// Without pages for chunks beside the tokens, a prompt is attended to as a whole.
TEST(EnginePrefill, WithoutPagesForChunksItIsExact) {
  const Prompt prompt(1024, 2, 64);
  Config config = small_config(), exact = config;
  exact.prefill_budget = 0;
  config.host_memory = 70 * 16 * 2 * 64 * 4;  // 64 pages hold the tokens
  Reader reader(prompt, config), full(prompt, exact);
  EXPECT_EQ(reader.read(1024), full.read(1024));
  EXPECT_EQ(reader.stats().sparse_prompt_tokens, 0);
  reader.engine->check_integrity();
}

// A call that is refused leaves the prompt as it was; so do tokens that are taken back.
TEST(EnginePrefill, TakenBackTokensLeaveNothing) {
  Prompt prompt(1500, 2, 64);
  Reader plain(prompt, small_config()), disturbed(prompt, small_config());
  std::vector<float> expected = plain.read(704);
  EXPECT_EQ(disturbed.read(704), expected);
  prompt.keys[1000 * 64] = std::nanf("");
  EXPECT_MENTIONS(refusal<InvalidArgument>([&] { disturbed.read(600); }), "finite");
  prompt.keys[1000 * 64] = 1.0f;
  EXPECT_EQ(disturbed.engine->length(disturbed.id, 0), 704);
  const SeqId before = disturbed.id;
  disturbed.id = disturbed.engine->fork(before);
  disturbed.read(256);
  disturbed.engine->release(disturbed.id);
  disturbed.id = before;
  EXPECT_EQ(disturbed.read(640), plain.read(640));
  EXPECT_EQ(disturbed.read(100, Phase::kPromptEnd), plain.read(100, Phase::kPromptEnd));
  disturbed.engine->truncate(disturbed.id, 500);  // within a segment
  disturbed.engine->check_integrity();
  EXPECT_EQ(disturbed.read(300, Phase::kPromptEnd).size(), 300u * 2 * 64);
  disturbed.engine->check_integrity();
}

// What follows a fork is as near exact attention as it would have been: the tokens just before it
// are attended exactly, though they are in a segment.
TEST(EnginePrefill, WhatFollowsAForkIsNearExactAttention) {
  const Prompt prompt(1500, 2, 64);
  Config exact = small_config();
  exact.prefill_budget = 0;
  Reader reader(prompt, small_config()), full(prompt, exact);
  const std::vector<float> expected = full.read(1500);
  const std::vector<float> cold = reader.read(1500, Phase::kPromptEnd);
  reader.id = reader.engine->fork(reader.id, 1024);
  const std::vector<float> warm = reader.read(476, Phase::kPromptEnd);
  const auto from = [](const std::vector<float>& x, int tokens) {
    return std::vector<float>(x.end() - static_cast<std::ptrdiff_t>(tokens) * 2 * 64, x.end());
  };
  EXPECT_LT(relative_error(warm, from(expected, 476), 64),
            1.2 * relative_error(from(cold, 476), from(expected, 476), 64));
}

// Layers that share keys attend one after the other, the second one to chunks that the first made.
TEST(EnginePrefill, ASecondLayerOverTheSameKeysAttendsAlike) {
  const Prompt prompt(1500, 2, 64);
  Reader reader(prompt, small_config());
  for (const int tokens : {640, 512}) {
    const std::vector<float> first = reader.read(tokens);
    EXPECT_LT(relative_error(reader.look(tokens), first, 64), 1e-5);
  }
  reader.read(348, Phase::kPromptEnd);
  reader.engine->check_integrity();
}

TEST(EnginePrefill, RefusesWhatItCannotDo) {
  const Prompt prompt(10, 1, 64);
  Config config = small_config();
  config.index = "dci";
  EXPECT_MENTIONS(refusal<InvalidArgument>([&] { Reader(prompt, config); }),
                  "prefill_budget must be 0 with index=dci");
  config = small_config();
  config.prefill_budget = -1;
  EXPECT_MENTIONS(refusal<InvalidArgument>([&] { Reader(prompt, config); }),
                  "prefill_budget must be from 0 to");
  config.prefill_budget = 64;
  config.prefill_chunk = 8;
  EXPECT_MENTIONS(refusal<InvalidArgument>([&] { Reader(prompt, config); }),
                  "prefill_chunk must be at least far_node_tokens");
}

}  // namespace
}  // namespace icecache::engine_prefill_test

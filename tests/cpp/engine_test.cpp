// What an Engine promises beyond the agreement with the oracle (engine_trace_test.cpp): budgets,
// telemetry, errors that change nothing, determinism.
#include "icecache/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "engine_oracle.h"
#include "icecache/error.h"

namespace icecache::engine_test {
namespace {

constexpr int kLayers = 2, kQueryHeads = 4, kHeads = 2, kDim = 32;

CacheShape small_shape() {
  CacheShape shape;
  shape.num_layers = kLayers;
  shape.num_q_heads = kQueryHeads;
  shape.num_kv_heads = kHeads;
  shape.head_dim = kDim;
  return shape;
}

Config small_config() {
  Config config;
  config.token_budget = 64;
  config.sink_tokens = 4;
  config.window_tokens = 8;
  config.host_memory = 64 << 20;
  config.num_threads = 2;
  config.telemetry = "trace";
  return config;
}

// Feeds one engine with random clustered tokens and keeps what it was given.
class Feeder {
 public:
  Feeder(Engine& engine, unsigned seed) : engine_(&engine), random_(seed) {
    for (auto& mode : modes_) mode = normal(kDim, 1.5f);
  }

  // A prefill chunk of all layers whose attention the caller computed itself.
  void append(SeqId id, int tokens) {
    for (int layer = 0; layer < kLayers; ++layer) {
      append_layer(id, layer, tokens);
      std::vector<float> chunk = normal(kQueryHeads * tokens * kDim, 1);
      const TensorView q = view(chunk, kQueryHeads);
      engine_->observe({&id, 1}, layer, {&q, 1});
    }
  }
  // A decode step; returns the output [Hq, D] of layer 0, `queries` are its queries.
  std::vector<float> step(SeqId id) {
    std::vector<float> first;
    for (int layer = kLayers - 1; layer >= 0; --layer) {
      append_layer(id, layer, 1);
      queries = normal(kQueryHeads * kDim, 1);
      first.resize(queries.size());
      const TensorView q = view(queries, kQueryHeads), o = view(first, kQueryHeads);
      engine_->attend({&id, 1}, layer, {&q, 1}, {&o, 1});
    }
    return first;
  }
  std::vector<double> scaled_query(int head) const {
    std::vector<double> query(queries.begin() + head * kDim, queries.begin() + (head + 1) * kDim);
    for (double& x : query) x /= std::sqrt(static_cast<double>(kDim));
    return query;
  }
  void append_layer(SeqId id, int layer, int tokens) {
    std::vector<float> keys = rows(kHeads * tokens), values = normal(kHeads * tokens * kDim, 1);
    const TensorView k = view(keys, kHeads), v = view(values, kHeads);
    engine_->append({&id, 1}, layer, {&k, 1}, {&v, 1});
    if (layer > 0) return;
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < tokens; ++t) {
        const auto row = [&](const std::vector<float>& x) {
          const auto at = x.begin() + (h * tokens + t) * kDim;
          return std::vector<float>(at, at + kDim);
        };
        heads[h].keys.push_back(row(keys));
        heads[h].values.push_back(row(values));
      }
    }
  }
  static TensorView view(std::vector<float>& data, int heads) {
    const std::int64_t tokens = static_cast<std::int64_t>(data.size()) / heads / kDim;
    return {data.data(), DType::kFloat32, heads, tokens, kDim, tokens * kDim, kDim};
  }
  std::vector<float> normal(int n, float scale) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> x(n);
    for (float& value : x) value = distribution(random_);
    return x;
  }

  testing::OracleHead heads[kHeads];
  std::vector<float> queries;

 private:
  std::vector<float> rows(int n) {
    std::vector<float> x = normal(n * kDim, 0.7f);
    for (int i = 0; i < n; ++i) {
      const auto& mode = modes_[random_() % 6];
      for (int j = 0; j < kDim; ++j) x[i * kDim + j] += mode[j];
    }
    return x;
  }

  Engine* engine_;
  std::mt19937 random_;
  std::vector<float> modes_[6];
};

// Share of the full attention's mass on the tokens that the trace says were attended exactly.
double true_mass(const testing::OracleHead& head, const std::vector<double>& query,
                 const StepTrace& trace) {
  std::set<std::int32_t> exact(trace.sink.begin(), trace.sink.end());
  exact.insert(trace.window.begin(), trace.window.end());
  exact.insert(trace.selected.begin(), trace.selected.end());
  double all = 0.0, near = 0.0;
  for (std::size_t i = 0; i < head.keys.size(); ++i) {
    double logit = 0.0;
    for (int x = 0; x < kDim; ++x) logit += query[x] * head.keys[i][x];
    all += std::exp(logit);
    if (exact.contains(static_cast<std::int32_t>(i))) near += std::exp(logit);
  }
  return near / all;
}

TEST(Engine, AttendsToExactlyTheBudget) {
  for (const char* index : {"tree", "dci", "positional"}) {
    Config config = small_config();
    config.index = index;
    Engine engine(small_shape(), config);
    Feeder feeder(engine, 1);
    const SeqId id = engine.new_sequence();
    feeder.append(id, 500);
    feeder.step(id);
    for (int h = 0; h < kHeads; ++h) {
      const StepTrace trace = engine.trace(id, 0, h);
      EXPECT_EQ(trace.sink.size(), 4u);
      EXPECT_GE(trace.window.size(), 8u);
      EXPECT_LT(trace.window.size(), 8u + 4u) << "inserted four at a time";
      EXPECT_EQ(trace.sink.size() + trace.window.size() + trace.selected.size(), 64u) << index;
      EXPECT_EQ(engine.stats(0, h).tokens_selected, 52);
      EXPECT_EQ(engine.stats(0, h).steps, 1);
    }
  }
}

TEST(Engine, MassIsEstimatedWithinAFewPercent) {
  Engine engine(small_shape(), small_config());
  Feeder feeder(engine, 2);
  const SeqId id = engine.new_sequence();
  feeder.append(id, 1500);
  double worst = 0.0;
  for (int step = 0; step < 20; ++step) {
    engine.reset_stats();
    feeder.step(id);
    for (int h = 0; h < kHeads; ++h) {
      double expected = 0.0;
      for (int g = 0; g < 2; ++g)
        expected +=
            true_mass(feeder.heads[h], feeder.scaled_query(2 * h + g), engine.trace(id, 0, h)) / 2;
      worst = std::max(worst, std::abs(engine.stats(0, h).mass - expected));
    }
  }
  EXPECT_LT(worst, 0.03);
}

// With few candidates more are found as it goes; with 700 there is nothing to find.
TEST(Engine, MassTargetIsReachedOrTheBoundIs) {
  std::int64_t attended_by[2] = {};
  for (const int candidates : {60, 700}) {
    Config config = small_config();
    config.mass_target = 0.6;
    config.max_token_budget = 700;
    config.candidates = candidates;
    Engine engine(small_shape(), config);
    Feeder feeder(engine, 3);
    const SeqId id = engine.new_sequence();
    feeder.append(id, 1500);
    std::int64_t& all = attended_by[candidates == 60 ? 0 : 1];
    for (int step = 0; step < 10; ++step) {
      feeder.step(id);
      for (int h = 0; h < kHeads; ++h) {
        const StepTrace trace = engine.trace(id, 0, h);
        const std::size_t attended =
            trace.sink.size() + trace.window.size() + trace.selected.size();
        all += static_cast<std::int64_t>(attended);
        ASSERT_LE(attended, 700u);
        for (int g = 0; g < 2; ++g) {
          const double mass = true_mass(feeder.heads[h], feeder.scaled_query(2 * h + g), trace);
          EXPECT_TRUE(mass > 0.57 || attended == 700) << mass << " with " << attended;
        }
      }
    }
    EXPECT_GT(all, 10 * kHeads * 64) << "never beyond the budget";
  }
  EXPECT_NEAR(attended_by[0], attended_by[1], 0.1 * attended_by[1]);
}

TEST(Engine, BudgetOfTheWholeSequenceIsFullAttention) {
  Config config = small_config();
  config.token_budget = 400;
  config.candidates = 400;
  Engine engine(small_shape(), config);
  Feeder feeder(engine, 4);
  const SeqId id = engine.new_sequence();
  feeder.append(id, 399);
  const std::vector<float> out = feeder.step(id);
  for (int head = 0; head < kQueryHeads; ++head) {
    const auto want =
        testing::full_attention(feeder.heads[head / 2], feeder.scaled_query(head), 400);
    for (int x = 0; x < kDim; ++x) EXPECT_NEAR(out[head * kDim + x], want.out[x], 1e-5);
  }
  EXPECT_EQ(engine.stats(0, 0).dense_steps, 1);
}

TEST(Engine, DenseLayersAttendInFull) {
  Config config = small_config();
  config.dense_layers = "0";
  Engine engine(small_shape(), config);
  Feeder feeder(engine, 5);
  const SeqId id = engine.new_sequence();
  feeder.append(id, 600);
  const std::vector<float> out = feeder.step(id);
  const auto want = testing::full_attention(feeder.heads[1], feeder.scaled_query(3), 601);
  for (int x = 0; x < kDim; ++x) EXPECT_NEAR(out[3 * kDim + x], want.out[x], 1e-5);
}

TEST(Engine, ThreadsDoNotChangeTheAnswer) {
  std::vector<float> first;
  for (int threads : {1, 3}) {
    Config config = small_config();
    config.num_threads = threads;
    config.index_threads = threads;
    Engine engine(small_shape(), config);
    Feeder feeder(engine, 6);
    const SeqId id = engine.new_sequence();
    feeder.append(id, 900);
    std::vector<float> all;
    for (int step = 0; step < 40; ++step) {
      const std::vector<float> out = feeder.step(id);
      all.insert(all.end(), out.begin(), out.end());
    }
    if (first.empty()) first = all;
    EXPECT_EQ(all, first);
  }
}

TEST(Engine, RefusesNaNAndChangesNothing) {
  Engine engine(small_shape(), small_config());
  Feeder feeder(engine, 7);
  const SeqId id = engine.new_sequence(), other = engine.new_sequence();
  feeder.append(id, 100);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> keys = feeder.normal(kHeads * 3 * kDim, 1), values = keys;
    keys[(1 * 3 + 2) * kDim + 5] = bad;  // head 1, third token
    const TensorView k = Feeder::view(keys, kHeads), v = Feeder::view(values, kHeads);
    const SeqId both[] = {other, id};
    const TensorView ks[] = {v, k}, vs[] = {v, v};
    try {
      engine.append(both, 0, ks, vs);
      FAIL() << "accepted";
    } catch (const InvalidArgument& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("keys"), std::string::npos) << text;
      EXPECT_NE(text.find("KV head 1"), std::string::npos) << text;
      EXPECT_NE(text.find("position 102"), std::string::npos) << text;
    }
    EXPECT_EQ(engine.length(id, 0), 100);
    EXPECT_EQ(engine.length(other, 0), 0);
  }
  feeder.step(id);
  engine.check_integrity();
}

TEST(Engine, TakesTokensBackAsIfTheyHadNeverCome) {
  Engine engine(small_shape(), small_config()), twin(small_shape(), small_config());
  Feeder feeder(engine, 7), other(twin, 7);
  const SeqId id = engine.new_sequence();
  ASSERT_EQ(id, twin.new_sequence());
  feeder.append(id, 30);
  other.append(id, 30);
  std::vector<float> keys = feeder.normal(kHeads * 5 * kDim, 1);
  const TensorView view = Feeder::view(keys, kHeads);
  engine.append({&id, 1}, 1, {&view, 1}, {&view, 1});
  const std::int64_t five[] = {5}, wild[] = {-1, 36, INT64_MAX, INT64_MIN};
  for (const std::int64_t count : wild) {
    EXPECT_THROW(engine.take_back({&id, 1}, 1, {&count, 1}), InvalidArgument);
  }
  EXPECT_THROW(engine.take_back({&id, 1}, kLayers, five), InvalidArgument);
  EXPECT_THROW(engine.take_back({&id, 1}, 1, {}), InvalidArgument);
  engine.take_back({&id, 1}, 1, five);
  EXPECT_EQ(engine.length(id, 0), 30);
  EXPECT_EQ(engine.length(id, 1), 30);
  other.normal(kHeads * 5 * kDim, 1);  // the same random numbers from here on
  EXPECT_EQ(feeder.step(id), other.step(id));
  engine.check_integrity();
}

TEST(Engine, RefusesOutputsThatShareMemory) {
  Engine engine(small_shape(), small_config());
  Feeder feeder(engine, 7);
  const SeqId ids[] = {engine.new_sequence(), engine.new_sequence()};
  for (const SeqId id : ids) feeder.append(id, 30);
  std::vector<float> queries = feeder.normal(kQueryHeads * kDim, 1), out = queries;
  const TensorView q = Feeder::view(queries, kQueryHeads), o = Feeder::view(out, kQueryHeads);
  const TensorView both_queries[] = {q, q}, both_outputs[] = {o, o};
  EXPECT_THROW(engine.attend(ids, 0, both_queries, both_outputs), InvalidArgument);
  EXPECT_THROW(engine.attend({ids, 1}, 0, {&q, 1}, {&q, 1}), InvalidArgument);
  TensorView expanded = o;
  expanded.head_stride = 0;
  EXPECT_THROW(engine.attend({ids, 1}, 0, {&q, 1}, {&expanded, 1}), InvalidArgument);
  EXPECT_EQ(out, queries) << "nothing was written";
  engine.attend({ids, 1}, 0, {&q, 1}, {&o, 1});
}

TEST(Engine, ForksGoTheirOwnWays) {
  Engine engine(small_shape(), small_config());
  Feeder feeder(engine, 8);
  const SeqId id = engine.new_sequence();
  feeder.append(id, 400);
  const std::int64_t before = engine.memory().pool_bytes;
  const SeqId child = engine.fork(id);
  EXPECT_EQ(engine.memory().pool_bytes, before) << "a fork shares its pages";
  Feeder other = feeder;
  feeder.append(id, 50);
  engine.truncate(child, 350);
  for (auto& head : other.heads) {
    head.keys.resize(350);
    head.values.resize(350);
  }
  other.append(child, 30);
  for (auto [sequence, source] : {std::pair{id, &feeder}, {child, &other}}) {
    const std::int64_t length = engine.length(sequence, 0);
    std::vector<float> keys(kHeads * length * kDim), values(keys);
    engine.gather(sequence, 0, Feeder::view(keys, kHeads), Feeder::view(values, kHeads));
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < length; ++t) {
        for (int x = 0; x < kDim; ++x) {
          ASSERT_EQ(keys[(h * length + t) * kDim + x], source->heads[h].keys[t][x]);
          ASSERT_EQ(values[(h * length + t) * kDim + x], source->heads[h].values[t][x]);
        }
      }
    }
  }
  engine.release(id);
  engine.release(child);
  EXPECT_EQ(engine.memory().pool_bytes, 0);
}

TEST(Engine, ASequenceThatOutgrowsThePoolIsRefusedAndOthersGoOn) {
  Config config = small_config();
  config.host_memory = 1 << 20;
  Engine engine(small_shape(), config);
  Feeder feeder(engine, 9), second(engine, 10);
  const SeqId id = engine.new_sequence(), other = engine.new_sequence();
  second.append(other, 100);
  std::int64_t length = 0;
  try {
    while (true) {
      feeder.append(id, 50);
      length += 50;
      ASSERT_LT(length, 100000);
    }
  } catch (const OutOfPages& error) {
    EXPECT_NE(std::string(error.what()).find("host_memory"), std::string::npos) << error.what();
  }
  // All or nothing in the layer that was refused, the first or the second.
  const std::int64_t first_layer = engine.length(id, 0);
  EXPECT_TRUE(first_layer == length || first_layer == length + 50) << first_layer;
  EXPECT_EQ(engine.length(id, 1), length);
  engine.check_integrity();
  engine.release(id);
  second.append(other, 100);
  second.step(other);
  engine.check_integrity();
}

}  // namespace
}  // namespace icecache::engine_test

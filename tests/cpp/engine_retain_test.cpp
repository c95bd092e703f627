// Sequences that are kept for forks of them: they take no tokens, and go before anybody lacks pages.
#include <gtest/gtest.h>

#include <memory>
#include <random>

#include "icecache/engine.h"
#include "icecache/error.h"
#include "refusal.h"

namespace icecache {
namespace {

constexpr int kLayers = 2, kQueryHeads = 4, kHeads = 2, kDim = 32;

class EngineRetain : public ::testing::Test {
 protected:
  static std::unique_ptr<Engine> make(std::int64_t pages) {
    CacheShape shape;
    shape.num_layers = kLayers;
    shape.num_q_heads = kQueryHeads;
    shape.num_kv_heads = kHeads;
    shape.head_dim = kDim;
    Config config;
    config.token_budget = 64;
    config.num_threads = 1;
    config.integrity = "always";
    config.host_memory = pages * 2 * 16 * kDim * 4;
    return std::make_unique<Engine>(shape, config);
  }
  // Appends and attends; the outputs of the last layer.
  std::vector<float> feed(Engine& engine, SeqId id, int tokens, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto some = [&](int heads) {
      std::vector<float> values(static_cast<std::size_t>(heads) * tokens * kDim);
      for (float& value : values) value = normal(random);
      return values;
    };
    std::vector<float> out(static_cast<std::size_t>(kQueryHeads) * tokens * kDim);
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<float> k = some(kHeads), v = some(kHeads), q = some(kQueryHeads);
      const auto view = [&](std::vector<float>& x, int heads) {
        return TensorView{x.data(), DType::kFloat32,
                          heads,    tokens,
                          kDim,     static_cast<std::int64_t>(tokens) * kDim,
                          kDim};
      };
      const TensorView keys = view(k, kHeads), values = view(v, kHeads);
      const TensorView queries = view(q, kQueryHeads), outputs = view(out, kQueryHeads);
      engine.step({&id, 1}, layer, {&keys, 1}, {&values, 1}, {&queries, 1}, {&outputs, 1});
    }
    return out;
  }
};

TEST_F(EngineRetain, AForkOfTheFirstTokensIsAForkThatIsCut) {
  const std::unique_ptr<Engine> engine = make(4000);
  const SeqId parent = engine->new_sequence();
  feed(*engine, parent, 300, 1);
  const SeqId cut = engine->fork(parent);
  engine->truncate(cut, 170);
  const SeqId fork = engine->fork(parent, 170);
  EXPECT_EQ(engine->length(fork, 1), 170);
  for (int step = 0; step < 40; ++step) {
    ASSERT_EQ(feed(*engine, fork, 1, 50 + step), feed(*engine, cut, 1, 50 + step));
  }
  EXPECT_MENTIONS(testing::refusal<InvalidArgument>([&] { engine->fork(parent, 301); }),
                  "length must be from 0 to 300");
  EXPECT_THROW(engine->fork(parent, -1), InvalidArgument);
  EXPECT_EQ(engine->memory().sequences, 3);
}

TEST_F(EngineRetain, ARetainedSequenceTakesNoTokens) {
  const std::unique_ptr<Engine> engine = make(4000);
  const SeqId id = engine->new_sequence();
  feed(*engine, id, 100, 1);
  engine->retain(id);
  const auto refused = [](const auto& call) { return testing::refusal<InvalidArgument>(call); };
  EXPECT_MENTIONS(refused([&] { feed(*engine, id, 1, 2); }), "retained one");
  EXPECT_MENTIONS(refused([&] { engine->truncate(id, 3); }), "retained one");
  EXPECT_EQ(engine->length(id, 0), 100);
  const SeqId fork = engine->fork(id);
  feed(*engine, fork, 1, 2);
  EXPECT_EQ(engine->length(fork, 0), 101);
  MemoryStats memory = engine->memory();
  EXPECT_EQ(memory.retained_sequences, 1);
  EXPECT_LT(memory.retained_bytes, memory.pool_bytes / 4) << "most of it is its fork's, too";
  engine->release(fork);
  memory = engine->memory();
  EXPECT_EQ(memory.retained_bytes, memory.pool_bytes);
  engine->release(id);
  EXPECT_FALSE(engine->contains(id));
  EXPECT_EQ(engine->pool_bytes(), 0);
}

TEST_F(EngineRetain, TheLeastRecentlyUsedGoesWherePagesAreWanted) {
  // 100 tokens take some 8 pages of each of the four heads, and as many while they are indexed.
  const std::unique_ptr<Engine> engine = make(4 * 8 * 6);
  std::vector<SeqId> ids;
  for (unsigned i = 0; i < 3; ++i) {
    ids.push_back(engine->new_sequence());
    feed(*engine, ids.back(), 100, i);
    engine->retain(ids.back());
  }
  engine->release(engine->fork(ids[0], 50));  // the most recently used now
  const SeqId other = engine->new_sequence();
  for (int step = 0; step < 60 && engine->contains(ids[1]); ++step) {
    feed(*engine, other, 10, 100 + step);
  }
  EXPECT_FALSE(engine->contains(ids[1]));
  EXPECT_TRUE(engine->contains(ids[0]));
  engine->check_integrity();
  while (engine->contains(ids[0])) feed(*engine, other, 10, 7);
  EXPECT_FALSE(engine->contains(ids[2]));
  EXPECT_THROW(engine->fork(ids[0]), InvalidArgument);
  EXPECT_EQ(engine->memory().evicted_sequences, 3);
  EXPECT_THROW(feed(*engine, other, 5000, 9), OutOfPages);
  engine->check_integrity();
}

TEST_F(EngineRetain, WhatIsRetainedChangesNothingForOthers) {
  const std::unique_ptr<Engine> crowded = make(280), empty = make(280);
  for (unsigned i = 0; i < 4; ++i) {
    const SeqId id = crowded->new_sequence();
    feed(*crowded, id, 200, i);
    crowded->retain(id);
  }
  const SeqId a = crowded->new_sequence(), b = empty->new_sequence();
  feed(*crowded, a, 400, 9);
  feed(*empty, b, 400, 9);
  for (int step = 0; step < 200; ++step) {
    ASSERT_EQ(feed(*crowded, a, 1, 100 + step), feed(*empty, b, 1, 100 + step)) << step;
  }
  EXPECT_GT(crowded->memory().evicted_sequences, 0);
}

}  // namespace
}  // namespace icecache

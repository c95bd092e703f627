// How many pages an index takes for its tokens after long decoding.
#include "host/page_bound.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "host/make_index.h"
#include "icecache/engine.h"
#include "pool_fixture.h"

namespace icecache::testing::page_bound_test {
namespace {

constexpr int kDim = 32, kBuilt = 512, kInserted = 3000, kFirst = 4;

// What comes after the prompt.
enum class Later { kRandom, kEqual, kEachPageInTurn, kLine };

class PageBound : public ::testing::TestWithParam<Later> {
 protected:
  static Tokens tokens(DType dtype) {
    Tokens all = clustered_tokens(kBuilt + kInserted, kDim, dtype, 3);
    for (int t = kBuilt; t < kBuilt + kInserted; ++t) {
      float* key = all.keys.data() + t * kDim;
      const float* old = all.keys.data() + (t * 37 % kBuilt) * kDim;
      if (GetParam() == Later::kEqual) std::copy_n(all.keys.data(), kDim, key);
      if (GetParam() == Later::kEachPageInTurn) std::copy_n(old, kDim, key);
      if (GetParam() == Later::kLine) std::fill_n(key, kDim, 0.01f * static_cast<float>(t));
    }
    all.encode();
    return all;
  }
};

TEST_P(PageBound, HoldsAtEveryLengthOfALongDecode) {
  for (const char* name : {"positional", "dci"}) {
    PoolFixture pool(4000, 16, kDim);
    CacheShape shape;
    shape.num_layers = shape.num_kv_heads = shape.num_q_heads = 1;
    shape.head_dim = kDim;
    Config config;
    config.index = name;
    pool.config = config.resolved(shape);
    const Tokens all = tokens(DType::kFloat32);
    const std::unique_ptr<GrowingIndex> index = make_growing_index(pool.context);
    QueryMoments moments;
    moments.observe(all.keys.data(), 64, kDim);
    index->build(all.block(0, kBuilt, kFirst), moments);
    double most = 0.0;
    for (int t = kBuilt; t < kBuilt + kInserted; ++t) {
      index->insert(all.block(t, 1, kFirst + t));
      const auto slots = static_cast<std::int64_t>(pool.pool->used_pages()) * 16;
      ASSERT_LE(slots, most_slots(pool.config, t + 1)) << name << " with " << t + 1 << " tokens";
      most = std::max(most, static_cast<double>(slots) / (t + 1));
    }
    index->check_integrity();
    RecordProperty(std::string("slots_a_token_") + name, std::to_string(most));
  }
}

INSTANTIATE_TEST_SUITE_P(All, PageBound,
                         ::testing::Values(Later::kRandom, Later::kEqual, Later::kEachPageInTurn,
                                           Later::kLine));

// What front ends reserve for a sequence is enough, whatever is built behind decoding: its index,
// and pages that sinks, window and index begin.
TEST(PageBoundTest, ASequenceFitsInWhatIsReservedForIt) {
  constexpr int kTokens = 1500, kPrompt = 300;
  for (const char* name : {"tree", "dci", "positional"}) {
    CacheShape shape;
    shape.num_layers = shape.num_kv_heads = shape.num_q_heads = 1;
    shape.head_dim = kDim;
    Config config;
    config.index = name;
    config.token_budget = 128;
    config.num_threads = config.index_threads = 1;
    config.host_memory = 16 << 20;
    const double share =
        std::max(1.25, static_cast<double>(most_slots(config.resolved(shape), 1'000'000)) / 1e6);
    config.host_memory = static_cast<std::int64_t>(share * kTokens + 64) * 2 * kDim * 4;
    Engine engine(shape, config);
    const SeqId id = engine.new_sequence();
    const Tokens all = clustered_tokens(kTokens, kDim, DType::kFloat32, 8);
    std::vector<float> out(all.keys.size());
    for (int at = 0, tokens = kPrompt; at < kTokens; at += tokens, tokens = 1) {
      const auto view = [&](const std::vector<float>& rows) {
        return TensorView{const_cast<float*>(rows.data()) + at * kDim,
                          DType::kFloat32,
                          1,
                          tokens,
                          kDim,
                          tokens * kDim,
                          kDim};
      };
      const TensorView k = view(all.keys), v = view(all.values), o = view(out);
      ASSERT_NO_THROW(engine.step({&id, 1}, 0, {&k, 1}, {&v, 1}, {&k, 1}, {&o, 1}))
          << name << " at " << at;
    }
    engine.check_integrity();
    EXPECT_GT(engine.stats(0, 0).steps, 1000) << name;
  }
}

// A share of the tokens that is no page of its own.
TEST(PageBoundTest, IsOneForATreeAndMoreWhereCellsOpenPages) {
  Config config;
  config.page_size = 16;
  config.far_node_tokens = 64;
  const auto share = [&](const char* index) {
    config.index = index;
    return static_cast<double>(most_slots(config, 1'000'000)) / 1e6;
  };
  EXPECT_NEAR(share("tree"), 1.0, 1e-3);
  EXPECT_NEAR(share("positional"), 1.0, 1e-3);
  EXPECT_NEAR(share("faiss"), 1.25, 1e-3);
  EXPECT_NEAR(share("dci"), 2.0 + 16.0 / 33.0, 1e-3);
}

}  // namespace
}  // namespace icecache::testing::page_bound_test

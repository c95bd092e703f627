// How many pages an index takes for its tokens after long decoding.
#include "index/page_bound.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "icecache/engine.h"
#include "pool_fixture.h"

namespace icecache::testing {
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
  for (const char* name : {"tree", "positional", "dci", "faiss"}) {
    if (std::string(name) == "faiss" && !build_info().faiss) continue;
    PoolFixture pool(4000, 16, kDim);
    CacheShape shape;
    shape.num_layers = shape.num_kv_heads = shape.num_q_heads = 1;
    shape.head_dim = kDim;
    Config config;
    config.index = name;
    pool.config = config.resolved(shape);
    const Tokens all = tokens(DType::kFloat32);
    const std::unique_ptr<SemanticIndex> index = make_index(pool.context);
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

// What front ends reserve for a sequence: its index, and four pages that sinks, window and index
// begin.
TEST(PageBoundTest, ASequenceTakesFourPagesBesideItsIndex) {
  for (const char* name : {"tree", "dci", "positional"}) {
    CacheShape shape;
    shape.num_layers = shape.num_kv_heads = shape.num_q_heads = 1;
    shape.head_dim = kDim;
    Config config;
    config.index = name;
    config.token_budget = 128;
    config.host_memory = 16 << 20;
    config.num_threads = config.index_threads = 1;
    Engine engine(shape, config);
    const SeqId id = engine.new_sequence();
    const Tokens all = clustered_tokens(1500, kDim, DType::kFloat32, 8);
    std::vector<float> out(all.keys.size());
    // Up to less than twice the prompt: then a second index is built beside the first.
    for (int at = 0, tokens = 800; at < 1500; at += tokens, tokens = 1) {
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
      engine.step({&id, 1}, 0, {&k, 1}, {&v, 1}, {&k, 1}, {&o, 1});
      const std::int64_t length = at + tokens;
      if (at == 0) engine.synchronize();
      const std::int64_t slots = engine.pool_bytes() / (2 * kDim * 4);
      const double share = std::max(1.25, most_slots(engine.config(), 1'000'000) / 1e6);
      ASSERT_LE(slots, share * static_cast<double>(length) + 64) << name << " at " << length;
    }
  }
}

// A share of the tokens that is no page of its own.
TEST(PageBoundTest, IsOneAndAFifthForATreeAndMoreWhereCellsOpenPages) {
  Config config;
  config.page_size = 16;
  config.far_node_tokens = 64;
  const auto share = [&](const char* index) {
    config.index = index;
    return static_cast<double>(most_slots(config, 1'000'000)) / 1e6;
  };
  EXPECT_NEAR(share("tree"), 1.2, 1e-3);
  EXPECT_NEAR(share("positional"), 1.0, 1e-3);
  EXPECT_NEAR(share("faiss"), 1.25, 1e-3);
  EXPECT_NEAR(share("dci"), 2.0 + 16.0 / 33.0, 1e-3);
}

}  // namespace
}  // namespace icecache::testing

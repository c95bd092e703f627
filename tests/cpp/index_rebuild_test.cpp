// A new index behind decoding: nothing is lost, and no timing shows in the answers.
#include "core/index_rebuild.h"

#include <gtest/gtest.h>

#include <random>

#include "icecache/engine.h"
#include "icecache/error.h"
#include "pool_fixture.h"

namespace icecache {
namespace {

using testing::clustered_tokens;
using testing::PoolFixture;
using testing::Tokens;

constexpr int kDim = 32, kGroup = 2, kPageSize = 8, kFirst = 4;

class IndexRebuildTest : public ::testing::Test {
 protected:
  IndexRebuildTest() : all_(clustered_tokens(400, kDim, DType::kFloat32, 3)) {
    moments_.observe(all_.keys.data(), 64, kDim);
    old_ = make_index(pool_.context);
    old_->build(all_.block(0, 200, kFirst), moments_);
  }
  void expect_holds(const SemanticIndex& index, int count) {
    index.check_integrity();
    ASSERT_EQ(index.size(), count);
    std::vector<std::byte> keys(count * kDim * sizeof(float)), values(keys.size());
    index.gather(keys.data(), values.data());
    EXPECT_TRUE(std::equal(keys.begin(), keys.end(), all_.raw_keys.begin()));
    EXPECT_TRUE(std::equal(values.begin(), values.end(), all_.raw_values.begin()));
  }
  void grow(IndexRebuild& rebuild, int from, int to) {
    for (int at = from; at < to; ++at) {
      old_->insert(all_.block(at, 1, kFirst + at));
      rebuild.reserve(1);
      rebuild.follow(all_.block(at, 1, kFirst + at));
    }
  }

  Tokens all_;
  PoolFixture pool_{300, kPageSize, kDim, kGroup};
  QueryMoments moments_;
  std::unique_ptr<SemanticIndex> old_;
};

TEST_F(IndexRebuildTest, TakesTheTokensOfItsStartAndThoseThatFollowed) {
  IndexRebuild rebuild(pool_.context, *old_, moments_, kFirst, 260);
  grow(rebuild, 200, 230);  // before the work is done: the snapshot stays what it was
  rebuild.run();
  grow(rebuild, 230, 240);
  EXPECT_FALSE(rebuild.catch_up(259)) << "not before its length";
  int calls = 1;
  while (!rebuild.catch_up(259 + calls)) ++calls;
  EXPECT_GT(calls, 2) << "a few tokens a step";
  EXPECT_EQ(rebuild.built_tokens(), 200);
  const std::unique_ptr<SemanticIndex> fresh = rebuild.take();
  ASSERT_NE(fresh, nullptr);
  expect_holds(*fresh, 240);
  expect_holds(*old_, 240);
  old_.reset();
  expect_holds(*fresh, 240);
}

TEST_F(IndexRebuildTest, RejectedTokensAreTakenBack) {
  IndexRebuild rebuild(pool_.context, *old_, moments_, kFirst, 210);
  rebuild.run();
  grow(rebuild, 200, 230);
  const auto back = [&](int tokens) {
    old_->truncate(kFirst + tokens);
    return rebuild.truncate(kFirst + tokens);
  };
  EXPECT_TRUE(back(230));
  EXPECT_TRUE(back(225)) << "none inserted yet";
  EXPECT_FALSE(rebuild.catch_up(210));
  EXPECT_FALSE(rebuild.catch_up(210)) << "a step that is done again goes no further";
  EXPECT_TRUE(back(203)) << "some inserted";
  grow(rebuild, 203, 220);
  for (int length = 210; !rebuild.catch_up(length); ++length) {
  }
  expect_holds(*rebuild.take(), 220);
  EXPECT_FALSE(back(199)) << "of the build itself";
}

TEST_F(IndexRebuildTest, WithoutPagesThereIsNoNewIndex) {
  std::vector<PageId> taken;
  pool_.pool->allocate(pool_.pool->free_pages() - 3, {}, taken);
  IndexRebuild rebuild(pool_.context, *old_, moments_, kFirst, 210);
  rebuild.run();
  EXPECT_TRUE(rebuild.catch_up(210));
  EXPECT_EQ(rebuild.take(), nullptr);
  EXPECT_EQ(pool_.pool->free_pages(), 3u) << "what it took is given back";
  for (const PageId page : taken) pool_.pool->release(page);
}

TEST_F(IndexRebuildTest, GivenUpItLeavesNothingBehind) {
  const std::size_t used = pool_.pool->used_pages();
  {
    IndexRebuild unstarted(pool_.context, *old_, moments_, kFirst, 210);
    IndexRebuild done(pool_.context, *old_, moments_, kFirst, 210);
    done.run();
  }
  EXPECT_EQ(pool_.pool->used_pages(), used);
}

// Decoding past several doublings, with and without background threads, and with integrity checks
// that come while indexes are built anew: bitwise the same.
TEST(EngineRebuild, TimingDoesNotShow) {
  constexpr int kHeads = 2, kQueryHeads = 4, kSteps = 600;
  const auto run = [&](int index_threads, bool check = false) {
    CacheShape shape;
    shape.num_layers = 1;
    shape.num_q_heads = kQueryHeads;
    shape.num_kv_heads = kHeads;
    shape.head_dim = kDim;
    Config config;
    config.token_budget = 32;
    config.sink_tokens = 4;
    config.window_tokens = 8;
    config.candidates = 32;
    config.host_memory = 64 << 20;
    config.num_threads = 2;
    config.index_threads = index_threads;
    Engine engine(shape, config);
    const SeqId id = engine.new_sequence();
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> outputs;
    for (int step = 0; step < kSteps; ++step) {
      const auto rows = [&](int heads) {
        std::vector<float> x(heads * kDim);
        for (float& value : x) value = normal(random);
        return x;
      };
      std::vector<float> k = rows(kHeads), v = rows(kHeads), q = rows(kQueryHeads),
                         o(kQueryHeads * kDim);
      const auto view = [](std::vector<float>& x, int heads) {
        return TensorView{x.data(), DType::kFloat32, heads, 1, kDim, kDim, kDim};
      };
      const TensorView keys = view(k, kHeads), values = view(v, kHeads),
                       queries = view(q, kQueryHeads), out = view(o, kQueryHeads);
      engine.step({&id, 1}, 0, {&keys, 1}, {&values, 1}, {&queries, 1}, {&out, 1});
      outputs.insert(outputs.end(), o.begin(), o.end());
      if (check) engine.check_integrity();
    }
    engine.check_integrity();
    EXPECT_EQ(engine.length(id, 0), kSteps);
    return outputs;
  };
  const std::vector<float> expected = run(1);
  EXPECT_EQ(run(2), expected);
  EXPECT_EQ(run(3), expected);
  EXPECT_EQ(run(3, true), expected);
}

// A step that does not fit frees what rebuilds hold before it is refused.
TEST(EngineStep, IsAllOrNothing) {
  CacheShape shape;
  shape.num_layers = 1;
  shape.num_q_heads = 2;
  shape.num_kv_heads = 1;
  shape.head_dim = kDim;
  Config config;
  config.token_budget = 64;
  config.host_memory = 1 << 20;
  Engine engine(shape, config);
  const SeqId id = engine.new_sequence();
  std::vector<float> kv(kDim, 0.5f), q(2 * kDim, 0.5f), o(2 * kDim), wide(2 * kDim, 0.5f);
  const TensorView keys{kv.data(), DType::kFloat32, 1, 1, kDim, kDim, kDim};
  const TensorView queries{q.data(), DType::kFloat32, 2, 1, kDim, kDim, kDim};
  const TensorView out{o.data(), DType::kFloat32, 2, 1, kDim, kDim, kDim};
  const TensorView two{wide.data(), DType::kFloat32, 1, 2, kDim, 2 * kDim, kDim};
  engine.step({&id, 1}, 0, {&keys, 1}, {&keys, 1}, {&queries, 1}, {&out, 1});
  EXPECT_EQ(engine.length(id, 0), 1);
  for (const float x : o) EXPECT_NEAR(x, 0.5f, 1e-6f);
  EXPECT_THROW(engine.step({&id, 1}, 0, {&two, 1}, {&two, 1}, {&queries, 1}, {&out, 1}),
               InvalidArgument);
  EXPECT_THROW(engine.step({&id, 1}, 0, {&keys, 1}, {&keys, 1}, {&keys, 1}, {&out, 1}),
               InvalidArgument);
  EXPECT_EQ(engine.length(id, 0), 1);
}

}  // namespace
}  // namespace icecache

// Segments that are built behind decoding: nothing is lost, and no timing shows in the answers.
#include "host/segment_build.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "host/make_index.h"
#include "icecache/engine.h"
#include "icecache/error.h"
#include "pool_fixture.h"

namespace icecache::segment_build_test {
namespace {

using testing::clustered_tokens;
using testing::PoolFixture;
using testing::Tokens;

constexpr int kDim = 32, kGroup = 2, kPageSize = 8, kFirst = 4;

class SegmentBuildTest : public ::testing::Test {
 protected:
  SegmentBuildTest() : all_(clustered_tokens(400, kDim, DType::kFloat32, 3)) {
    moments_.observe(all_.keys.data(), 64, kDim);
  }
  PageRun run(int count) {
    PageRun run(pool_.context, kFirst);
    append(run, 0, count);
    return run;
  }
  void append(PageRun& run, int begin, int count) {
    const auto view = [&](std::vector<float>& rows) {
      return TensorView{
          rows.data() + begin * kDim, DType::kFloat32, 1, count, kDim, count * kDim, kDim};
    };
    run.append(view(all_.keys), view(all_.values), 0, 0, count);
  }
  Segment built(int begin, int end) const {
    std::unique_ptr<SemanticIndex> index = make_index(pool_.context);
    index->build(all_.block(begin, end - begin, kFirst + begin), moments_);
    return Segment(std::move(index));
  }
  void expect_holds(const Segment& segment, int begin, int end) {
    segment.check_integrity();
    ASSERT_EQ(segment.first_position(), kFirst + begin);
    ASSERT_EQ(segment.end_position(), kFirst + end);
    const std::size_t row = kDim * sizeof(float);
    std::vector<std::byte> keys((end - begin) * row), values(keys.size());
    segment.gather(keys.data(), values.data());
    EXPECT_TRUE(std::equal(keys.begin(), keys.end(), all_.raw_keys.begin() + begin * row));
    EXPECT_TRUE(std::equal(values.begin(), values.end(), all_.raw_values.begin() + begin * row));
  }

  Tokens all_;
  PoolFixture pool_{300, kPageSize, kDim, kGroup};
  QueryMoments moments_;
};

TEST_F(SegmentBuildTest, SealsTheTokensOfItsStart) {
  PageRun tail = run(150);
  SegmentBuild build(pool_.context, {{}, tail, 104, {}}, moments_, 300);
  append(tail, 150, 50);  // before the work is done
  tail.pop_front(20);
  build.run();
  ASSERT_NE(build.result(), nullptr);
  expect_holds(Segment(build.result()), 0, 104);
  EXPECT_EQ(build.end_position(), kFirst + 104);
  EXPECT_EQ(build.source_count(), 0u);
}

TEST_F(SegmentBuildTest, MergesSegmentsAsTheyWereCut) {
  std::vector<Segment> sources{built(0, 120), built(120, 200).cut(kFirst + 170)};
  expect_holds(sources[1], 120, 170);
  SegmentBuild build(pool_.context, {sources, std::nullopt, 0, {}}, moments_, 300);
  EXPECT_EQ(build.source_count(), 2u);
  sources.clear();
  build.run();
  ASSERT_NE(build.result(), nullptr);
  expect_holds(Segment(build.result()), 0, 170);
}

TEST_F(SegmentBuildTest, MergesSegmentsAndTokensThatFollow) {
  PageRun tail = run(200);
  tail.pop_front(120);
  const SegmentBuild build(pool_.context, {{built(0, 120)}, tail, 50, {}}, moments_, 300);
  expect_holds(Segment(build.build()), 0, 170);
}

// Rows of eight bits mean something by their format alone.
TEST_F(SegmentBuildTest, SegmentsOfTwoFormatsAreNotMerged) {
  pool_.config.kv_dtype = "int8";
  PageRun tail = run(200);
  const auto sealed = [&](std::optional<RowFormat> format) {
    return Segment(SegmentBuild(pool_.context, {{}, tail, 80, format}, moments_, 0).build());
  };
  const Segment first = sealed({});
  const RowFormat format = first.index().table().format();
  tail.pop_front(80);
  const std::size_t used = pool_.pool->used_pages();
  for (const std::optional<RowFormat>& of_head :
       {std::optional(format), std::optional<RowFormat>()}) {
    const SegmentBuild build(pool_.context, {{first, sealed({})}, std::nullopt, 0, of_head},
                             moments_, 0);
    EXPECT_THROW(build.build(), Error);
  }
  EXPECT_EQ(pool_.pool->used_pages(), used);
  const SegmentBuild build(pool_.context, {{first, sealed(format)}, std::nullopt, 0, format},
                           moments_, 0);
  EXPECT_TRUE(build.build()->table().format().is(format));
}

TEST_F(SegmentBuildTest, WithoutPagesThereIsNoSegment) {
  const PageRun tail = run(150);
  SegmentBuild build(pool_.context, {{}, tail, 104, {}}, moments_, 300);
  std::vector<PageId> taken;
  pool_.pool->allocate(pool_.pool->free_pages() - 3, {}, taken);
  EXPECT_THROW(build.build(), OutOfPages);
  build.run();
  EXPECT_EQ(build.result(), nullptr);
  EXPECT_EQ(pool_.pool->free_pages(), 3u) << "what it took is given back";
  for (const PageId page : taken) pool_.pool->release(page);
}

TEST_F(SegmentBuildTest, GivenUpItLeavesNothingBehind) {
  const PageRun tail = run(150);
  const std::size_t used = pool_.pool->used_pages();
  {
    SegmentBuild unstarted(pool_.context, {{}, tail, 104, {}}, moments_, 300);
    SegmentBuild done(pool_.context, {{}, tail, 104, {}}, moments_, 300);
    done.run();
  }
  EXPECT_EQ(pool_.pool->used_pages(), used);
}

// What is cut is seen no more, neither in the pages nor in the means of the nodes.
TEST_F(SegmentBuildTest, ACutLeavesTheMeansOfWhatIsLeft) {
  for (float& x : all_.values) x += 3.0f;
  for (int i = 170; i < 175; ++i) all_.values[i * kDim] = 1e30f;  // nothing of them may remain
  all_.encode();
  const Segment whole = built(0, 200);
  for (const int left : {199, 170, 100, 17, 1}) {
    const Segment segment = whole.cut(kFirst + left);
    expect_holds(segment, 0, left);
    const SemanticIndex& index = segment.index();
    std::vector<double> sum(index.node_count() * kDim);
    std::vector<int> count(index.node_count());
    for (int page = 0; page < index.table().page_count(); ++page) {
      for (const std::int32_t position : index.table().positions_of(page)) {
        if (position < 0 || position >= kFirst + left) continue;
        ++count[index.node_of(page)];
        for (int i = 0; i < kDim; ++i) {
          sum[index.node_of(page) * kDim + i] += all_.values[(position - kFirst) * kDim + i];
        }
      }
    }
    for (int node = 0; node < index.node_count(); ++node) {
      ASSERT_EQ(segment.node_tokens(node), count[node]);
      const auto* mean = reinterpret_cast<const float*>(segment.node_mean(node));
      for (int i = 0; i < kDim && count[node] > 0; ++i) {
        const double exact = sum[node * kDim + i] / count[node];
        EXPECT_NEAR(mean[i], exact, 1e-4 * (1.0 + std::abs(exact))) << node << " of " << left;
      }
    }
  }
}

// Decoding past many seals and merges, with and without background threads, and with integrity
// checks that come while segments are built: bitwise the same.
TEST(EngineSegments, TimingDoesNotShow) {
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
    config.segment_tokens = 32;
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
    EXPECT_GT(engine.stats(0, 0).seals, 10);
    EXPECT_GT(engine.stats(0, 0).merges, 3);
    return outputs;
  };
  const std::vector<float> expected = run(1);
  EXPECT_EQ(run(2), expected);
  EXPECT_EQ(run(3), expected);
  EXPECT_EQ(run(3, true), expected);
}

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
}  // namespace icecache::segment_build_test

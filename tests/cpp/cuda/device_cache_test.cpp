// DeviceCache against attention over everything in double: on the emulator, and on a GPU where the
// build has CUDA and the machine a device.
#include "icecache/device_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "device_talk.h"
#ifdef ICECACHE_EMULATE_CUDA
#include "emulator.h"
#endif
#include "icecache/engine.h"

namespace icecache {
namespace {

// Where the budget covers everything, it is full attention: every head size, type and group.
class DeviceCacheShapes : public DeviceCacheTest,
                          public ::testing::WithParamInterface<std::tuple<int, DType, int>> {};

TEST_P(DeviceCacheShapes, FullBudgetIsFullAttention) {
  Case setup;
  std::tie(setup.head_dim, setup.dtype, setup.group) = GetParam();
  setup.budget = 400;
  Talk talk(setup, 400);
  talk.prefill(0, 150);
  talk.prefill(1, 7);  // shorter than sinks and window
  for (int t = 0; t < 24; ++t) {
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), rounding(setup.dtype)) << "step " << t;
    ASSERT_LT(talk.error(out, 1), rounding(setup.dtype)) << "step " << t;
  }
  talk.expect_complete(0);
  talk.expect_complete(1);
}

using ::testing::Combine;
using ::testing::Values;
INSTANTIATE_TEST_SUITE_P(Rows, DeviceCacheShapes,
                         Combine(Values(64, 96, 128, 256),
                                 Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                                 Values(4)),
                         shape_name);
INSTANTIATE_TEST_SUITE_P(Groups, DeviceCacheShapes,
                         Combine(Values(64, 128), Values(DType::kBFloat16), Values(1, 3, 7, 8, 16)),
                         shape_name);

TEST_F(DeviceCacheTest, WithinTheBudgetIsCloseToFullAttention) {
  Case setup;
  setup.batch = 1;
  Talk talk(setup, 4096);
  setup.tail = "off";
  Talk without(setup, 4096);
  talk.prefill(0, 3000);
  without.prefill(0, 3000);
  double with_tail = 0, no_tail = 0;
  for (int t = 0; t < 8; ++t) {
    with_tail += talk.error(talk.step(), 0) / 8;
    no_tail += without.error(without.step(), 0) / 8;
  }
  EXPECT_LT(with_tail, 0.08);
  EXPECT_LT(with_tail, 0.7 * no_tail);
  talk.expect_complete(0);
}

// Two tokens of nearly equal weight and opposite values: what is left is how far the weights are
// apart, of which eight bits would not show much.
TEST_F(DeviceCacheTest, WeightsHaveMoreBitsThanValues) {
  Case setup;
  setup.head_dim = 128;
  setup.dtype = DType::kBFloat16;
  setup.batch = 1;
  Talk talk(setup, 400);
  talk.prefill(0, 1);
  Rows k(setup.dtype, static_cast<std::size_t>(setup.kv_heads) * setup.head_dim), v = k;
  for (std::size_t i = 0; i < k.size(); ++i) {
    k.set(i, talk.normal());
    v.set(i, -talk.values[0][i / setup.head_dim][i % setup.head_dim]);
  }
  talk.queries = Rows(setup.dtype, k.size() * setup.group);
  for (std::size_t i = 0; i < talk.queries.size(); ++i) talk.queries.set(i, 0.02f * talk.normal());
  EXPECT_LT(talk.error(talk.step(k, v), 0), rounding(setup.dtype));
}

// The same algorithm as on the CPU: the engine there comes as close to full attention.
TEST_F(DeviceCacheTest, IsAsCloseAsTheEngineOnTheCpu) {
  Case setup;
  setup.batch = 1;
  setup.budget = 96;
  setup.far_node_tokens = 32;
  Talk talk(setup, 4096);
  const int tokens = 3000, heads = setup.kv_heads, d = setup.head_dim;
  talk.prefill(0, tokens);
  Engine engine(talk.shape, talk.cache->config());
  const std::vector<SeqId> sequence = {engine.new_sequence()};
  // The last `count` tokens of every head, as [Hkv, count, D].
  const auto last = [&](const std::vector<std::vector<float>>& all, int count) {
    Rows rows(talk.shape.dtype, static_cast<std::size_t>(heads) * count * d);
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < count * d; ++i) {
        rows.set(static_cast<std::size_t>(h) * count * d + i,
                 all[h][all[h].size() - count * d + i]);
      }
    }
    return rows;
  };
  const auto view = [&](Rows& rows, int of, int count) {
    return TensorView{rows.data(), talk.shape.dtype, of, count, d, std::int64_t{count} * d, d};
  };
  Rows keys = last(talk.keys[0], tokens), values = last(talk.values[0], tokens);
  const TensorView prompt_keys[] = {view(keys, heads, tokens)};
  const TensorView prompt_values[] = {view(values, heads, tokens)};
  const TensorView seen[] = {view(talk.prompt_queries, talk.shape.num_q_heads, 128)};
  engine.append(sequence, 0, prompt_keys, prompt_values);
  engine.observe(sequence, 0, seen);
  double on_device = 0, on_cpu = 0;
  for (int t = 0; t < 10; ++t) {
    on_device += talk.error(talk.step(), 0) / 10;
    Rows k = last(talk.keys[0], 1), v = last(talk.values[0], 1), q = talk.queries, out = q;
    const TensorView key[] = {view(k, heads, 1)}, value[] = {view(v, heads, 1)};
    const TensorView query[] = {view(q, talk.shape.num_q_heads, 1)};
    const TensorView result[] = {view(out, talk.shape.num_q_heads, 1)};
    engine.step(sequence, 0, key, value, query, result);
    on_cpu += talk.error(out, 0) / 10;
  }
  EXPECT_LT(on_device, 1.1 * on_cpu);
  EXPECT_GT(on_device, 0.9 * on_cpu);
}

TEST_F(DeviceCacheTest, OptionsAllWork) {
  for (const int page_size : {8, 16, 32}) {
    for (const int node : {32, 64}) {
      for (const int rank : {32, 64}) {
        Case setup;
        setup.batch = 1;
        setup.kv_heads = 1;
        setup.page_size = page_size;
        setup.far_node_tokens = node;
        setup.rank = rank;
        setup.dtype = DType::kBFloat16;
        Talk talk(setup, 1200);
        talk.prefill(0, 1100);  // two blocks of the scan
        EXPECT_LT(talk.error(talk.step(), 0), 0.15) << page_size << " " << node << " " << rank;
        talk.expect_complete(0);
      }
    }
  }
}

TEST_F(DeviceCacheTest, TheSameCallsGiveTheSameBits) {
  Case setup;
  Talk one(setup, 3000), two(setup, 3000);
  for (Talk* talk : {&one, &two}) {
    talk->prefill(0, 2500);
    talk->prefill(1, 900);
  }
  for (int t = 0; t < 6; ++t) ASSERT_TRUE(same(one.step(), two.step())) << "step " << t;
}

// The row cache changes what moves, and nothing else.
TEST_F(DeviceCacheTest, EvictionChangesNoResult) {
  Case setup;
  setup.batch = 1;
  Talk large(
      [&] {
        setup.device_pages = 1024;
        return setup;
      }(),
      3000);
  Talk small(
      [&] {
        setup.device_pages = 1;
        return setup;
      }(),
      3000);
  large.prefill(0, 2800);
  small.prefill(0, 2800);
  for (int t = 0; t < 30; ++t) ASSERT_TRUE(same(large.step(), small.step())) << "step " << t;
  const HeadStats few = small.cache->stats(0, -1, nullptr),
                  many = large.cache->stats(0, -1, nullptr);
  EXPECT_GT(few.misses, many.misses);
  EXPECT_EQ(few.misses + few.hits, many.misses + many.hits);
  EXPECT_GT(few.bytes_moved, many.bytes_moved);
  EXPECT_GT(many.hits, 0);
  EXPECT_EQ(few.steps, 30 * 2);
  small.expect_complete(0);
}

#ifdef ICECACHE_EMULATE_CUDA
// One block for each pair, which takes all its chunks, or one for every chunk and share: the same
// tokens, and sums that differ by rounding.
TEST_F(DeviceCacheTest, HowManyBlocksThereAreChangesNoChoice) {
  Case setup;
  setup.dtype = DType::kFloat32;
  setup.budget = 64;  // little room: another choice would show
  std::vector<std::unique_ptr<Talk>> talks;
  for (const int count : {1, 64}) {
    emulator::multiprocessors = count;
    talks.push_back(std::make_unique<Talk>(setup, 3100));
    talks.back()->prefill(0, 3000);
    talks.back()->prefill(1, 100);
  }
  emulator::multiprocessors = 8;
  for (int t = 0; t < 3; ++t) {
    const Rows few = talks[0]->step(), many = talks[1]->step();
    for (std::size_t i = 0; i < few.size(); ++i) {
      ASSERT_NEAR(few.get(i), many.get(i), 1e-5) << "step " << t << ", number " << i;
    }
  }
  EXPECT_EQ(talks[0]->cache->stats(0, -1, nullptr).misses,
            talks[1]->cache->stats(0, -1, nullptr).misses);
}
#endif

TEST_F(DeviceCacheTest, GeneratedTokensJoinTheIndex) {
  Case setup;
  setup.batch = 1;
  setup.kv_heads = 1;
  setup.budget = 64;
  setup.far_node_tokens = 32;
  Talk talk(setup, 700);
  talk.prefill(0, 300);
  double error = 0;
  for (int t = 0; t < 300; ++t) {
    const Rows out = talk.step();
    if (t >= 292) error += talk.error(out, 0) / 8;
  }
  EXPECT_LT(error, 0.25);
  talk.expect_complete(0);
}

// A short prompt shapes a poor metric; built anew, the index sees what came after it.
TEST_F(DeviceCacheTest, ARebuiltIndexServesAGrownSequence) {
  Case setup;
  setup.kv_heads = 1;
  setup.budget = 64;
  setup.far_node_tokens = 32;
  Talk talk(setup, 400);
  talk.prefill(0, 24);
  for (int t = 0; t < 130; ++t) talk.step({0, -1});
  talk.fork(1, 0);
  talk.cache->rebuild(0, 1, nullptr);  // no longer shares pages
  const std::int64_t pages = talk.cache->memory().host_bytes;
  talk.cache->rebuild(0, 1, nullptr);
  EXPECT_EQ(talk.cache->memory().host_bytes, pages);
  talk.expect_complete(1);
  double kept = 0, rebuilt = 0;
  for (int t = 0; t < 24; ++t) {
    const Rows out = talk.step();
    kept += talk.error(out, 0) / 24;
    rebuilt += talk.error(out, 1) / 24;
  }
  EXPECT_LT(rebuilt, 0.8 * kept);
  talk.expect_complete(0);
  talk.expect_complete(1);
}

TEST_F(DeviceCacheTest, ASecondPromptTakesThePlaceOfTheFirst) {
  Case setup;
  Talk talk(setup, 2000);
  talk.prefill(0, 1500);
  talk.prefill(1, 400);
  for (int t = 0; t < 30; ++t) talk.step();
  talk.prefill(0, 700);
  const Rows out = talk.step();
  EXPECT_LT(talk.error(out, 0), 0.15);
  EXPECT_LT(talk.error(out, 1), 0.15);
  talk.expect_complete(0);
  talk.expect_complete(1);
}

TEST_F(DeviceCacheTest, EmptySequencesAreZeroAndFullOnesNaN) {
  Case setup;
  setup.kv_heads = 1;
  Talk talk(setup, 40);
  talk.prefill(0, 38);
  std::int64_t held = 38;
  for (; held < talk.room(); ++held) {
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), 1e-4);
    for (std::size_t i = out.size() / 2; i < out.size(); ++i) ASSERT_EQ(out.get(i), 0.0f);
  }
  const Rows out = talk.step();
  for (std::size_t i = 0; i < out.size() / 2; ++i) ASSERT_TRUE(std::isnan(out.get(i)));
  EXPECT_EQ(talk.cache->length(0, 0, nullptr), held);
  talk.expect_complete(0);
}

// As a server steps: some sequences, in whatever rows, while prompts come and go.
TEST_F(DeviceCacheTest, SequencesStepInTheRowsTheyAreGiven) {
  Case setup;
  setup.batch = 4;
  Talk talk(setup, 1200);
  talk.prefill(0, 900);
  talk.prefill(1, 300);
  talk.prefill(2, 9);
  const std::vector<std::vector<std::int32_t>> batches = {
      {2, 0, 1, -1}, {-1, 1, 0, -1}, {0, -1, -1, -1}, {0, 1, 2, 3}};
  for (const auto& rows : batches) {
    const Rows out = talk.step(rows);
    for (int b = 0; b < 3; ++b) {
      if (rows[b] < 0) continue;
      EXPECT_LT(talk.error(out, b), 0.1) << "sequence " << b;
    }
  }
  talk.prefill(3, 700);
  const Rows out = talk.step({-1, -1, 0, 1});
  EXPECT_LT(talk.error(out, 2), rounding(setup.dtype));
  EXPECT_LT(talk.error(out, 3), 0.1);
  for (int b = 0; b < setup.batch; ++b) talk.expect_complete(b);
}

// Neither the row nor who else takes part changes a bit.
TEST_F(DeviceCacheTest, RowsChangeNoResult) {
  Case setup;
  Talk alone(setup, 2200), among(setup, 2200);
  for (Talk* talk : {&alone, &among}) {
    talk->prefill(0, 2000);
    talk->prefill(1, 1000);
  }
  for (int t = 0; t < 4; ++t) {
    const Rows all = alone.step(), permuted = among.step({1, 0});
    EXPECT_TRUE(same(all, permuted)) << "step " << t;
  }
}

TEST_F(DeviceCacheTest, AForkGoesItsOwnWay) {
  Case setup;
  Talk talk(setup, 2000);
  talk.prefill(0, 1500);
  for (int t = 0; t < 5; ++t) talk.step();
  const std::int64_t before = talk.cache->memory().host_bytes;
  talk.fork(1, 0);
  EXPECT_LT(talk.cache->memory().host_bytes, 2 * before);  // full pages are shared
  for (int t = 0; t < 60; ++t) {
    const Rows out = talk.step();
    if (t % 20 != 0) continue;
    ASSERT_LT(talk.error(out, 0), 0.15);
    ASSERT_LT(talk.error(out, 1), 0.15);
  }
  talk.expect_complete(0);
  talk.expect_complete(1);
  talk.prefill(0, 1600);  // does not write what the fork shares
  talk.expect_complete(1);
  talk.cache->release(0, nullptr);
  talk.expect_complete(1);
  talk.cache->release(1, nullptr);
  EXPECT_EQ(talk.cache->memory().host_bytes, 0);
}

TEST_F(DeviceCacheTest, EqualZeroAndHugeKeys) {
  for (const float size : {0.0f, 1.0f, 1e15f}) {
    Case setup;
    setup.batch = 1;
    setup.kv_heads = 1;
    setup.budget = 128;
    Talk talk(setup, 3000);
    talk.prefill(0, 40);
    const int tokens = 2600;
    Rows k(talk.shape.dtype, static_cast<std::size_t>(tokens) * 64), v = k, q = k;
    talk.keys[0].assign(1, {});
    talk.values[0].assign(1, {});
    for (std::size_t i = 0; i < k.size(); ++i) {
      k.set(i, size);
      v.set(i, 1.0f);
      q.set(i, 0.5f);
      talk.keys[0][0].push_back(size);
      talk.values[0][0].push_back(1.0f);
    }
    Rows queries(talk.shape.dtype, static_cast<std::size_t>(4) * 100 * 64);
    for (std::size_t i = 0; i < queries.size(); ++i) queries.set(i, 0.01f);
    const OnDevice on_k(k), on_v(v), on_q(queries);
    talk.cache->prefill(0, 0, {on_k.data(), DType::kFloat32, 1, tokens, 64, tokens * 64, 64},
                        {on_v.data(), DType::kFloat32, 1, tokens, 64, tokens * 64, 64},
                        {on_q.data(), DType::kFloat32, 4, 100, 64, 6400, 64}, nullptr);
    talk.cache->wait(0);
    talk.queries = Rows(talk.shape.dtype, 4 * 64);
    for (std::size_t i = 0; i < talk.queries.size(); ++i) talk.queries.set(i, 0.01f);
    Rows new_k(talk.shape.dtype, 64), new_v = new_k;
    for (std::size_t i = 0; i < 64; ++i) {
      new_k.set(i, size);
      new_v.set(i, 1.0f);
    }
    const Rows out = talk.step(new_k, new_v);
    for (std::size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out.get(i), 1.0f, 1e-3) << size;
    talk.expect_complete(0);
  }
}

TEST_F(DeviceCacheTest, NaNReachesOnlyItsOwnSequence) {
  Case setup;
  Talk talk(setup, 2000);
  talk.prefill(0, 1200);
  talk.prefill(1, 1200);
  talk.step();
  Rows k(talk.shape.dtype, 2 * 2 * 64), v = k;
  for (std::size_t i = 0; i < k.size(); ++i) k.set(i, i < k.size() / 2 ? NAN : 0.1f);
  const Rows out = talk.step(k, v);
  EXPECT_TRUE(std::isnan(out.get(0)));
  EXPECT_LT(talk.error(out, 1), 0.15);
  EXPECT_LT(talk.error(talk.step(), 1), 0.15);
}

}  // namespace
}  // namespace icecache

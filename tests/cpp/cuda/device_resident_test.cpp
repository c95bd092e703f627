// Resident sequences (device_tokens): full attention while the device holds all their tokens, and
// the budget from the step on at which it no longer does.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#include "device_talk.h"
#ifdef ICECACHE_EMULATE_CUDA
#include "emulator.h"
#endif

namespace icecache {
namespace {

constexpr int kExtent = 256;  // tokens

// Little budget: what is within it is far from full attention.
Case resident_case(std::int64_t device_tokens) {
  Case setup;
  setup.budget = 48;
  setup.device_tokens = device_tokens;
  return setup;
}

void expect_counts(const Talk& talk, int resident, int sparse) {
  const DeviceCacheMemory memory = talk.cache->memory();
  EXPECT_EQ(memory.resident_sequences, resident);
  EXPECT_EQ(memory.sparse_sequences, sparse);
}

// A step in which those of `exact` are resident, and the others answer within the budget.
void expect_step(Talk& talk, const std::vector<bool>& exact,
                 const std::vector<std::int32_t>& rows = {}) {
  const auto full_steps = [&] {
    return talk.cache->stats(0, -1, nullptr).dense_steps / talk.shape.num_kv_heads;
  };
  const std::int64_t before = full_steps();
  const Rows out = talk.step(rows);
  int expected = 0;
  for (std::size_t b = 0; b < exact.size(); ++b) {
    if (!rows.empty() && rows[b] < 0) continue;
    EXPECT_LT(talk.error(out, static_cast<int>(b)), exact[b] ? rounding(talk.shape.dtype) : 0.3)
        << "sequence " << b;
    expected += exact[b] ? 1 : 0;
  }
  EXPECT_EQ(full_steps() - before, expected);
}

class DeviceResidentShapes : public DeviceCacheTest,
                             public ::testing::WithParamInterface<std::tuple<int, DType, int>> {};

TEST_P(DeviceResidentShapes, IsFullAttention) {
  Case setup = resident_case(4096);
  std::tie(setup.head_dim, setup.dtype, setup.group) = GetParam();
  Talk talk(setup, 1000);
  talk.prefill(0, kExtent - 2);
  talk.prefill(1, 7);  // shorter than sinks and window
  for (int t = 0; t < 4; ++t) {
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), rounding(setup.dtype)) << "step " << t;
    ASSERT_LT(talk.error(out, 1), rounding(setup.dtype)) << "step " << t;
  }
  EXPECT_EQ(talk.cache->stats(0, -1, nullptr).dense_steps, 4 * 2 * setup.kv_heads);
  EXPECT_EQ(talk.cache->stats(0, -1, nullptr).steps, 0);
  talk.expect_complete(0);
  talk.expect_complete(1);
}

using ::testing::Combine;
using ::testing::Values;
INSTANTIATE_TEST_SUITE_P(Rows, DeviceResidentShapes,
                         Combine(Values(64, 96, 128, 256),
                                 Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                                 Values(4)),
                         shape_name);
INSTANTIATE_TEST_SUITE_P(Groups, DeviceResidentShapes,
                         Combine(Values(64, 128), Values(DType::kBFloat16), Values(1, 3, 8, 16)),
                         shape_name);

TEST_F(DeviceCacheTest, ResidentsOfAnyLengthAttendToAll) {
  Case setup = resident_case(8192);
  setup.kv_heads = 1;
  setup.batch = 1;
  Talk talk(setup, 4000);
  for (const int tokens :
       {1, 2, 14, 15, 16, 17, 19, 20, 21, 62, 63, 64, 65, 127, 255, 256, 511, 1023, 2047}) {
    talk.prefill(0, tokens);
    for (int t = 0; t < 2; ++t) {
      ASSERT_LT(talk.error(talk.step(), 0), rounding(setup.dtype)) << tokens << " + " << t;
    }
    talk.expect_complete(0);
  }
}

// Whoever was resident answers from then on as if it had never been, to the bit: the index was made
// behind its steps.
TEST_F(DeviceCacheTest, AfterTheSwitchNothingIsLeftOfResidence) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Case setup = resident_case(8192);
    setup.dtype = dtype;
    Talk resident(setup, 2000);
    setup.device_tokens = 0;
    Talk sparse(setup, 2000);
    for (Talk* talk : {&resident, &sparse}) {
      talk->prefill(0, 600);
      talk->prefill(1, 60);
    }
    expect_counts(resident, 2, 0);
    expect_counts(sparse, 0, 2);
    for (int t = 0; t < 24; ++t) {
      const Rows exact = resident.step();
      sparse.step();
      ASSERT_LT(resident.error(exact, 0), rounding(dtype)) << "step " << t;
      ASSERT_LT(resident.error(exact, 1), rounding(dtype)) << "step " << t;
    }
    resident.cache->evict(0, nullptr);
    expect_counts(resident, 1, 1);
    const Rows mixed = resident.step(), budget = sparse.step();
    EXPECT_LT(resident.error(mixed, 0), 0.2);
    EXPECT_LT(resident.error(mixed, 1), rounding(dtype));
    EXPECT_EQ(0, std::memcmp(mixed.data(), budget.data(), mixed.bytes() / 2));
    resident.cache->evict(1, nullptr);
    for (int t = 0; t < 4; ++t) ASSERT_TRUE(same(resident.step(), sparse.step())) << "step " << t;
    resident.expect_complete(0);
    resident.expect_complete(1);
  }
}

// The index of a short prompt is made without a fit, which the budget does not need before there is
// more than it holds.
TEST_F(DeviceCacheTest, ShortResidentsAreWithinTheBudgetAsAnyOther) {
  Case setup;
  setup.dtype = DType::kBFloat16;
  setup.device_tokens = 8192;
  Talk talk(setup, 2000);
  talk.prefill(0, 245);
  talk.prefill(1, 3);
  expect_step(talk, {true, true});
  for (const int b : {0, 1}) talk.cache->evict(b, nullptr);
  for (int t = 0; t < 10; ++t) {  // up to the budget
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), rounding(setup.dtype)) << "step " << t;
    ASSERT_LT(talk.error(out, 1), rounding(setup.dtype)) << "step " << t;
  }
  for (int t = 0; t < 20; ++t) talk.step();
  EXPECT_LT(talk.error(talk.step(), 0), 0.15);
  for (const int b : {0, 1}) talk.expect_complete(b);
  talk.cache->rebuild(0, 0, nullptr);
  EXPECT_LT(talk.error(talk.step(), 0), 0.15);
  talk.truncate(0, 150);
  EXPECT_LT(talk.error(talk.step(), 0), rounding(setup.dtype));
  talk.expect_complete(0);
}

// Extents go to the shorter ones; a sequence that would be the longest does not get any.
TEST_F(DeviceCacheTest, TheLongestGivesWay) {
  Case setup = resident_case(6 * kExtent);
  setup.batch = 4;
  setup.kv_heads = 1;
  Talk talk(setup, 3000);
  EXPECT_GT(talk.cache->memory().resident_bytes, 0);
  const auto prefill = [&](int b, int tokens) {
    talk.cache->reserve(b, tokens + 1, nullptr);
    talk.prefill(b, tokens);
  };
  prefill(0, 700);  // 3 extents
  prefill(1, 400);  // 2
  expect_step(talk, {true, true});
  prefill(2, 1000);  // 4, of which there is one
  expect_step(talk, {true, true, false});
  prefill(3, 300);  // 2: the first gives way
  expect_step(talk, {false, true, false, true});
  expect_counts(talk, 2, 2);
  // Two extents are left, and two sequences grow.
  for (int b : {1, 3}) talk.cache->reserve(b, 600, nullptr);
  expect_step(talk, {false, true, false, true});
  talk.cache->reserve(1, 800, nullptr);  // the longest itself
  expect_step(talk, {false, false, false, true});
  for (int b = 0; b < 4; ++b) talk.expect_complete(b);
  // A prompt that takes the place of another is as good as any.
  prefill(2, 100);
  expect_step(talk, {false, false, true, true});
  talk.cache->release(3, nullptr);
  talk.keys[3].clear();
  prefill(3, 500);
  expect_step(talk, {false, false, true, true});
}

// A sequence that outgrows its extents goes on within the budget; tokens taken back up to where it
// was resident make it so again.
TEST_F(DeviceCacheTest, TokensTakenBackAroundTheSwitch) {
  Case setup = resident_case(4 * kExtent);
  setup.kv_heads = 1;
  Talk talk(setup, 2000);
  talk.cache->reserve(0, 500, nullptr);
  talk.prefill(0, 495);
  for (int t = 0; t < 2 * kExtent - 495; ++t) expect_step(talk, {true});
  for (int t = 0; t < 5; ++t) expect_step(talk, {false});
  talk.truncate(0, 2 * kExtent + 2);
  expect_step(talk, {false});
  talk.truncate(0, 2 * kExtent - 3);
  for (int t = 0; t < 3; ++t) expect_step(talk, {true});
  expect_step(talk, {false});
  talk.truncate(0, 300);  // into the prompt: a build of what is left
  talk.expect_complete(0);
  for (int t = 0; t < 3; ++t) expect_step(talk, {true});
  talk.cache->rebuild(0, 0, nullptr);
  expect_step(talk, {true});
  talk.cache->evict(0, nullptr);
  expect_step(talk, {false});
  talk.cache->rebuild(0, 0, nullptr);  // does not bring it back
  expect_step(talk, {false});
  talk.expect_complete(0);
}

TEST_F(DeviceCacheTest, ForksAroundTheSwitch) {
  Case setup = resident_case(5 * kExtent);
  setup.batch = 3;
  Talk talk(setup, 2000);
  talk.cache->reserve(0, 500, nullptr);
  talk.prefill(0, 400);
  for (int t = 0; t < 3; ++t) talk.step({0, -1, -1});
  talk.fork(1, 0);
  expect_counts(talk, 2, 0);
  talk.fork(2, 0);  // one extent is left
  expect_counts(talk, 2, 1);
  expect_step(talk, {true, true, false}, {2, 0, 1});
  expect_step(talk, {true, true, false}, {0, -1, 1});
  talk.cache->evict(0, nullptr);
  expect_step(talk, {false, true, false}, {1, 2, 0});
  talk.fork(1, 0);  // of one that is sparse
  expect_counts(talk, 0, 3);
  expect_step(talk, {false, false, false}, {1, 2, 0});
  for (int b = 0; b < 3; ++b) talk.expect_complete(b);
}

// Where it stands in the batch, and who else does, changes no bit of a resident's answer.
TEST_F(DeviceCacheTest, RowsOfResidentsChangeNoResult) {
  const Case setup = resident_case(8192);
  Talk alone(setup, 1200), among(setup, 1200);
  for (Talk* talk : {&alone, &among}) {
    talk->prefill(0, 700);
    talk->prefill(1, 90);
  }
  among.cache->evict(1, nullptr);
  for (int t = 0; t < 3; ++t) {
    const Rows all = alone.step(), permuted = among.step({1, 0});
    EXPECT_EQ(0, std::memcmp(all.data(), permuted.data(), all.bytes() / 2)) << "step " << t;
  }
}

// Whatever happens to the sequences, as many as the host believes to be resident attend to all.
TEST_F(DeviceCacheTest, ResidentsComeAndGoInAnyOrder) {
  Case setup = resident_case(5 * kExtent);
  setup.batch = 4;
  setup.kv_heads = 1;
  setup.group = 2;
  Talk talk(setup, 700);
  std::mt19937 random(5);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  const auto tokens_of = [&](int b) {
    return talk.keys[b].empty() ? 0 : static_cast<int>(talk.keys[b][0].size()) / talk.d();
  };
  int mixed = 0;
  for (int t = 0; t < 160; ++t) {
    const int b = below(4), other = below(4), tokens = tokens_of(b);
    switch (below(9)) {
      case 0: {
        const int prompt = 1 + below(below(2) == 0 ? 60 : 600);
        if (below(2) == 0) talk.cache->reserve(b, prompt + 1, nullptr);
        talk.prefill(b, prompt);
        break;
      }
      case 1:
        if (tokens > 0 && other != b) talk.fork(other, b);
        break;
      case 2:
        if (tokens > 1) talk.truncate(b, 1 + below(tokens));
        break;
      case 3:
        if (tokens > 1) talk.truncate(b, std::max(1, tokens - below(8)));
        break;
      case 4:
        talk.cache->evict(b, nullptr);
        break;
      case 5:
        talk.cache->rebuild(0, b, nullptr);
        break;
      case 6:
        talk.cache->release(b, nullptr);
        talk.keys[b].clear();
        break;
      default:
        break;
    }
    for (int i = 0; i < 4; ++i) {
      if (tokens_of(i) > 0 && tokens_of(i) < 690) talk.cache->reserve(i, tokens_of(i) + 1, nullptr);
    }
    const DeviceCacheMemory memory = talk.cache->memory();
    const std::int64_t before = talk.cache->stats(0, -1, nullptr).dense_steps;
    const Rows out = talk.step();
    ASSERT_EQ(talk.cache->stats(0, -1, nullptr).dense_steps - before, memory.resident_sequences)
        << "after " << t;
    int exact = 0, all = 0;
    for (int i = 0; i < 4; ++i) {
      if (tokens_of(i) == 0) continue;
      const double error = talk.error(out, i);
      ASSERT_LT(error, 0.5) << "sequence " << i << " of " << tokens_of(i) << " after " << t;
      exact += error < rounding(setup.dtype) ? 1 : 0;
      ++all;
    }
    ASSERT_GE(exact, memory.resident_sequences) << "after " << t;
    ASSERT_EQ(all, memory.resident_sequences + memory.sparse_sequences);
    mixed += memory.resident_sequences > 0 && memory.sparse_sequences > 0 ? 1 : 0;
    if (t % 16 == 0 && tokens_of(b) > 0) talk.expect_complete(b);
  }
  EXPECT_GT(mixed, 40);
}

TEST_F(DeviceCacheTest, ResidentsWithoutRoomAreNaNAndNaNStaysWithItsSequence) {
  Case setup = resident_case(4096);
  setup.kv_heads = 1;
  Talk talk(setup, 80);
  talk.prefill(0, 38);
  Rows k(talk.shape.dtype, 2 * 64), v = k;
  for (std::size_t i = 0; i < k.size(); ++i) k.set(i, 0.1f);
  talk.step();
  const std::int64_t room = talk.room();
  for (std::int64_t held = 39; held < room; ++held) {
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), rounding(setup.dtype));
    for (std::size_t i = out.size() / 2; i < out.size(); ++i) ASSERT_EQ(out.get(i), 0.0f);
  }
  Rows out = talk.step();
  for (std::size_t i = 0; i < out.size() / 2; ++i) ASSERT_TRUE(std::isnan(out.get(i)));
  EXPECT_EQ(talk.cache->length(0, 0, nullptr), room);
  talk.prefill(0, 30);
  talk.prefill(1, 30);
  for (std::size_t i = 0; i < 64; ++i) k.set(i, NAN);
  out = talk.step(k, v);
  EXPECT_TRUE(std::isnan(out.get(0)));
  EXPECT_LT(talk.error(out, 1), rounding(setup.dtype));
}

TEST_F(DeviceCacheTest, RefusesDeviceTokensThatCannotBe) {
  EXPECT_THROW(Talk(resident_case(-1), 1000), InvalidArgument);
  EXPECT_THROW(Talk(resident_case((std::int64_t{1} << 30) + 1), 1000), InvalidArgument);
  // No more than the sequences can hold is taken.
  const std::int64_t all =
      Talk(resident_case(std::int64_t{1} << 30), 1000).cache->memory().resident_bytes;
  EXPECT_EQ(all, 2 * 5 * kExtent * 2 * 2 * 64 * 4);  // max_tokens is rounded up to whole nodes
  EXPECT_EQ(Talk(resident_case(1), 1000).cache->memory().resident_bytes * 10, all);
  EXPECT_THROW(Talk(resident_case(1), 1000).cache->evict(2, nullptr), InvalidArgument);
}

#ifdef ICECACHE_EMULATE_CUDA
TEST_F(DeviceCacheTest, HowManyBlocksAttendToAllChangesRoundingAlone) {
  std::vector<std::unique_ptr<Talk>> talks;
  for (const int count : {1, 64}) {
    emulator::multiprocessors = count;
    talks.push_back(std::make_unique<Talk>(resident_case(8192), 3100));
    talks.back()->prefill(0, 3000);
    talks.back()->prefill(1, 100);
  }
  emulator::multiprocessors = 8;
  for (int t = 0; t < 2; ++t) {
    const Rows few = talks[0]->step(), many = talks[1]->step();
    ASSERT_LT(talks[0]->error(few, 0), rounding(DType::kFloat32));
    ASSERT_LT(talks[1]->error(many, 0), rounding(DType::kFloat32));
  }
}

TEST_F(DeviceCacheTest, AResidentWhosePromptFailsIsAsBefore) {
  Case setup = resident_case(4 * kExtent);
  Talk talk(setup, 1500);
  EXPECT_THROW(
      [&] {
        emulator::device_room = 100'000;
        Talk(setup, 1500);
      }(),
      OutOfPages);
  emulator::device_room = std::size_t{1} << 40;
  talk.cache->reserve(0, 300, nullptr);
  talk.prefill(0, 260);
  EXPECT_LT(talk.error(talk.step(), 0), rounding(setup.dtype));
  const auto keys = talk.keys[0], values = talk.values[0];
  emulator::device_room = 100'000;
  EXPECT_THROW(talk.prefill(0, 261), OutOfPages);  // as many tokens as it has
  emulator::device_room = std::size_t{1} << 40;
  talk.keys[0] = keys;
  talk.values[0] = values;
  talk.expect_complete(0);
  EXPECT_LT(talk.error(talk.step(), 0), 0.3);  // of its old tokens
  talk.prefill(0, 280);
  EXPECT_LT(talk.error(talk.step(), 0), rounding(setup.dtype));
}
#endif

}  // namespace
}  // namespace icecache

// Room of sequences: by steps, of the device and of the host, all or nothing.
#include "device_talk.h"
#ifdef ICECACHE_EMULATE_CUDA
#include "emulator.h"
#endif

namespace icecache {
namespace {

constexpr int kMost = 4000, kStep = DeviceCache::kRoomStep;

int near_rows(const Talk& talk) {
  return static_cast<int>(talk.cache->config().sink_tokens + talk.cache->config().window_tokens);
}

TEST_F(DeviceCacheTest, RoomThatGrowsChangesNoResult) {
#ifdef __SANITIZE_ADDRESS__
  const std::vector<bool> types = {true};
#else
  const std::vector<bool> types = {false, true};
#endif
  for (const bool half : types) {
    Case setup;
    setup.dtype = half ? DType::kBFloat16 : DType::kFloat32;
    setup.far_node_tokens = half ? 32 : 64;
    Talk whole(setup, kMost), grown(setup, kMost);
    const int near = near_rows(grown);
    const int tokens[] = {near + kStep - 10, near + 2 * kStep - 15};
    for (const int b : {0, 1}) {
      grown.cache->reserve(b, tokens[b], nullptr);
      grown.prefill(b, tokens[b]);
      whole.prefill(b, tokens[b]);
    }
    EXPECT_LT(grown.cache->memory().host_bytes, whole.cache->memory().host_bytes);
    for (int t = 1; t <= 25; ++t) {  // past what was reserved
      for (const int b : {0, 1}) grown.cache->reserve(b, tokens[b] + t, nullptr);
      ASSERT_TRUE(same(grown.step(), whole.step())) << t;
    }
    grown.expect_complete(0);
    grown.expect_complete(1);
  }
}

TEST_F(DeviceCacheTest, WithoutRoomASequenceIsNaNAndStays) {
  Talk talk({}, kMost);
  talk.cache->reserve(0, 1, nullptr);  // one step, and the near rows
  const int room = kStep + near_rows(talk);
  talk.prefill(0, room - 1);
  talk.prefill(1, 300);
  ASSERT_LT(talk.error(talk.step(), 0), 0.15);
  const Rows out = talk.step();
  for (std::size_t i = 0; i < out.size() / 2; ++i) ASSERT_TRUE(std::isnan(out.get(i)));
  EXPECT_LT(talk.error(out, 1), 0.15);
  EXPECT_EQ(talk.cache->length(0, 0, nullptr), room);
}

TEST_F(DeviceCacheTest, PromptsTakeTurnsInTheRoomThatThereIs) {
  Talk talk({}, kMost);
  talk.cache->limit_tokens(3 * kStep);
  const std::int64_t device_bytes = talk.cache->memory().device_bytes;
  talk.cache->reserve(0, 2000, nullptr);
  talk.prefill(0, 2000);
  talk.cache->reserve(1, 1000, nullptr);
  talk.prefill(1, 1000);
  EXPECT_THROW(talk.cache->reserve(1, 3000, nullptr), OutOfPages);
  EXPECT_THROW(talk.cache->limit_tokens(kStep), InvalidArgument);
  EXPECT_THROW(talk.cache->reserve(1, kMost + 1000, nullptr), InvalidArgument);
  EXPECT_LT(talk.error(talk.step(), 1), 0.15);
  talk.expect_complete(0);
  talk.expect_complete(1);
  talk.cache->release(0, nullptr);
  talk.cache->reserve(1, 3000, nullptr);
  // In chunks that were the other's, behind tokens that it had.
  talk.keys[0].clear();
  for (int t = 0; t < 40; ++t) talk.step();
  EXPECT_LT(talk.error(talk.step(), 1), 0.15);
  talk.expect_complete(1);
  EXPECT_EQ(talk.cache->memory().device_bytes, device_bytes);
}

TEST_F(DeviceCacheTest, AForkHasTheRoomOfItsSource) {
  Talk talk({}, kMost);
  talk.cache->reserve(0, 1000, nullptr);
  talk.prefill(0, 1000);
  talk.cache->reserve(1, 3000, nullptr);
  talk.prefill(1, 3000);
  const std::int64_t host_bytes = talk.cache->memory().host_bytes;
  talk.fork(1, 0);
  EXPECT_LT(talk.cache->memory().host_bytes, host_bytes);
  for (const int b : {0, 1}) talk.cache->reserve(b, 1200, nullptr);
  for (int t = 0; t < 70; ++t) talk.step();
  const Rows out = talk.step();
  for (const int b : {0, 1}) {
    EXPECT_LT(talk.error(out, b), 0.15);
    talk.expect_complete(b);
  }
}

#ifdef ICECACHE_EMULATE_CUDA
TEST_F(DeviceCacheTest, RoomThatCannotBeHadChangesNothing) {
  Talk talk({}, kMost);
  talk.cache->reserve(0, 1000, nullptr);
  talk.prefill(0, 1000);
  talk.prefill(1, 500);
  const std::int64_t host_bytes = talk.cache->memory().host_bytes;
  const std::size_t room = emulator::device_room;
  emulator::device_room = 1000;
  EXPECT_THROW(talk.cache->reserve(0, 3000, nullptr), OutOfPages);
  emulator::device_room = room;
  EXPECT_EQ(talk.cache->memory().host_bytes, host_bytes);
  talk.cache->reserve(0, 3000, nullptr);
  for (int t = 0; t < 40; ++t) talk.step();
  const Rows out = talk.step();
  for (const int b : {0, 1}) {
    EXPECT_LT(talk.error(out, b), 0.15);
    talk.expect_complete(b);
  }
}
#endif

}  // namespace
}  // namespace icecache

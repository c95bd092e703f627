// What DeviceCache refuses, and what it does where memory ends.
#include <gtest/gtest.h>

#include <vector>

#include "device_talk.h"
#ifdef ICECACHE_EMULATE_CUDA
#include "emulator.h"
#endif
#include "icecache/device_cache.h"
#include "icecache/error.h"

namespace icecache {
namespace {

TEST_F(DeviceCacheTest, RefusesWithWhatIsSupported) {
  CacheShape shape{1, 4, 2, 80, DType::kBFloat16, 0.0f};
  Config config;
  const auto refusal = [&](int batch = 1, std::int64_t max_tokens = 1000, int device = 0) {
    try {
      DeviceCache cache(shape, config, batch, max_tokens, device);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const std::string elsewhere = " (run other models on the CPU), got ";
  EXPECT_EQ(refusal(), "device=cuda: head_dim must be 64, 96, 128 or 256" + elsewhere + "80");
  shape.head_dim = 512;
  EXPECT_EQ(refusal(), "device=cuda: head_dim must be 64, 96, 128 or 256" + elsewhere + "512");
  shape.head_dim = 64;
  shape.num_q_heads = 34;
  EXPECT_EQ(refusal(), "device=cuda: num_q_heads / num_kv_heads must be 1..16" + elsewhere + "17");
  shape.num_q_heads = 4;
  shape.logit_softcap = 30.0f;
  EXPECT_EQ(refusal(), "device=cuda: logit_softcap must be 0" + elsewhere + "30");
  shape.logit_softcap = 0.0f;
  EXPECT_EQ(refusal(0), "batch must be from 1 to 65535, got 0");
  EXPECT_NE(refusal(1, 8).find("max_tokens must be above"), std::string::npos);
  EXPECT_NE(refusal(1, 1000, 99).find("device must be from 0 to"), std::string::npos);
  config.kv_dtype = "int8";
  EXPECT_EQ(refusal(),
            "device=cuda: kv_dtype must be auto (a device's pages hold what the model makes), got "
            "int8");
  config = {};
  config.index = "dci";
  EXPECT_EQ(refusal(), "device=cuda: index must be tree, got dci");
  config = {};
  config.token_budget = 700;
  EXPECT_NE(refusal().find("candidates must be at most 512"), std::string::npos);
}

TEST_F(DeviceCacheTest, RefusesTensorsThatDoNotFit) {
  Talk talk({}, 100);
  talk.prefill(0, 50);
  const Rows rows(DType::kFloat32, 2 * 200 * 64);
  const OnDevice on(rows);
  const TensorView fits{on.data(), DType::kFloat32, 2, 60, 64, 60 * 64, 64};
  TensorView queries{on.data(), DType::kFloat32, 8, 20, 64, 20 * 64, 64};
  TensorView wrong = fits;
  wrong.tokens = 61;
  EXPECT_THROW(talk.cache->prefill(0, 0, fits, wrong, queries, nullptr), InvalidArgument);
  wrong = fits;
  wrong.dtype = DType::kBFloat16;
  EXPECT_THROW(talk.cache->prefill(0, 0, wrong, fits, queries, nullptr), InvalidArgument);
  wrong = fits;
  wrong.token_stride = 66;
  EXPECT_THROW(talk.cache->prefill(0, 0, wrong, fits, queries, nullptr), InvalidArgument);
  wrong = fits;
  wrong.tokens = 150;
  EXPECT_THROW(talk.cache->prefill(0, 0, wrong, wrong, queries, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->prefill(1, 0, fits, fits, queries, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->prefill(0, 2, fits, fits, queries, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->fork(0, 1, nullptr), InvalidArgument);
  talk.expect_complete(0);
}

#ifdef ICECACHE_EMULATE_CUDA
TEST_F(DeviceCacheTest, RunningOutOfDeviceMemoryLeavesOthersUsable) {
  Talk talk({}, 1500);
  talk.prefill(0, 1000);
  const std::size_t room = emulator::device_room;
  emulator::device_room = 1000;
  EXPECT_THROW(Talk({}, 1500), OutOfPages);
  emulator::device_room = 100000;
  EXPECT_THROW(talk.prefill(1, 1200), OutOfPages);
  emulator::device_room = room;
  EXPECT_LT(talk.error(talk.step(), 0), 0.15);
  talk.prefill(1, 1200);
  const Rows out = talk.step();
  EXPECT_LT(talk.error(out, 0), 0.15);
  EXPECT_LT(talk.error(out, 1), 0.15);
  talk.expect_complete(0);
}
#endif

}  // namespace
}  // namespace icecache

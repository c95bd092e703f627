#include "core/emulated_device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace icecache::emulated_device_test {
namespace {

constexpr std::size_t kBytes = 4096;

class EmulatedDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override { memory_ = device_->allocate(kBytes); }
  void TearDown() override { device_->free(memory_); }

  static bool holds(const std::byte* memory, std::size_t bytes, int value) {
    return std::all_of(memory, memory + bytes, [&](std::byte b) { return b == std::byte(value); });
  }

  std::unique_ptr<DeviceMemory> device_ = make_emulated_device();
  std::byte* memory_ = nullptr;
};

TEST_F(EmulatedDeviceTest, FreshMemoryReadsAsNaN) {
  EXPECT_TRUE(holds(memory_, kBytes, 0xff));
  EXPECT_TRUE(device_->host_readable());
  EXPECT_TRUE(device_->reached(0));
}

TEST_F(EmulatedDeviceTest, NothingArrivesBeforeItsEventIsWaitedFor) {
  const std::vector<std::byte> source(kBytes, std::byte{7});
  device_->copy_async(memory_, source.data(), kBytes);
  const Event event = device_->record();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(device_->reached(event));
  EXPECT_TRUE(holds(memory_, kBytes, 0xff));
  device_->wait(event);
  EXPECT_TRUE(device_->reached(event));
  EXPECT_TRUE(holds(memory_, kBytes, 7));
}

TEST_F(EmulatedDeviceTest, CopiesRunInOrderUpToTheEvent) {
  const std::vector<std::byte> first(kBytes, std::byte{1}), second(kBytes / 2, std::byte{2});
  device_->copy_async(memory_, first.data(), kBytes);
  device_->copy_async(memory_, second.data(), kBytes / 2);
  const Event event = device_->record();
  const std::vector<std::byte> third(kBytes, std::byte{3});
  device_->copy_async(memory_, third.data(), kBytes);
  device_->wait(event);
  EXPECT_TRUE(holds(memory_, kBytes / 2, 2));
  EXPECT_TRUE(holds(memory_ + kBytes / 2, kBytes / 2, 1));
  EXPECT_FALSE(device_->reached(device_->record()));
  device_->wait(device_->record());
  EXPECT_TRUE(holds(memory_, kBytes, 3));
}

TEST_F(EmulatedDeviceTest, ManyThreadsMayWait) {
  const std::vector<std::byte> source(kBytes, std::byte{9});
  std::vector<Event> events;
  for (int i = 0; i < 8; ++i) {
    device_->copy_async(memory_ + i * kBytes / 8, source.data(), kBytes / 8);
    events.push_back(device_->record());
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      device_->wait(events[i]);
      EXPECT_TRUE(holds(memory_ + i * kBytes / 8, kBytes / 8, 9));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(EmulatedDeviceTest, FreeingWaitsForCopiesOnTheirWay) {
  const std::vector<std::byte> source(kBytes, std::byte{4});
  std::byte* other = device_->allocate(kBytes);
  device_->copy_async(other, source.data(), kBytes);
  const Event event = device_->record();
  device_->free(other);
  EXPECT_TRUE(device_->reached(event));
}

TEST(EmulatedDevice, EndsWithCopiesThatNobodyWaitedFor) {
  const std::vector<std::byte> source(kBytes);
  std::vector<std::byte> target(kBytes);
  const std::unique_ptr<DeviceMemory> device = make_emulated_device();
  device->copy_async(target.data(), source.data(), kBytes);
}

}  // namespace
}  // namespace icecache::emulated_device_test

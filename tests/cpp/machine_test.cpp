// Cores that a process may use, as control groups tell.
#include "config/machine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace icecache::machine_test {
namespace {

// Folders and files as the operating system would show them.
class ControlGroups : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ =
        std::filesystem::temp_directory_path() / ("icecache-groups-" + std::to_string(getpid()));
    std::filesystem::create_directories(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void write(const std::string& path, const std::string& text) const {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  int cores(const std::string& membership) const {
    write("membership", membership);
    return quota_cores(root_ / "membership", root_ / "mount");
  }

  std::filesystem::path root_;
};

TEST_F(ControlGroups, WithoutAnyThereIsNoLimit) {
  EXPECT_EQ(quota_cores(root_ / "absent", root_ / "mount"), kNoQuota);
  EXPECT_EQ(cores("0::/\n"), kNoQuota);
  write("mount/cpu.max", "max 100000\n");
  EXPECT_EQ(cores("0::/\n"), kNoQuota);
}

TEST_F(ControlGroups, ACpuTimeIsRoundedUpToWholeCores) {
  for (const auto& [quota, expected] : {std::pair{"200000", 2},
                                        {"150000", 2},
                                        {"100000", 1},
                                        {"1000", 1},
                                        {"6400000", 64},
                                        {"0", kNoQuota}}) {
    write("mount/cpu.max", std::string(quota) + " 100000\n");
    EXPECT_EQ(cores("0::/\n"), expected) << quota;
  }
}

TEST_F(ControlGroups, TheLeastLimitOfTheGroupsAboveCounts) {
  write("mount/cpu.max", "max 100000\n");
  write("mount/slice/cpu.max", "300000 100000\n");
  write("mount/slice/unit/cpu.max", "800000 100000\n");
  EXPECT_EQ(cores("0::/slice/unit\n"), 3);
  write("mount/slice/unit/cpu.max", "50000 100000\n");
  EXPECT_EQ(cores("0::/slice/unit\n"), 1);
  EXPECT_EQ(cores("0::/slice\n"), 3);
  // A container that sees its own group as the root.
  write("mount/cpu.max", "400000 100000\n");
  EXPECT_EQ(cores("0::/another/place\n"), 4);
}

TEST_F(ControlGroups, VersionOneIsReadWhereItsControllerIs) {
  write("mount/cpu,cpuacct/job/cpu.cfs_quota_us", "250000\n");
  write("mount/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cores("5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n"), 3);
  write("mount/cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(cores("4:cpu,cpuacct:/job\n"), kNoQuota);
  write("mount/cpu/cpu.cfs_quota_us", "100000\n");
  write("mount/cpu/cpu.cfs_period_us", "50000\n");
  EXPECT_EQ(cores("4:cpuset:/\n"), kNoQuota) << "another controller";
  EXPECT_EQ(cores("4:cpu:/\n"), 2);
}

TEST_F(ControlGroups, WhatIsNotOfTheirFormSetsNoLimit) {
  write("mount/cpu.max", "a lot\n");
  for (const char* membership : {"", "nothing", ":", "0::", "0:cpu", "0::/../../..\n"}) {
    EXPECT_EQ(cores(membership), kNoQuota) << membership;
  }
}

TEST(UsableCores, IsAtLeastOneAndAtMostTheMachine) {
  EXPECT_GE(usable_cores(), 1);
  EXPECT_LE(usable_cores(), sysconf(_SC_NPROCESSORS_ONLN));
}

}  // namespace
}  // namespace icecache::machine_test

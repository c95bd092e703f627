// What this process may use of the machine it runs on.
//
// Threads: all functions from any thread; each call asks the operating system again.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>

namespace icecache {

// Cores that this process may keep busy, at least 1: those that the scheduler lets it run on, or
// fewer where the CPU time of its control group is limited.
int usable_cores();

// Bytes of memory: the physical memory, or the control group's limit where that is smaller.
std::int64_t usable_memory();

constexpr int kNoQuota = std::numeric_limits<int>::max();

// Cores' worth of CPU time that control groups grant, rounded up; kNoQuota where there is no limit.
// `membership` is the process's /proc/self/cgroup, `mount` the folder in which the hierarchies are
// mounted. Files that are missing or of another form set no limit.
int quota_cores(const std::filesystem::path& membership, const std::filesystem::path& mount);

}  // namespace icecache

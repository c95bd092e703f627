#include "config/machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <thread>

namespace icecache {
namespace {

int allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // Fails on machines with more cores than a cpu_set_t holds; those take the count of all cores.
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

// Microseconds of CPU time in each period. "max" (version 2) does not parse, and -1 (version 1)
// means the same.
int cores_of(std::int64_t quota, std::int64_t period) {
  if (quota <= 0 || period <= 0) return kNoQuota;
  return static_cast<int>(std::min<std::int64_t>((quota - 1) / period + 1, kNoQuota));
}

// The limit that one control group sets.
int group_cores(const std::filesystem::path& group) {
  std::int64_t quota = 0, period = 0;
  if (std::ifstream(group / "cpu.max") >> quota >> period) return cores_of(quota, period);
  if (!(std::ifstream(group / "cpu.cfs_quota_us") >> quota)) return kNoQuota;
  if (!(std::ifstream(group / "cpu.cfs_period_us") >> period)) return kNoQuota;
  return cores_of(quota, period);
}

// The least limit of `group` (a path from the root of its hierarchy, as /proc/self/cgroup gives it)
// and of the groups above it. In a container that sees its own group as the root, `group` may not
// exist, and the root still has the limit.
int least_cores(const std::filesystem::path& root, const std::filesystem::path& group) {
  int least = group_cores(root);
  std::filesystem::path path = root;
  for (const std::filesystem::path& part : group.relative_path()) {
    path /= part;
    least = std::min(least, group_cores(path));
  }
  return least;
}

}  // namespace

int quota_cores(const std::filesystem::path& membership, const std::filesystem::path& mount) {
  int least = kNoQuota;
  std::ifstream lines(membership);
  for (std::string line; std::getline(lines, line);) {
    // "0::/group" (version 2), "4:cpu,cpuacct:/group" (version 1).
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      least = std::min(least, least_cores(mount, group));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      least = std::min(least, least_cores(mount / controllers, group));
      least = std::min(least, least_cores(mount / "cpu", group));
    }
  }
  return least;
}

int usable_cores() {
  return std::max(1, std::min(allowed_cores(), quota_cores("/proc/self/cgroup", "/sys/fs/cgroup")));
}

std::int64_t usable_memory() {
  const std::int64_t pages = sysconf(_SC_PHYS_PAGES);
  const std::int64_t page_bytes = sysconf(_SC_PAGESIZE);
  std::int64_t bytes = pages * page_bytes;
  // Version 2 and version 1 of control groups as a container sees them; "max" does not parse and
  // version 1's "unlimited" is larger than any memory.
  for (const char* path :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::int64_t limit = 0;
    if (std::ifstream(path) >> limit && limit > 0) bytes = std::min(bytes, limit);
  }
  return bytes;
}

}  // namespace icecache

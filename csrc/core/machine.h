// What this process may use of the machine it runs on.
//
// Threads: all functions from any thread; each call asks the operating system again.
#pragma once

#include <cstdint>

namespace icecache {

// Cores that the scheduler lets this process run on; at least 1.
int usable_cores();

// Bytes of memory: the physical memory, or the control group's limit where that is smaller.
std::int64_t usable_memory();

}  // namespace icecache

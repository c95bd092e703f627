// A device with its own host memory and a copy thread: the same states, copies, waits and evictions
// as a GPU, without one. Copies are late by design: nothing arrives before its event is waited for.
#pragma once

#include <memory>

#include "core/device_memory.h"

namespace icecache {

// Freed and not-yet-written memory is filled with NaN bit patterns.
std::unique_ptr<DeviceMemory> make_emulated_device();

}  // namespace icecache

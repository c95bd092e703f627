// DeviceMemory: memory that attention reads from when pages are not attended in place, and the
// stream that fills it.
//
// Ordering: copies of one DeviceMemory run in the order of submission on its copy stream; record()
// names a point of that order; wait() blocks the host.
// Threads: wait() and reached() from any thread; of the others one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace icecache {

using Event = std::uint64_t;  // 0: already reached

class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  // Throws OutOfPages naming the bytes asked for and free.
  virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void free(std::byte* memory) noexcept = 0;
  // Host to device, ordered on the copy stream; `source` must stay unchanged until the event.
  virtual void copy_async(std::byte* target, const std::byte* source, std::size_t bytes) = 0;
  virtual Event record() = 0;
  virtual bool reached(Event event) = 0;
  virtual void wait(Event event) = 0;
  // True where the host may read the memory (attention then runs on the CPU from it).
  virtual bool host_readable() const = 0;
  virtual std::string description() const = 0;
};

}  // namespace icecache

// The CUDA runtime as the engine sees it: handles that free themselves, errors that say what
// failed, and nothing of CUDA's own headers.
//
// Streams are explicit: every allocation, copy and launch takes one. Errors throw CudaError with
// the call, CUDA's name and its text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "icecache/error.h"

namespace icecache::gpu {

using Stream = void*;  // a cudaStream_t; null: the legacy default stream

// Makes a device the calling thread's own until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;
};

// Device memory, taken and given back in the order of a stream.
class Buffer {
 public:
  Buffer() = default;
  // Throws OutOfPages naming the bytes asked for and free.
  Buffer(std::size_t bytes, Stream stream);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  Stream stream_ = nullptr;
};

// A stream of our own; waits for its work when it goes.
class OwnStream {
 public:
  OwnStream();
  ~OwnStream();
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  Stream get() const { return stream_; }

 private:
  Stream stream_ = nullptr;
};

// A point in the order of a stream.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Stream stream);
  void wait_on(Stream stream) const;  // work put on `stream` from here on waits for the point

 private:
  void* event_ = nullptr;
};

void copy_to_device(void* device, const void* host, std::size_t bytes, Stream stream);
void copy_to_host(void* host, const void* device, std::size_t bytes, Stream stream);
void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream);
void fill(void* device, int byte, std::size_t bytes, Stream stream);
void synchronize(Stream stream);
void synchronize_device() noexcept;
// Throws InvalidArgument for a stream of another device than `device`, naming both.
void check_stream(Stream stream, int device);
struct MemoryInfo {
  std::size_t free = 0, total = 0;
};
MemoryInfo memory_info();  // of the current device; 0 where CUDA does not say
int multiprocessors();     // of the current device

}  // namespace icecache::gpu

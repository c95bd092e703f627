// The symbols of device_memory.h in a build without CUDA: calls that need a device say so.
#include "cuda/device_memory.h"
#include "icecache/error.h"

namespace icecache {
namespace {

constexpr const char* kMessage =
    "this build of icecache has no CUDA; install the CUDA toolkit and build with ICECACHE_CUDA=ON";

}  // namespace

std::unique_ptr<DeviceMemory> make_cuda_memory(int device) {
  throw Unavailable(message("device=cuda (index ", device, "): ", kMessage));
}

std::byte* allocate_pinned(std::size_t) noexcept {
  return nullptr;
}

void free_pinned(std::byte*) noexcept {}

CudaInfo cuda_info() noexcept {
  CudaInfo info;
  info.message = kMessage;
  return info;
}

}  // namespace icecache

// The symbols of cuda_info.h in a build without CUDA.
#include "cuda/cuda_info.h"

namespace icecache {
namespace {

constexpr const char* kMessage =
    "this build of icecache has no CUDA; install the CUDA toolkit and build with ICECACHE_CUDA=ON";

}  // namespace

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

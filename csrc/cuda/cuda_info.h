// What this machine and this build have of CUDA, and page-locked memory. Without CUDA in the build
// the same symbols say so (no_cuda.cpp).
#pragma once

#include <cstddef>
#include <string>

namespace icecache {

// Page-locked host memory; nullptr where CUDA is not available. Never throws.
std::byte* allocate_pinned(std::size_t bytes) noexcept;
void free_pinned(std::byte* memory) noexcept;

struct CudaInfo {
  bool built = false;           // compiled in
  int devices = 0;              // 0 where there is no driver or no device
  std::string runtime_version;  // "13.0"
  std::string message;          // why there is no device
};
CudaInfo cuda_info() noexcept;

}  // namespace icecache

// Asks for memory before it is read: scattered rows arrive from DRAM behind the work on others.
#pragma once

#include <cstddef>

namespace icecache::simd {

inline void prefetch(const std::byte* memory, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  for (std::size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(memory + i);
}

}  // namespace icecache::simd

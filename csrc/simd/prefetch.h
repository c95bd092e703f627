// Memory that is about to be read.
#pragma once

#include <cstddef>

namespace icecache::simd {

// Asks for the lines of `bytes` from `p` on; any address is fine. They come into the second-level
// cache: the first level has few misses in flight, and one too many holds up all that follows.
// Never a function of its own, so that every ISA level may include it.
inline __attribute__((always_inline)) void prefetch(const void* p, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
  }
}

}  // namespace icecache::simd

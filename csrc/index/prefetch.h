// Memory that is about to be read.
#pragma once

#include <cstddef>

namespace icecache {

// Asks for the lines of `bytes` from `p` on; any address is fine.
inline void prefetch(const std::byte* p, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

}  // namespace icecache

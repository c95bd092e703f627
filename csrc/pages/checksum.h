// A 64-bit checksum of memory against accidental change: stale, foreign or altered pages.
// Not cryptographic. Any change within one aligned 8-byte word changes the result for certain;
// anything else does with probability 1 - 2^-64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace icecache {

// Same bytes, same value, on every little-endian machine and in every process. Never 0.
std::uint64_t checksum(const std::byte* data, std::size_t bytes) noexcept;

}  // namespace icecache

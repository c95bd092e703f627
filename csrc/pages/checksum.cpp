#include "pages/checksum.h"

#include <array>
#include <bit>
#include <cstring>

namespace icecache {
namespace {

// Odd, so that multiplication is a bijection: no step forgets a difference in lane or word.
constexpr std::uint64_t kFactor = 0xd6e8feb86659fd93ull;

inline std::uint64_t step(std::uint64_t lane, std::uint64_t word) {
  return std::rotl((lane ^ word) * kFactor, 29);
}

inline std::uint64_t load(const std::byte* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

}  // namespace

std::uint64_t checksum(const std::byte* data, std::size_t bytes) noexcept {
  // A step waits for its multiplication; eight independent lanes keep the multiplier busy.
  constexpr std::size_t kLanes = 8;
  std::array<std::uint64_t, kLanes> lanes;
  for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = kFactor * (2 * i + 1);

  std::size_t at = 0;
  for (; at + 8 * kLanes <= bytes; at += 8 * kLanes) {
    for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = step(lanes[i], load(data + at + 8 * i));
  }
  std::uint64_t sum = bytes;
  for (const std::uint64_t lane : lanes) sum = step(sum, lane);
  for (; at + 8 <= bytes; at += 8) sum = step(sum, load(data + at));
  if (at < bytes) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + at, bytes - at);
    sum = step(sum, word);
  }
  sum ^= sum >> 32;
  sum *= kFactor;
  sum ^= sum >> 29;
  // 0 stands for "no checksum" in a page header.
  return sum != 0 ? sum : 1;
}

}  // namespace icecache

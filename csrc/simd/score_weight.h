// What a score of a sketch weighs: 2^(score - max) without an exponential.
//
// A score is an exponent as the upper half of a float has it: eight bits of octaves, seven of
// fractions. Read so, a weight is at most 6.2 % too large, 4 % in the mean, which kMeanExcess takes
// out (Schraudolph, 1999). Never functions of their own, so that every ISA level may include them.
#pragma once

#include <cstdint>

namespace icecache::simd {

constexpr std::int16_t kBitsOfOne = 127 << 7;
constexpr float kMeanExcess = 1.0406844f;  // mean over f in [0, 1) of (1 + f) / 2^f

// The difference to the largest score that weighs nothing, in units of 2^coarse / 128 octaves.
inline __attribute__((always_inline)) std::int16_t weightless(int coarse) {
  return static_cast<std::int16_t>(-(kBitsOfOne >> coarse));
}

// Of one slot, as score_mass has it. REQUIRES: score <= max, 0 <= max.
inline __attribute__((always_inline)) float score_weight(std::int16_t score, std::int16_t max,
                                                         int coarse) {
  const int below = score - max, floor = weightless(coarse);
  const int bits = ((below > floor ? below : floor) << coarse) + kBitsOfOne;
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16) * (1.0f / kMeanExcess);
}

}  // namespace icecache::simd

// A random direction that any language reproduces from its seed.
#pragma once

#include <cstdint>
#include <vector>

namespace icecache {

// d independent normal numbers. The generator is splitmix64 (Steele et al. 2014) started at `seed`;
// two draws x, y give u = ((x >> 11) + 1) / 2^53 and w = (y >> 11) / 2^53, and by Box and Muller
// the numbers sqrt(-2 ln u) cos(2 pi w) and sqrt(-2 ln u) sin(2 pi w), in double, rounded to fp32.
// For an odd d the last sine is left out.
std::vector<float> random_direction(std::uint64_t seed, int d);

}  // namespace icecache

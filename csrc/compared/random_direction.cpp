#include "compared/random_direction.h"

#include <cmath>
#include <numbers>

namespace icecache {
namespace {

std::uint64_t splitmix64(std::uint64_t& state) {
  std::uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace

std::vector<float> random_direction(std::uint64_t seed, int d) {
  std::vector<float> direction(d);
  for (int i = 0; i < d; i += 2) {
    const double u = static_cast<double>((splitmix64(seed) >> 11) + 1) * 0x1p-53;
    const double w = static_cast<double>(splitmix64(seed) >> 11) * 0x1p-53;
    const double radius = std::sqrt(-2.0 * std::log(u));
    direction[i] = static_cast<float>(radius * std::cos(2.0 * std::numbers::pi * w));
    if (i + 1 < d) {
      direction[i + 1] = static_cast<float>(radius * std::sin(2.0 * std::numbers::pi * w));
    }
  }
  return direction;
}

}  // namespace icecache

#include "index/top_k.h"

#include <algorithm>
#include <bit>
#include <cstdint>

#include "simd/kernels.h"
#include "simd/lane_mask.h"

namespace icecache {
namespace {

// How many of n reach `bound`. Sums of 16 bits, so that as many lanes count at once.
std::int64_t count_at_least(const std::int16_t* x, std::int64_t n, std::int16_t bound) {
  constexpr std::int64_t kMost = 32768;
  std::int64_t count = 0;
  for (std::int64_t first = 0; first < n; first += kMost) {
    const std::int64_t end = std::min(first + kMost, n);
    std::uint16_t part = 0;
    for (std::int64_t i = first; i < end; ++i) {
      part = static_cast<std::uint16_t>(part + (x[i] >= bound ? 1 : 0));
    }
    count += part;
  }
  return count;
}

// Whether any maximum of a block reaches `bound`.
bool reaches(const std::int16_t* maxima, std::int16_t bound) {
  int hit = 0;
  for (int lane = 0; lane < simd::kRankLanes; ++lane) hit |= maxima[lane] >= bound ? 1 : 0;
  return hit != 0;
}

}  // namespace

// By bisection: sixteen passes over numbers that stay in the L1 cache, eight and more at once.
std::int16_t kth_largest(std::span<const std::int16_t> x, std::int64_t k) {
  int low = INT16_MIN, high = INT16_MAX;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (count_at_least(x.data(), static_cast<std::int64_t>(x.size()),
                       static_cast<std::int16_t>(middle)) >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return static_cast<std::int16_t>(low);
}

void top_k(std::span<const std::int16_t> rank, std::span<const std::int16_t> block_max,
           std::int16_t floor, std::int64_t k, std::vector<std::int16_t>& chosen,
           std::vector<std::int32_t>& out) {
  out.clear();
  const auto n = static_cast<std::int64_t>(rank.size());
  if (k <= 0 || n == 0) return;
  int bound = floor + 1;
  const std::span<const std::int16_t> bounding =
      static_cast<std::int64_t>(block_max.size()) >= k ? block_max : rank;
  if (n > k) bound = std::max<int>(bound, kth_largest(bounding, k));
  if (bound > INT16_MAX) return;

  std::size_t taken = 0;
  const auto take = [&](std::int64_t i) {
    out[taken] = static_cast<std::int32_t>(i);
    chosen[taken++] = rank[i];
  };
  const auto make_room = [&](std::size_t more) {
    if (out.size() < taken + more) out.resize(2 * taken + more);
    if (chosen.size() < out.size()) chosen.resize(out.size());
  };
  const auto least = static_cast<std::int16_t>(bound);
  for (std::int64_t block = 0; block < n; block += simd::kRankBlock) {
    if (!reaches(&block_max[block / simd::kRankBlock * simd::kRankLanes], least)) continue;
    const std::int64_t end = std::min<std::int64_t>(block + simd::kRankBlock, n);
    make_room(simd::kRankBlock);
    std::int64_t i = block;
    for (; i + 64 <= end; i += 64) {
      for (std::uint64_t bits = simd::lanes_at_least(&rank[i], least); bits != 0;
           bits &= bits - 1) {
        take(i + std::countr_zero(bits));
      }
    }
    for (; i < end; ++i) {
      if (rank[i] >= least) take(i);
    }
  }
  if (static_cast<std::int64_t>(taken) <= k) return out.resize(taken);

  // How many of those that equal the last one fit.
  const std::span<const std::int16_t> of_taken(chosen.data(), taken);
  const int last = kth_largest(of_taken, k);
  std::int64_t ties =
      k - std::count_if(of_taken.begin(), of_taken.end(), [&](int v) { return v > last; });
  std::size_t kept = 0;
  for (std::size_t c = 0; c < taken; ++c) {
    const bool tie = of_taken[c] == last && ties > 0;
    ties -= tie ? 1 : 0;
    out[kept] = out[c];
    kept += of_taken[c] > last || tie ? 1 : 0;
  }
  out.resize(kept);
}

}  // namespace icecache

// Slots of the k largest of n ranks, in O(n): the k-th largest of the maxima of blocks is a bound
// that at least k ranks reach, so that only blocks above it are looked into.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace icecache {

// The k-th largest of x. REQUIRES: 1 <= k <= x.size().
std::int16_t kth_largest(std::span<const std::int16_t> x, std::int64_t k);

// `out`: the indices of the k largest ranks above `floor`, ascending by index; all of them where
// they are k or fewer. Ties go to the lower index. rank and block_max as simd::ScoreRankArgs has
// them. `chosen` is scratch.
void top_k(std::span<const std::int16_t> rank, std::span<const std::int16_t> block_max,
           std::int16_t floor, std::int64_t k, std::vector<std::int16_t>& chosen,
           std::vector<std::int32_t>& out);

}  // namespace icecache

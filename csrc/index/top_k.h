// Indices of the k largest of n scores, in O(n): the k-th largest of the maxima of blocks is a
// bound that at least k scores reach, so that only blocks above it are looked into.
#pragma once

#include <cstdint>
#include <vector>

namespace icecache {

// Appends to `out` (cleared first) the indices of the k largest scores, ascending by index; all of
// them when n <= k. Scores are >= 0; scores of exactly 0 are never taken. Ties go to the lower
// index.
void top_k(const float* scores, std::int64_t n, std::int64_t k, std::vector<std::int32_t>& out);

}  // namespace icecache

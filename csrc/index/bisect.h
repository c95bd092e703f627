// Balanced bisection along principal directions: the order of tokens in which neighbours are alike.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace icecache {

// Projections of rows[i] (rows of x [*, R]) on the principal direction of the set, by power
// iteration from the row farthest from the mean. `out` gets one value per row.
void principal_projection(const float* x, int rank, std::span<const std::int32_t> rows,
                          std::vector<float>& out);

// Reorders `order` (row numbers of x [*, R]) so that it falls into pages of page_size consecutive
// entries, all full but the last, and so that aligned runs of node_pages pages are subtrees.
void bisect(const float* x, int rank, std::span<std::int32_t> order, int page_size, int node_pages);

// The half (mask over rows 0..n-1, n <= 32) with the larger projections; neither none nor all.
std::uint32_t upper_half(const float* x, int rank, int n);

}  // namespace icecache

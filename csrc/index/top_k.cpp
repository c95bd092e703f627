#include "index/top_k.h"

#include <algorithm>
#include <bit>
#include <cstdint>

#include "simd/lane_mask.h"

namespace icecache {
namespace {

constexpr int kBins = 256;

// The bin that holds the k-th largest; k becomes its place within that bin.
int descend(const std::int32_t (&bins)[kBins], std::int64_t& k) {
  int bin = kBins - 1;
  for (; bins[bin] < k; --bin) k -= bins[bin];
  return bin;
}

}  // namespace

std::int16_t kth_largest(std::span<const std::int16_t> x, std::int64_t k) {
  const auto ordered = [](std::int16_t v) { return static_cast<std::uint16_t>(v ^ 0x8000); };
  // Two counts side by side: neighbours, which are often alike, do not wait for each other.
  std::int32_t high[kBins] = {}, other[kBins] = {}, low[kBins] = {};
  std::size_t i = 0;
  for (; i + 2 <= x.size(); i += 2) {
    ++high[ordered(x[i]) >> 8];
    ++other[ordered(x[i + 1]) >> 8];
  }
  if (i < x.size()) ++high[ordered(x[i]) >> 8];
  for (int bin = 0; bin < kBins; ++bin) high[bin] += other[bin];
  const int top = descend(high, k);
  for (const std::int16_t v : x) {
    if (ordered(v) >> 8 == top) ++low[ordered(v) & 255];
  }
  return static_cast<std::int16_t>((top << 8 | descend(low, k)) ^ 0x8000);
}

void top_k(std::span<const std::int16_t> rank, std::span<const std::int16_t> block_max,
           std::int16_t floor, std::int64_t k, std::vector<std::int32_t>& out) {
  out.clear();
  const auto n = static_cast<std::int64_t>(rank.size());
  if (k <= 0 || n == 0) return;
  int bound = floor + 1;
  const std::span<const std::int16_t> bounding =
      static_cast<std::int64_t>(block_max.size()) >= k ? block_max : rank;
  if (n > k) bound = std::max<int>(bound, kth_largest(bounding, k));
  if (bound > INT16_MAX) return;

  thread_local std::vector<std::int16_t> chosen_ranks;
  // By reference: each mention of a thread_local in a shared library is a call.
  std::vector<std::int16_t>& chosen = chosen_ranks;
  chosen.clear();
  const auto take = [&](std::int64_t i) {
    out.push_back(static_cast<std::int32_t>(i));
    chosen.push_back(rank[i]);
  };
  std::int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    std::uint64_t bits = simd::lanes_at_least(&rank[i], static_cast<std::int16_t>(bound));
    for (; bits != 0; bits &= bits - 1) take(i + std::countr_zero(bits));
  }
  for (; i < n; ++i) {
    if (rank[i] >= bound) take(i);
  }
  if (static_cast<std::int64_t>(chosen.size()) <= k) return;

  // How many of those that equal the last one fit.
  const int last = kth_largest(chosen, k);
  std::int64_t ties =
      k - std::count_if(chosen.begin(), chosen.end(), [&](int v) { return v > last; });
  std::size_t kept = 0;
  for (std::size_t c = 0; c < chosen.size(); ++c) {
    if (chosen[c] > last || (chosen[c] == last && ties-- > 0)) out[kept++] = out[c];
  }
  out.resize(kept);
}

}  // namespace icecache

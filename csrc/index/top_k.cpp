#include "index/top_k.h"

#include <algorithm>
#include <bit>

#include "simd/kernels.h"

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
  constexpr std::int64_t kLanes = simd::kRankLanes, kBlock = simd::kRankBlock;
  out.clear();
  const auto n = static_cast<std::int64_t>(rank.size());
  if (k <= 0 || n == 0) return;
  int bound = floor + 1;
  const std::span<const std::int16_t> bounding =
      static_cast<std::int64_t>(block_max.size()) >= k ? block_max : rank;
  if (n > k) bound = std::max<int>(bound, kth_largest(bounding, k));
  // One bit a slot keeps them in order.
  thread_local std::vector<std::uint64_t> chosen_bits;
  thread_local std::vector<std::int16_t> chosen_ranks;
  // By reference: each mention of a thread_local in a shared library is a call.
  std::vector<std::uint64_t>& chosen = chosen_bits;
  std::vector<std::int16_t>& values = chosen_ranks;
  chosen.assign((n + 63) / 64, 0);
  values.clear();
  for (std::size_t b = 0; b < block_max.size(); ++b) {
    if (block_max[b] < bound) continue;
    const std::int64_t begin = static_cast<std::int64_t>(b) / kLanes * kBlock + b % kLanes;
    const std::int64_t rows = std::min(kBlock / kLanes, (n - begin + kLanes - 1) / kLanes);
    std::uint32_t hits = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      hits |= static_cast<std::uint32_t>(rank[begin + r * kLanes] >= bound) << r;
    }
    for (; hits != 0; hits &= hits - 1) {
      const std::int64_t i = begin + std::countr_zero(hits) * kLanes;
      chosen[i / 64] |= std::uint64_t{1} << (i % 64);
      values.push_back(rank[i]);
    }
  }
  // How many of those that equal the last one fit.
  int last = bound;
  std::int64_t ties = n;
  if (static_cast<std::int64_t>(values.size()) > k) {
    last = kth_largest(values, k);
    ties = k - std::count_if(values.begin(), values.end(), [&](int v) { return v > last; });
  }
  for (std::size_t word = 0; word < chosen.size(); ++word) {
    for (std::uint64_t bits = chosen[word]; bits != 0; bits &= bits - 1) {
      const auto i = static_cast<std::int32_t>(64 * word) + std::countr_zero(bits);
      if (rank[i] > last || (rank[i] == last && ties-- > 0)) out.push_back(i);
    }
  }
}

}  // namespace icecache

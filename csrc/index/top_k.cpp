#include "index/top_k.h"

#include <algorithm>
#include <array>
#include <bit>

namespace icecache {
namespace {

// Positive floats order as their bits; the 12 bits below the sign are exponent and 4 of mantissa.
constexpr int kShift = 19;
constexpr std::size_t kBuckets = 1u << (31 - kShift);

std::uint32_t bucket(float score) {
  return std::bit_cast<std::uint32_t>(score) >> kShift;
}

}  // namespace

void top_k(const float* scores, std::int64_t n, std::int64_t k, std::vector<std::int32_t>& out) {
  out.clear();
  if (k <= 0) return;
  std::array<std::int32_t, kBuckets> histogram{};
  for (std::int64_t i = 0; i < n; ++i) {
    if (scores[i] > 0.0f) ++histogram[bucket(scores[i])];
  }
  std::int64_t above = 0;
  std::int64_t cut = static_cast<std::int64_t>(kBuckets) - 1;
  while (cut >= 0 && above + histogram[cut] <= k) above += histogram[cut--];
  // Buckets above `cut` are taken whole; of `cut` itself the best k - above.
  static thread_local std::vector<std::int32_t> edge;
  edge.clear();
  for (std::int64_t i = 0; i < n; ++i) {
    if (!(scores[i] > 0.0f)) continue;
    const std::int64_t b = bucket(scores[i]);
    if (b > cut) {
      out.push_back(static_cast<std::int32_t>(i));
    } else if (b == cut) {
      edge.push_back(static_cast<std::int32_t>(i));
    }
  }
  const std::int64_t wanted = std::min<std::int64_t>(k - above, edge.size());
  if (wanted > 0) {
    std::nth_element(edge.begin(), edge.begin() + (wanted - 1), edge.end(),
                     [&](std::int32_t a, std::int32_t b) {
                       return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                     });
    out.insert(out.end(), edge.begin(), edge.begin() + wanted);
  }
  std::sort(out.begin(), out.end());
}

}  // namespace icecache

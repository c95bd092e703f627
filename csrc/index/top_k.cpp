#include "index/top_k.h"

#include <algorithm>
#include <functional>

namespace icecache {
namespace {

constexpr std::int64_t kBlock = 16;
constexpr std::int64_t kLanes = 4;  // written out so that every compiler makes vectors of it

float max_of_block(const float* x) {
  float lanes[kLanes] = {x[0], x[1], x[2], x[3]};
  for (std::int64_t i = kLanes; i < kBlock; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  return std::max(std::max(lanes[0], lanes[1]), std::max(lanes[2], lanes[3]));
}

}  // namespace

void top_k(const float* scores, std::int64_t n, std::int64_t k, std::vector<std::int32_t>& out) {
  out.clear();
  if (k <= 0 || n <= 0) return;
  thread_local std::vector<float> maxima, ordered;
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  maxima.resize(blocks);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const float* block = scores + b * kBlock;
    maxima[b] = (b + 1) * kBlock <= n ? max_of_block(block)
                                      : *std::max_element(block, block + (n - b * kBlock));
  }
  float bound = 0.0f;
  if (blocks >= k) {
    ordered = maxima;
    std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<>());
    bound = ordered[k - 1];
  }
  for (std::int64_t b = 0; b < blocks; ++b) {
    if (maxima[b] < bound) continue;
    for (std::int64_t i = b * kBlock; i < std::min(n, (b + 1) * kBlock); ++i) {
      if (scores[i] >= bound && scores[i] > 0.0f) out.push_back(static_cast<std::int32_t>(i));
    }
  }
  if (static_cast<std::int64_t>(out.size()) <= k) return;
  ordered.clear();
  for (const std::int32_t i : out) ordered.push_back(scores[i]);
  std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<>());
  const float last = ordered[k - 1];
  std::int64_t ties = k;
  for (std::int64_t i = 0; i < k; ++i) ties -= ordered[i] > last ? 1 : 0;
  std::erase_if(
      out, [&](std::int32_t i) { return scores[i] < last || (scores[i] == last && ties-- <= 0); });
}

}  // namespace icecache

#include "index/sketch_scores.h"

#include <algorithm>
#include <cmath>

#include "index/log_sum.h"
#include "index/top_k.h"
#include "simd/four.h"
#include "simd/kernels.h"

namespace icecache {

void SketchScores::resize(int group, int pages, int page_size) {
  group_ = group;
  pages_ = pages;
  page_size_ = page_size;
  mass_columns_ = simd::mass_stride(group);
  const std::int64_t slots = static_cast<std::int64_t>(pages) * page_size;
  stride_ = (slots + simd::kScoreSlots - 1) / simd::kScoreSlots * simd::kScoreSlots;
  scores_.resize(static_cast<std::size_t>(group) * stride_);
  mass_.resize(static_cast<std::size_t>(stride_ / page_size) * mass_columns_);
}

float SketchScores::log_max(int g) const {
  return max_[g] == simd::kNoScore ? -INFINITY : bias[g] + unit * max_[g];
}

void SketchScores::log_totals(float* out) const {
  float sum[kMaxGroup + 3];
  for (int first = 0; first < mass_columns_; first += 4) {
    simd::store_four(sum + first, simd::sum_rows(mass_.data() + first, pages_, mass_columns_));
  }
  for (int g = 0; g < group_; ++g) out[g] = log_max(g) + std::log(sum[g]);
}

float SketchScores::log_total(int g) const {
  float totals[kMaxGroup];
  log_totals(totals);
  return totals[g];
}

void SketchScores::top(const float* near_lse, std::int64_t k, std::vector<std::int32_t>& slots) {
  float totals[kMaxGroup];
  log_totals(totals);
  // In units above the bias; only how the heads differ matters. A head without any weight has no
  // total.
  float above[kMaxGroup], least = INFINITY;
  for (int g = 0; g < group_; ++g) {
    above[g] = (log_add(totals[g], near_lse[g]) - bias[g]) / unit;
    if (std::isfinite(above[g])) least = std::min(least, above[g]);
  }
  std::int16_t offset[kMaxGroup];
  for (int g = 0; g < group_; ++g) {
    const float units = std::isfinite(above[g]) ? above[g] - least : 0.0f;
    offset[g] = static_cast<std::int16_t>(std::min<float>(units, simd::kMaxScore));
  }
  rank_.resize(stride_);
  block_max_.resize((stride_ + simd::kRankBlock - 1) / simd::kRankBlock * simd::kRankLanes);
  simd::kernels().score_rank(
      {scores_.data(), offset, rank_.data(), block_max_.data(), stride_, stride_, group_});
  // A free slot ranks by the head of the least offset, below any token there.
  const std::int16_t free = simd::kNoScore - *std::min_element(offset, offset + group_);
  top_k(rank_, block_max_, free, k, slots);
}

void SketchScores::exclude(std::span<const std::int32_t> slots) {
  for (std::size_t begin = 0, end = 0; begin < slots.size(); begin = end) {
    const int together = slots[begin] / simd::kScoreSlots, first = together * simd::kScoreSlots;
    for (; end < slots.size() && slots[end] / simd::kScoreSlots == together; ++end) {
      for (int g = 0; g < group_; ++g) scores_[g * stride_ + slots[end]] = simd::kNoScore;
    }
    simd::kernels().score_mass({scores_.data() + first, max_,
                                mass_.data() + first / page_size_ * mass_columns_, stride_,
                                simd::kScoreSlots, coarse, group_, page_size_});
  }
}

}  // namespace icecache

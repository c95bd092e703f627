#include "index/sketch_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "index/log_sum.h"
#include "index/top_k.h"
#include "simd/four.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// out[c] = the sum of column c of masses [pages, columns]; columns: a multiple of four.
void sum_masses(const float* masses, int pages, int columns, float* out) {
  int first = 0;
  for (; first + 16 <= columns; first += 16)
    simd::sum_sixteen(masses + first, pages, columns, out + first);
  for (; first < columns; first += 4)
    simd::store_four(out + first, simd::sum_rows(masses + first, pages, columns));
}

}  // namespace

void SketchScores::resize(int group, int page_size, std::span<const int> pages, int octave) {
  group_ = group;
  page_size_ = page_size;
  octave_ = octave;
  unit_ = std::ldexp(simd::kScoreUnit, octave);
  mass_columns_ = simd::mass_stride(group);
  parts_.resize(pages.size());
  int next = 0;
  for (std::size_t p = 0; p < pages.size(); ++p) {
    const std::int64_t slots = static_cast<std::int64_t>(pages[p]) * page_size;
    parts_[p].first_page = next;
    parts_[p].pages = pages[p];
    parts_[p].slots = (slots + simd::kScoreSlots - 1) / simd::kScoreSlots * simd::kScoreSlots;
    next += page_room(pages[p], page_size);
  }
  stride_ = static_cast<std::int64_t>(next) * page_size;
  scores_.resize(static_cast<std::size_t>(group) * stride_);
  mass_.resize(static_cast<std::size_t>(stride_ / page_size) * mass_columns_);
}

int SketchScores::page_room(int pages, int page_size) {
  const int together = simd::kRankBlock / page_size;
  return (pages + together - 1) / together * together;
}

int SketchScores::coarse() const {
  return std::min(octave_, simd::kMaxCoarse);
}

float SketchScores::log_max(int part, int g) const {
  const Part& p = parts_[part];
  return p.max[g] == simd::kNoScore ? -INFINITY : p.bias[g] + unit() * p.max[g];
}

float SketchScores::log_max(int g) const {
  float max = -INFINITY;
  for (int part = 0; part < static_cast<int>(parts_.size()); ++part) {
    max = std::max(max, log_max(part, g));
  }
  return max;
}

void SketchScores::log_totals(float* out) const {
  std::fill_n(out, group_, -INFINITY);
  float sum[kMaxGroup];
  for (int part = 0; part < static_cast<int>(parts_.size()); ++part) {
    sum_masses(page_mass(part, 0), parts_[part].pages, mass_columns_, sum);
    for (int g = 0; g < group_; ++g) {
      if (sum[g] > 0.0f) out[g] = log_add(out[g], log_max(part, g) + std::log(sum[g]));
    }
  }
}

float SketchScores::log_total(int g) const {
  float totals[kMaxGroup];
  log_totals(totals);
  return totals[g];
}

float SketchScores::rank(const float* near_lse, std::optional<float> share_of_one) {
  float totals[kMaxGroup];
  log_totals(totals);
  for (int g = 0; g < group_; ++g) totals[g] = log_add(totals[g], near_lse[g]);
  // In units; only how heads and parts differ matters. A head without any weight has no total.
  const auto above = [&](const Part& part, int g) { return (totals[g] - part.bias[g]) / unit(); };
  float least = INFINITY;
  for (const Part& part : parts_) {
    for (int g = 0; g < group_; ++g) {
      if (const float units = above(part, g); std::isfinite(units)) least = std::min(least, units);
    }
  }
  const float higher =
      share_of_one ? std::clamp<float>(*share_of_one - least, -simd::kMaxScore, simd::kMaxScore)
                   : 0.0f;
  rank_.resize(stride_);
  block_max_.resize(stride_ / simd::kRankBlock * simd::kRankLanes);
  for (int p = 0; p < static_cast<int>(parts_.size()); ++p) {
    std::int16_t offset[kMaxGroup];
    for (int g = 0; g < group_; ++g) {
      const float units = above(parts_[p], g);
      offset[g] = static_cast<std::int16_t>(
          std::isfinite(units) ? std::min<float>(units - least, simd::kMaxScore) : 0.0f);
    }
    const std::int64_t first = first_slot(p), slots_of_part = parts_[p].slots;
    simd::kernels().score_rank({scores_.data() + first, offset, rank_.data() + first,
                                block_max_.data() + first / simd::kRankBlock * simd::kRankLanes,
                                stride_, slots_of_part, group_, share_of_one.has_value(),
                                static_cast<std::int16_t>(std::lrintf(higher))});
    const std::int64_t end = p + 1 < static_cast<int>(parts_.size()) ? first_slot(p + 1) : stride_;
    std::fill(rank_.begin() + first + slots_of_part, rank_.begin() + end, simd::kNoScore);
  }
  return least;
}

void SketchScores::prefer(std::int64_t slot) {
  constexpr std::int16_t kHighest = std::numeric_limits<std::int16_t>::max();
  rank_[slot] = kHighest;
  block_max_[slot / simd::kRankBlock * simd::kRankLanes + slot % simd::kRankLanes] = kHighest;
}

void SketchScores::top_ranked(std::int64_t k, std::int16_t floor,
                              std::vector<std::int32_t>& slots) {
  top_k(rank_, block_max_, floor, k, chosen_, slots);
}

float SketchScores::top(const float* near_lse, std::int64_t k, float least_share,
                        std::vector<std::int32_t>& slots) {
  const float least = rank(near_lse);
  // Free slots rank at kNoScore or below, tokens above.
  std::int16_t floor = simd::kNoScore;
  if (least_share > -INFINITY) {
    floor = static_cast<std::int16_t>(std::clamp<float>(
        std::floor(least_share / unit() + least), floor, std::numeric_limits<std::int16_t>::max()));
  }
  top_ranked(k, floor, slots);
  if (static_cast<std::int64_t>(slots.size()) < k) return least_share;
  std::int16_t last = rank_[slots.front()];
  for (const std::int32_t slot : slots) last = std::min(last, rank_[slot]);
  return unit() * (static_cast<float>(last) - least);
}

void SketchScores::exclude(std::span<const std::int32_t> slots) {
  std::size_t part = 0;
  for (std::size_t begin = 0, end = 0; begin < slots.size(); begin = end) {
    const int together = slots[begin] / simd::kScoreSlots, first = together * simd::kScoreSlots;
    for (; end < slots.size() && slots[end] / simd::kScoreSlots == together; ++end) {
      for (int g = 0; g < group_; ++g) scores_[g * stride_ + slots[end]] = simd::kNoScore;
    }
    while (part + 1 < parts_.size() && first_slot(static_cast<int>(part) + 1) <= first) ++part;
    simd::kernels().score_mass({scores_.data() + first, parts_[part].max,
                                mass_.data() + first / page_size_ * mass_columns_, stride_,
                                simd::kScoreSlots, coarse(), group_, page_size_});
  }
}

}  // namespace icecache

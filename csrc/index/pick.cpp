// Spending the token budget on rescored candidates.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <span>

#include "index/log_sum.h"
#include "index/selector.h"
#include "index/top_k.h"
#include "simd/kernels.h"
#include "simd/prefetch.h"

namespace icecache {
namespace {

// Marks the k largest masses, none of them negative; equal ones by their order. The upper half of a
// float's bits orders as floats do, but for those that share it with the last. `upper` and `alike`
// are scratch.
void mark_largest(std::span<const float> mass, std::int64_t k, std::vector<std::int16_t>& upper,
                  std::vector<std::int32_t>& alike, std::vector<char>& marked) {
  const auto count = static_cast<std::int64_t>(mass.size());
  marked.assign(count, k >= count ? 1 : 0);
  if (k <= 0 || k >= count) return;
  upper.resize(count);
  for (std::int64_t i = 0; i < count; ++i) {
    upper[i] = static_cast<std::int16_t>(std::bit_cast<std::uint32_t>(mass[i]) >> 16);
  }
  const std::int16_t last = kth_largest(upper, k);
  alike.clear();
  for (std::int64_t i = 0; i < count; ++i) {
    marked[i] = upper[i] > last ? 1 : 0;
    k -= marked[i];
    if (upper[i] == last) alike.push_back(static_cast<std::int32_t>(i));
  }
  std::partial_sort(alike.begin(), alike.begin() + k, alike.end(),
                    [&](std::int32_t a, std::int32_t b) {
                      return mass[a] != mass[b] ? mass[a] > mass[b] : a < b;
                    });
  for (std::int64_t i = 0; i < k; ++i) marked[alike[i]] = 1;
}

}  // namespace

// Candidates are worth their attention mass, normalised per head over sink, window and candidates
// and summed over the group. A page is worth its best member. With mass_target the ranking is
// followed past the budget until every head's estimated share is reached.
bool Selector::pick(const SelectRequest& request) {
  Candidates& c = candidates_;
  const auto count = static_cast<std::int64_t>(c.size());
  const bool by_page = config_->select == "page", by_mass = request.mass_target > 0.0;
  mass_.assign(count, 0.0f);
  float weight_share[kMaxGroup], share[kMaxGroup];
  for (int g = 0; g < group_; ++g) {
    const float known = log_add(request.near_lse[g], c.lse(g));
    const float* weights = c.weights.data() + g * count;
    if (known > -INFINITY) {
      simd::kernels().axpy(std::exp(c.max[g] - known), weights, mass_.data(), count);
    }
    const float total = log_add(known, c.rest_lse[g]);
    share[g] = std::exp(request.near_lse[g] - total);
    weight_share[g] = std::exp(c.max[g] - total);
  }
  if (!by_page && !by_mass) {
    mark_largest(mass_, request.budget, upper_, ranking_, c.picked);
    return false;
  }

  ranking_.resize(count);
  std::iota(ranking_.begin(), ranking_.end(), 0);
  const auto better = [&](std::int32_t a, std::int32_t b) {
    return mass_[a] != mass_[b] ? mass_[a] > mass_[b] : a < b;
  };
  c.picked.assign(count, 0);
  // In what order tokens within the budget are picked does not matter.
  const std::int64_t unordered = by_page ? 0 : std::min<std::int64_t>(request.budget, count);
  std::nth_element(ranking_.begin(), ranking_.begin() + unordered, ranking_.end(), better);
  const int limit = by_mass ? request.max_budget : request.budget;
  const auto page_of = [&](std::int64_t i) { return c.slots[i] / page_size_; };
  const auto is_reached = [&] {
    return std::all_of(share, share + group_, [&](float x) { return x >= request.mass_target; });
  };
  int tokens = 0;
  for (std::int64_t n = 0; n < count; ++n) {
    if (tokens >= limit || (tokens >= request.budget && is_reached())) break;
    if (n == unordered) std::sort(ranking_.begin() + n, ranking_.end(), better);
    const std::int32_t i = ranking_[n];
    if (c.picked[i] == 0) {
      const int cost = by_page ? std::popcount(mask(page_of(i))) : 1;
      if (tokens + cost > limit) continue;
      tokens += cost;
      c.picked[i] = 1;
      // The page's other candidates: slots are ascending.
      for (std::int64_t j = i; by_page && j-- > 0 && page_of(j) == page_of(i);) c.picked[j] = 1;
      for (std::int64_t j = i; by_page && ++j < count && page_of(j) == page_of(i);) {
        c.picked[j] = 1;
      }
    }
    for (int g = 0; g < group_; ++g) share[g] += weight_share[g] * c.weights[g * count + i];
  }
  if (by_page) complete_pages(request);
  return by_mass && !by_page && tokens < limit && !is_reached();
}

// Tokens of picked pages that were no candidates become some.
void Selector::complete_pages(const SelectRequest& request) {
  Candidates& c = candidates_;
  slots_.clear();
  marked_.clear();
  for (std::size_t i = 0; i < c.size(); ++i) {
    const int page = c.slots[i] / page_size_;
    if (c.picked[i] == 0) {
      slots_.push_back(c.slots[i]);
      marked_.push_back(0);
    } else if (slots_.empty() || slots_.back() / page_size_ != page) {
      for (std::uint32_t slots = mask(page); slots != 0; slots &= slots - 1) {
        slots_.push_back(page * page_size_ + std::countr_zero(slots));
        marked_.push_back(1);
      }
    }
  }
  c.slots.swap(slots_);
  c.picked.swap(marked_);
  rescore(request);
}

void Selector::take_picked(Selection& selection) {
  const Candidates& c = candidates_;
  const auto count = static_cast<std::int64_t>(c.size());
  const std::size_t row_bytes = parts_.front().table().row_bytes();
  taken_.clear();  // their places among the candidates
  selection.picks.clear();
  for_each(c.slots, [&](const Part& part, std::size_t i, std::int32_t local) {
    if (c.picked[i] == 0) return;
    taken_.push_back(static_cast<std::int32_t>(i));
    const PageTable& table = part.table();
    const int page = table.page_of(local), place = table.place_of(local);
    simd::prefetch(table.value(page, place), row_bytes);  // attended soon
    if (selection.picks.empty() || selection.picks.back().local_page != part.first_page + page) {
      selection.picks.push_back(table.pick(page, 0));
      selection.picks.back().local_page = part.first_page + page;
    }
    selection.picks.back().slots |= 1u << place;
  });
  selection.tokens = static_cast<int>(taken_.size());
  selection.logits.resize(static_cast<std::size_t>(group_) * taken_.size());
  float* out = selection.logits.data();
  for (int g = 0; g < group_; ++g) {
    const float* logits = c.logits.data() + g * count;
    for (const std::int32_t i : taken_) *out++ = logits[i];
  }
}

}  // namespace icecache

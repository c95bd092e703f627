// Spending the token budget on rescored candidates.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "index/log_sum.h"
#include "index/paged_index.h"
#include "index/top_k.h"
#include "simd/kernels.h"
#include "simd/prefetch.h"

namespace icecache {
namespace {

// Marks the k largest masses, none of them negative; equal ones by their order. The upper half of a
// float's bits orders as floats do, but for those that share it with the last.
void mark_largest(std::span<const float> mass, std::int64_t k, std::vector<char>& marked) {
  const auto count = static_cast<std::int64_t>(mass.size());
  marked.assign(count, k >= count ? 1 : 0);
  if (k <= 0 || k >= count) return;
  thread_local std::vector<std::int16_t> upper_buffer;
  thread_local std::vector<std::int32_t> alike_buffer;
  std::vector<std::int16_t>& upper = upper_buffer;
  std::vector<std::int32_t>& alike = alike_buffer;
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
bool PagedIndex::pick(const SelectRequest& request, Candidates& candidates) const {
  thread_local std::vector<float> mass_buffer;
  std::vector<float>& mass = mass_buffer;
  const auto count = static_cast<std::int64_t>(candidates.size());
  const bool by_page = config().select == "page", by_mass = request.mass_target > 0.0;
  mass.assign(count, 0.0f);
  float weight_share[kMaxGroup], share[kMaxGroup];
  for (int g = 0; g < request.group; ++g) {
    const float known = log_add(request.near_lse[g], candidates.lse(g));
    const float* weights = candidates.weights.data() + g * count;
    if (known > -INFINITY) {
      simd::kernels().axpy(std::exp(candidates.max[g] - known), weights, mass.data(), count);
    }
    const float total = log_add(known, candidates.rest_lse[g]);
    share[g] = std::exp(request.near_lse[g] - total);
    weight_share[g] = std::exp(candidates.max[g] - total);
  }
  if (!by_page && !by_mass) {
    mark_largest(mass, request.budget, candidates.picked);
    return false;
  }

  thread_local std::vector<std::int32_t> ranking_buffer;
  std::vector<std::int32_t>& ranking = ranking_buffer;
  ranking.resize(count);
  std::iota(ranking.begin(), ranking.end(), 0);
  const auto better = [&](std::int32_t a, std::int32_t b) {
    return mass[a] != mass[b] ? mass[a] > mass[b] : a < b;
  };
  candidates.picked.assign(count, 0);
  // In what order tokens within the budget are picked does not matter.
  const std::int64_t unordered = by_page ? 0 : std::min<std::int64_t>(request.budget, count);
  std::nth_element(ranking.begin(), ranking.begin() + unordered, ranking.end(), better);
  const int limit = by_mass ? request.max_budget : request.budget;
  const auto page_of = [&](std::int64_t i) { return table_.page_of(candidates.slots[i]); };
  const auto is_reached = [&] {
    return std::all_of(share, share + request.group,
                       [&](float x) { return x >= request.mass_target; });
  };
  int tokens = 0;
  for (std::int64_t n = 0; n < count; ++n) {
    if (tokens >= limit || (tokens >= request.budget && is_reached())) break;
    if (n == unordered) std::sort(ranking.begin() + n, ranking.end(), better);
    const std::int32_t i = ranking[n];
    if (candidates.picked[i] == 0) {
      const int cost = by_page ? table_.count(page_of(i)) : 1;
      if (tokens + cost > limit) continue;
      tokens += cost;
      candidates.picked[i] = 1;
      // The page's other candidates: slots are ascending.
      for (std::int64_t j = i; by_page && j-- > 0 && page_of(j) == page_of(i);) {
        candidates.picked[j] = 1;
      }
      for (std::int64_t j = i; by_page && ++j < count && page_of(j) == page_of(i);) {
        candidates.picked[j] = 1;
      }
    }
    for (int g = 0; g < request.group; ++g) {
      share[g] += weight_share[g] * candidates.weights[g * count + i];
    }
  }
  if (by_page) complete_pages(request, candidates);
  return by_mass && !by_page && tokens < limit && !is_reached();
}

// Tokens of picked pages that were no candidates become some.
void PagedIndex::complete_pages(const SelectRequest& request, Candidates& candidates) const {
  thread_local std::vector<std::int32_t> slots_buffer;
  thread_local std::vector<char> picked_buffer;
  std::vector<std::int32_t>& slots = slots_buffer;
  std::vector<char>& picked = picked_buffer;
  const int s = table_.page_size();
  slots.clear();
  picked.clear();
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const int page = candidates.slots[i] / s;
    if (candidates.picked[i] == 0) {
      slots.push_back(candidates.slots[i]);
      picked.push_back(0);
    } else if (slots.empty() || slots.back() / s != page) {
      for (std::uint32_t mask = table_.mask(page); mask != 0; mask &= mask - 1) {
        slots.push_back(page * s + std::countr_zero(mask));
        picked.push_back(1);
      }
    }
  }
  candidates.slots.swap(slots);
  candidates.picked.swap(picked);
  candidates.bytes += rescore(request, candidates);
}

void PagedIndex::take_picked(const Candidates& candidates, int group, Selection& selection) const {
  thread_local std::vector<std::int32_t> taken_buffer;
  std::vector<std::int32_t>& taken = taken_buffer;  // their places among the candidates
  const auto count = static_cast<std::int64_t>(candidates.size());
  const std::size_t row_bytes = table_.head_dim() * size_of(table_.dtype());
  taken.clear();
  selection.picks.clear();
  for (std::int64_t i = 0; i < count; ++i) {
    if (candidates.picked[i] == 0) continue;
    taken.push_back(static_cast<std::int32_t>(i));
    const int page = table_.page_of(candidates.slots[i]);
    const int place = table_.place_of(candidates.slots[i]);
    const std::uint32_t slot = 1u << place;
    simd::prefetch(table_.value(page, place), row_bytes);  // attended soon
    if (selection.picks.empty() || selection.picks.back().local_page != page) {
      selection.picks.push_back(table_.pick(page, slot));
    } else {
      selection.picks.back().slots |= slot;
    }
  }
  selection.tokens = static_cast<int>(taken.size());
  selection.logits.resize(static_cast<std::size_t>(group) * taken.size());
  float* out = selection.logits.data();
  for (int g = 0; g < group; ++g) {
    const float* logits = candidates.logits.data() + g * count;
    for (const std::int32_t i : taken) *out++ = logits[i];
  }
}

}  // namespace icecache

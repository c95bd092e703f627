// Spending the token budget on rescored candidates.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "index/log_sum.h"
#include "index/paged_index.h"
#include "simd/kernels.h"

namespace icecache {

// Candidates are worth their attention mass, normalised per head over sink, window and candidates
// and summed over the group. A page is worth its best member. With mass_target the ranking is
// followed past the budget until every head's estimated share is reached.
void PagedIndex::pick(const SelectRequest& request, Candidates& candidates) const {
  thread_local std::vector<float> mass_buffer;
  thread_local std::vector<std::int32_t> ranking_buffer;
  std::vector<float>& mass = mass_buffer;
  std::vector<std::int32_t>& ranking = ranking_buffer;
  const auto count = static_cast<std::int64_t>(candidates.size());
  const bool by_page = config().select == "page", by_mass = request.mass_target > 0.0;
  mass.assign(count, 0.0f);
  float total[kMaxGroup], share[kMaxGroup];
  for (int g = 0; g < request.group; ++g) {
    const float* logits = candidates.logits.data() + g * count;
    const float known = log_add(request.near_lse[g], log_sum(logits, count));
    if (count > 0) simd::kernels().add_exp(logits, known, mass.data(), count);
    total[g] = log_add(known, candidates.rest_lse[g]);
    share[g] = std::exp(request.near_lse[g] - total[g]);
  }
  ranking.resize(count);
  std::iota(ranking.begin(), ranking.end(), 0);
  const auto better = [&](std::int32_t a, std::int32_t b) {
    return mass[a] != mass[b] ? mass[a] > mass[b] : a < b;
  };
  candidates.picked.assign(count, 0);
  if (!by_page && !by_mass) {
    const auto taken = std::min<std::int64_t>(request.budget, count);
    std::nth_element(ranking.begin(), ranking.begin() + taken, ranking.end(), better);
    for (std::int64_t i = 0; i < taken; ++i) candidates.picked[ranking[i]] = 1;
    return;
  }

  std::sort(ranking.begin(), ranking.end(), better);
  const int s = table_.page_size(), limit = by_mass ? request.max_budget : request.budget;
  const auto page_of = [&](std::int64_t i) { return candidates.slots[i] / s; };
  int tokens = 0;
  for (const std::int32_t i : ranking) {
    if (tokens >= limit) break;
    if (tokens >= request.budget && std::all_of(share, share + request.group, [&](float x) {
          return x >= request.mass_target;
        })) {
      break;
    }
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
      share[g] += std::exp(candidates.logits[g * count + i] - total[g]);
    }
  }
  if (by_page) complete_pages(request, candidates);
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
  const auto count = static_cast<std::int64_t>(candidates.size());
  const int s = table_.page_size();
  selection.picks.clear();
  selection.tokens = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (candidates.picked[i] == 0) continue;
    const int page = candidates.slots[i] / s;
    const std::uint32_t slot = 1u << (candidates.slots[i] % s);
    if (selection.picks.empty() || selection.picks.back().local_page != page) {
      selection.picks.push_back(table_.pick(page, slot));
    } else {
      selection.picks.back().slots |= slot;
    }
    ++selection.tokens;
  }
  selection.logits.resize(static_cast<std::size_t>(group) * selection.tokens);
  float* out = selection.logits.data();
  for (int g = 0; g < group; ++g) {
    const float* logits = candidates.logits.data() + g * count;
    for (std::int64_t i = 0; i < count; ++i) {
      if (candidates.picked[i] != 0) *out++ = logits[i];
    }
  }
}

}  // namespace icecache

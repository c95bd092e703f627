// Spending the token budget on rescored candidates.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "index/log_sum.h"
#include "index/paged_index.h"
#include "simd/kernels.h"

namespace icecache {
// Candidates are ranked by attention mass, normalised per head over sink, window and candidates and
// summed over the group. A page is worth its best member. With mass_target the ranking is followed
// past the budget until every head's estimated share is reached.
void PagedIndex::pick(const SelectRequest& request, const Candidates& candidates,
                      const float* logits, Selection& selection) const {
  const int group = request.group, s = table_.page_size();
  const std::int64_t count = static_cast<std::int64_t>(candidates.slots.size());
  thread_local std::vector<float> mass;
  thread_local std::vector<std::int32_t> ranking;
  thread_local std::vector<std::uint32_t> taken;
  mass.assign(count, 0.0f);
  float total[kMaxGroup], share[kMaxGroup];
  for (int g = 0; g < group; ++g) {
    const float known = log_add(request.near_lse[g], log_sum(logits + g * count, count));
    if (count > 0) simd::kernels().add_exp(logits + g * count, known, mass.data(), count);
    total[g] = log_add(known, candidates.rest_lse[g]);
    share[g] = std::exp(request.near_lse[g] - total[g]);
  }
  ranking.resize(count);
  std::iota(ranking.begin(), ranking.end(), 0);
  std::sort(ranking.begin(), ranking.end(), [&](std::int32_t a, std::int32_t b) {
    return mass[a] != mass[b] ? mass[a] > mass[b] : a < b;
  });

  const bool by_page = config().select == "page";
  const int limit = request.mass_target > 0.0 ? request.max_budget : request.budget;
  taken.assign(table_.page_count(), 0);
  int tokens = 0;
  for (std::int32_t i : ranking) {
    if (tokens >= limit) break;
    if (tokens >= request.budget) {
      const bool reached =
          std::all_of(share, share + group, [&](float x) { return x >= request.mass_target; });
      if (reached) break;
    }
    const int page = candidates.slots[i] / s;
    const std::uint32_t wanted = by_page ? table_.page(page).mask : 1u << (candidates.slots[i] % s);
    if ((taken[page] & wanted) == 0) {
      if (tokens + std::popcount(wanted) > limit) continue;
      taken[page] |= wanted;
      tokens += std::popcount(wanted);
    }
    for (int g = 0; g < group; ++g) share[g] += std::exp(logits[g * count + i] - total[g]);
  }

  selection.picks.clear();
  selection.tokens = tokens;
  selection.bytes_scanned = candidates.bytes;
  for (int page = 0; page < table_.page_count(); ++page) {
    if (taken[page] != 0) selection.picks.push_back(table_.pick(page, taken[page]));
  }
  selection.rest_lse.assign(candidates.rest_lse.begin(), candidates.rest_lse.end());
  for (std::int64_t i = 0; i < count; ++i) {
    if (taken[candidates.slots[i] / s] >> (candidates.slots[i] % s) & 1u) continue;
    for (int g = 0; g < group; ++g) {
      selection.rest_lse[g] = log_add(selection.rest_lse[g], logits[g * count + i]);
    }
  }
}

}  // namespace icecache

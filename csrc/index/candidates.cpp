// Candidates: how many, more of them, and their exact scores.
#include <algorithm>

#include "index/log_sum.h"
#include "index/paged_index.h"
#include "simd/kernels.h"

namespace icecache {

std::int64_t PagedIndex::rescore(const SelectRequest& request, Candidates& candidates) const {
  thread_local std::vector<const void*> rows_buffer;
  std::vector<const void*>& rows = rows_buffer;
  const auto count = static_cast<std::int64_t>(candidates.size());
  const std::size_t row_bytes = table_.head_dim() * size_of(table_.dtype());
  rows.resize(count);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t slot = candidates.slots[i];
    rows[i] = table_.key(table_.page_of(slot), table_.place_of(slot));
  }
  candidates.logits.resize(count * request.group);
  simd::kernels().row_logits({rows.data(), table_.dtype(), count, request.group, table_.head_dim()},
                             request.queries, candidates.logits.data(), count);
  candidates.weights.assign(count * request.group, 0.0f);
  candidates.max.resize(request.group);
  candidates.sum.resize(request.group);
  for (int g = 0; g < request.group; ++g) {
    const float* logits = candidates.logits.data() + g * count;
    simd::kernels().softmax_stats(logits, count, &candidates.max[g], &candidates.sum[g]);
    if (candidates.sum[g] == 0.0f) continue;
    simd::kernels().add_exp(logits, candidates.max[g], candidates.weights.data() + g * count,
                            count);
  }
  return count * static_cast<std::int64_t>(row_bytes);
}

std::int64_t PagedIndex::wanted_candidates(const SelectRequest& request) const {
  const bool few_at_first = finds_by_scores() && config().select == "token";
  return std::max<std::int64_t>(config().candidates,
                                few_at_first ? request.budget : request.max_budget);
}

bool PagedIndex::find_more(const SelectRequest& request, SketchScores* scores,
                           Candidates& candidates) const {
  thread_local std::vector<std::int32_t> more_buffer, all_buffer;
  std::vector<std::int32_t>&more = more_buffer, &all = all_buffer;
  const auto count = static_cast<std::int64_t>(candidates.size());
  const std::int64_t wanted = std::min<std::int64_t>(request.max_budget, 2 * count) - count;
  if (scores == nullptr || wanted <= 0) return false;
  float known[kMaxGroup];
  for (int g = 0; g < request.group; ++g) {
    known[g] = log_add(request.near_lse[g], candidates.lse(g));
  }
  scores->top(known, wanted, more);
  if (more.empty()) return false;
  all.resize(candidates.size() + more.size());
  std::merge(candidates.slots.begin(), candidates.slots.end(), more.begin(), more.end(),
             all.begin());
  candidates.slots.swap(all);
  // Of all candidates the new ones alone: the others' keys are at hand.
  candidates.bytes += rescore(request, candidates) * static_cast<std::int64_t>(more.size()) /
                      static_cast<std::int64_t>(candidates.size());
  return true;
}

}  // namespace icecache

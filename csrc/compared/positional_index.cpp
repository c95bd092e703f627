#include "compared/positional_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "compared/page_budget.h"
#include "icecache/error.h"
#include "index/log_sum.h"
#include "simd/kernels.h"

namespace icecache {

struct PositionalIndex::Scratch {
  Ranking ranking;
  PageBudget budget;
};

PositionalIndex::PositionalIndex(const HeadContext& context)
    : GrowingIndex(context), quest_(context.config->positional_bound == "quest") {}

std::unique_ptr<GrowingIndex> PositionalIndex::fork() const {
  return std::unique_ptr<GrowingIndex>(new PositionalIndex(*this));
}

int PositionalIndex::row_size() const {
  return (quest_ ? 2 : 1) * table().head_dim();
}

PositionalIndex::Arrangement PositionalIndex::arrange(const Rows& rows) {
  const int s = table().page_size();
  Arrangement arrangement;
  arrangement.order.resize(rows.count);
  std::iota(arrangement.order.begin(), arrangement.order.end(), 0);
  for (std::int32_t begin = 0; begin < rows.count; begin += s) {
    arrangement.bounds.push_back(begin);
    arrangement.nodes.push_back(begin / s / node_pages());
  }
  arrangement.bounds.push_back(rows.count);
  return arrangement;
}

void PositionalIndex::built() {
  GrowingIndex::built();
  order_.resize(table().page_count());
  std::iota(order_.begin(), order_.end(), 0);
  rows_.resize(static_cast<std::size_t>(table().page_count()) * row_size());
  for (int page : order_) refresh(page);
}

void PositionalIndex::summarize(int page, float* row) const {
  const int d = table().head_dim();
  const std::uint32_t mask = table().mask(page);
  float key[kMaxHeadDim];
  if (quest_) {
    std::fill_n(row, d, -INFINITY);
    std::fill_n(row + d, d, INFINITY);
  } else {
    std::fill_n(row, d, 0.0f);
  }
  const float share = 1.0f / static_cast<float>(std::popcount(mask));
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    table().key(page, std::countr_zero(rest), key);
    for (int i = 0; i < d; ++i) {
      if (quest_) {
        row[i] = std::max(row[i], key[i]);
        row[d + i] = std::min(row[d + i], key[i]);
      } else {
        row[i] += share * key[i];
      }
    }
  }
  // Rounding may make the mean of the largest floats infinite.
  constexpr float kMost = std::numeric_limits<float>::max();
  for (int i = 0; i < d && !quest_; ++i) row[i] = std::clamp(row[i], -kMost, kMost);
}

void PositionalIndex::refresh(int page) {
  summarize(page, rows_.data() + static_cast<std::size_t>(page) * row_size());
}

// With q+ and q- the positive and negative parts, the bound is q+.high + q-.low and the middle of
// both bounds is q.(high + low) / 2: each one dot product with the page's row.
void PositionalIndex::rank(const SelectRequest& request, Ranking& ranking) const {
  const simd::Kernels& kernels = simd::kernels();
  const int d = table().head_dim(), width = row_size(), pages = table().page_count();
  float upper[2 * kMaxHeadDim], middle[2 * kMaxHeadDim];
  ranking.pages.clear();
  for (int page : order_) ranking.pages.push_back(page);
  ranking.worth.assign(pages, quest_ ? -INFINITY : 0.0f);
  ranking.lse.assign(static_cast<std::size_t>(request.group) * pages, -INFINITY);
  for (int g = 0; g < request.group; ++g) {
    const float* query = request.queries + static_cast<std::size_t>(g) * d;
    for (int i = 0; i < d; ++i) {
      upper[i] = std::max(query[i], 0.0f);
      upper[d + i] = std::min(query[i], 0.0f);
      middle[i] = middle[d + i] = 0.5f * query[i];
    }
    float* lse = ranking.lse.data() + static_cast<std::size_t>(g) * pages;
    for (int page : order_) {
      const float* row = rows_.data() + static_cast<std::size_t>(page) * width;
      const float logit = kernels.dot(quest_ ? middle : query, row, width);
      lse[page] = soft_cap(logit, request.logit_softcap) +
                  std::log(static_cast<float>(table().count(page)));
      if (quest_) {
        ranking.worth[page] = std::max(ranking.worth[page], kernels.dot(upper, row, width));
      }
    }
    if (!quest_) {
      kernels.add_exp(lse, log_sum(lse, pages), ranking.worth.data(), pages);
    }
  }
  std::sort(ranking.pages.begin(), ranking.pages.end(), [&](std::int32_t a, std::int32_t b) {
    return ranking.worth[a] != ranking.worth[b] ? ranking.worth[a] > ranking.worth[b] : a < b;
  });
  ranking.bytes = static_cast<std::int64_t>(order_.size() * width * sizeof(float));
}

void PositionalIndex::find(const SelectRequest& request, std::int64_t wanted,
                           SearchScratch& scratch, Found& found) const {
  Ranking& ranking = scratch.as<Scratch>().ranking;
  rank(request, ranking);
  found.bytes = ranking.bytes;
  const int s = table().page_size(), pages = table().page_count();
  std::int64_t tokens = 0;
  for (std::int32_t page : ranking.pages) {
    if (tokens >= wanted) {
      for (int g = 0; g < request.group; ++g) {
        found.rest_lse[g] =
            log_add(found.rest_lse[g], ranking.lse[static_cast<std::size_t>(g) * pages + page]);
      }
      continue;
    }
    tokens += table().count(page);
    for (std::uint32_t rest = table().mask(page); rest != 0; rest &= rest - 1) {
      found.slots.push_back(page * s + std::countr_zero(rest));
    }
  }
  std::sort(found.slots.begin(), found.slots.end());
}

void PositionalIndex::choose_pages(const SelectRequest& request, SearchScratch& scratch,
                                   Selection& selection) const {
  auto& [ranking, budget] = scratch.as<Scratch>();
  rank(request, ranking);
  const int pages = table().page_count();
  float total[kMaxGroup];
  for (int g = 0; g < request.group; ++g) {
    total[g] = log_add(request.near_lse[g],
                       log_sum(ranking.lse.data() + static_cast<std::size_t>(g) * pages, pages));
  }
  budget.start(request, table(), total);
  selection.rest_lse.assign(request.group, -INFINITY);
  for (std::int32_t page : ranking.pages) {
    const auto lse = [&](int g) { return ranking.lse[static_cast<std::size_t>(g) * pages + page]; };
    if (!budget.spent() && budget.take(page, lse)) continue;
    for (int g = 0; g < request.group; ++g) {
      selection.rest_lse[g] = log_add(selection.rest_lse[g], lse(g));
    }
  }
  budget.finish(selection);
  selection.bytes_scanned = ranking.bytes;
}

int PositionalIndex::choose_page(const float*) {
  return order_.empty() || table().full(order_.back()) ? -1 : order_.back();
}

void PositionalIndex::page_opened(int page) {
  rows_.resize(static_cast<std::size_t>(table().page_count()) * row_size());
  order_.push_back(page);
}

void PositionalIndex::tokens_removed(int page) {
  if (table().in_use(page)) {
    refresh(page);
  } else {
    std::erase(order_, page);
  }
}

std::size_t PositionalIndex::memory_bytes() const {
  return GrowingIndex::memory_bytes() + rows_.capacity() * sizeof(float) +
         order_.capacity() * sizeof(int);
}

void PositionalIndex::check_integrity() const {
  GrowingIndex::check_integrity();
  if (!whole()) return;
  const int width = row_size();
  std::vector<float> row(width);
  std::int32_t next = -1;
  std::int32_t tokens = 0;
  for (int page : order_) {
    if (!table().in_use(page)) throw IntegrityError(message("page ", page, " is not in use"));
    for (std::uint32_t rest = table().mask(page); rest != 0; rest &= rest - 1) {
      const std::int32_t position = table().position(page, std::countr_zero(rest));
      if (next >= 0 && position != next)
        throw IntegrityError(
            message("page ", page, " has position ", position, " after ", next - 1));
      next = position + 1;
      ++tokens;
    }
    summarize(page, row.data());
    if (!std::equal(row.begin(), row.end(),
                    rows_.begin() + static_cast<std::ptrdiff_t>(page) * width))
      throw IntegrityError(message("page ", page, " has bounds that are not its members'"));
  }
  if (tokens != size())
    throw IntegrityError(message("ordered pages hold ", tokens, " of ", size(), " tokens"));
}

}  // namespace icecache

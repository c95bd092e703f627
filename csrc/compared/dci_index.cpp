#include "compared/dci_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "compared/page_budget.h"
#include "compared/random_direction.h"
#include "icecache/error.h"
#include "index/log_sum.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

constexpr std::int64_t kMinBeam = 30;
constexpr std::int64_t kTokensPerBeam = 1000;

}  // namespace

struct DciIndex::Scratch {
  Scan scan;
  DciTree::Found found;                             // by one head
  std::vector<const void*> rows;                    // keys of a page
  std::vector<std::pair<float, std::int32_t>> own;  // logit, slot id: those that one head found
  std::vector<float> rest;                          // logits of those that are no candidates
  PageBudget budget;
  std::vector<float> best, lse;                // [G, pages]
  std::vector<std::int32_t> lists[kMaxGroup];  // numbers in `scan`
};

DciIndex::DciIndex(const HeadContext& context)
    : GrowingIndex(context),
      tree_(context.head_dim, DciTree::every(context.config->dci_promotion),
            DciTree::every(context.config->dci_upper_promotion)),
      direction_(
          random_direction(static_cast<std::uint64_t>(context.config->seed), context.head_dim)) {}

std::unique_ptr<GrowingIndex> DciIndex::fork() const {
  return std::unique_ptr<GrowingIndex>(new DciIndex(*this));
}

std::int64_t DciIndex::beam() const {
  return config().dci_beam > 0 ? config().dci_beam
                               : std::max<std::int64_t>(size() / kTokensPerBeam, kMinBeam);
}

float DciIndex::project(const float* key) const {
  const float x = simd::kernels().dot(direction_.data(), key, direction_.size());
  return std::isnan(x) ? 0.0f : x;
}

DciIndex::Arrangement DciIndex::arrange(const Rows& rows) {
  const float* keys = rows.keys;
  const std::int32_t count = rows.count;
  const int d = table().head_dim(), s = table().page_size();
  pending_ = Pending{tree_, {}, {}};
  const std::vector<int> cells = pending_->tree.build(keys, count);
  std::vector<float> projections(count);
  for (std::int32_t i = 0; i < count; ++i) {
    projections[i] = project(keys + static_cast<std::size_t>(i) * d);
  }
  Arrangement arrangement;
  std::vector<std::int32_t>& order = arrangement.order;
  order.resize(count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    if (cells[a] != cells[b]) return cells[a] < cells[b];
    return projections[a] != projections[b] ? projections[a] < projections[b] : a < b;
  });
  int node = -1;
  for (std::int32_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && cells[order[end]] == cells[order[begin]]) ++end;
    for (std::int32_t i = begin; i < end; i += s) {
      if ((i - begin) / s % node_pages() == 0) ++node;
      arrangement.bounds.push_back(i);
      arrangement.nodes.push_back(node);
      pending_->cells.push_back(cells[order[i]]);
      pending_->starts.push_back(projections[order[i]]);
    }
  }
  arrangement.bounds.push_back(count);
  return arrangement;
}

void DciIndex::built() {
  GrowingIndex::built();
  tree_ = std::move(pending_->tree);
  cells_.resize(tree_.cell_count());
  for (int page = 0; page < table().page_count(); ++page) {
    cells_.append(pending_->cells[page], page, pending_->starts[page]);
    page_tokens_.push_back(table().count(page));
  }
  pending_.reset();
}

void DciIndex::scan(const SelectRequest& request, std::int64_t wanted, Scratch& scratch) const {
  Scan& scan = scratch.scan;
  DciTree::Found& found = scratch.found;
  std::vector<const void*>& rows = scratch.rows;
  const int d = table().head_dim(), s = table().page_size(), group = request.group;
  scan.heads_of_cell.assign(cells_.cell_count(), {});
  scan.bytes = 0;
  for (int g = 0; g < group; ++g) {
    tree_.search(request.queries + static_cast<std::size_t>(g) * d, request.logit_softcap,
                 static_cast<int>(beam()), wanted, found);
    for (int cell : found.cells) scan.heads_of_cell[cell].set(g);
    scan.unseen_lse[g] = found.unseen_lse;
    scan.bytes += found.scored * d * static_cast<std::int64_t>(sizeof(float));
  }
  scan.pages.clear();
  scan.heads.clear();
  for (int page = 0; page < table().page_count(); ++page) {
    if (!table().in_use(page) || scan.heads_of_cell[cells_.cell_of(page)].none()) continue;
    scan.pages.push_back(page);
    scan.heads.push_back(scan.heads_of_cell[cells_.cell_of(page)]);
  }
  scan.logits.assign(scan.pages.size() * group * s, -INFINITY);
  for (std::size_t i = 0; i < scan.pages.size(); ++i) {
    const int page = scan.pages[i];
    float* logits = scan.logits.data() + i * group * s;
    rows.clear();
    for (std::uint32_t mask = table().mask(page); mask != 0; mask &= mask - 1) {
      rows.push_back(table().key(page, std::countr_zero(mask)));
    }
    const auto count = static_cast<std::int64_t>(rows.size());
    float found_logits[kMaxGroup * kMaxPageSize];
    simd::kernels().row_logits(
        {rows.data(), table().format().dtype(), count, group, d, request.bias}, request.for_rows(),
        found_logits, count);
    simd::kernels().soft_cap(found_logits, group * count, request.logit_softcap);
    for (int g = 0; g < group; ++g) {
      const float* next = found_logits + g * count;
      for (std::uint32_t mask = table().mask(page); mask != 0; mask &= mask - 1) {
        logits[g * s + std::countr_zero(mask)] = *next++;
      }
    }
    for (int j = 0; j < group * s; ++j) {
      if (std::isnan(logits[j])) logits[j] = -INFINITY;
    }
    scan.bytes += table().count(page) * static_cast<std::int64_t>(table().row_bytes());
  }
}

void DciIndex::find(const SelectRequest& request, std::int64_t wanted, SearchScratch& kept,
                    Found& found) const {
  auto& scratch = kept.as<Scratch>();
  const Scan& scan = scratch.scan;
  auto& own = scratch.own;
  auto& rest = scratch.rest;
  const int s = table().page_size(), group = request.group;
  this->scan(request, wanted, scratch);
  found.bytes = scan.bytes;
  const auto collect = [&](int g) {
    own.clear();
    for (std::size_t i = 0; i < scan.pages.size(); ++i) {
      if (!scan.heads[i].test(g)) continue;
      const float* logits = scan.logits.data() + (i * group + g) * s;
      for (std::uint32_t mask = table().mask(scan.pages[i]); mask != 0; mask &= mask - 1) {
        const int slot = std::countr_zero(mask);
        own.emplace_back(logits[slot], scan.pages[i] * s + slot);
      }
    }
  };
  std::vector<std::int32_t>& slots = found.slots;
  for (int g = 0; g < group; ++g) {
    collect(g);
    const auto better = [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    };
    if (static_cast<std::int64_t>(own.size()) > wanted) {
      std::nth_element(own.begin(), own.begin() + wanted, own.end(), better);
      own.resize(wanted);
    }
    for (const auto& [logit, slot] : own) slots.push_back(slot);
  }
  std::sort(slots.begin(), slots.end());
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  for (int g = 0; g < group; ++g) {
    collect(g);
    rest.clear();
    for (const auto& [logit, slot] : own) {
      if (!std::binary_search(slots.begin(), slots.end(), slot)) rest.push_back(logit);
    }
    found.rest_lse[g] =
        log_add(scan.unseen_lse[g], log_sum(rest.data(), static_cast<std::int64_t>(rest.size())));
  }
}

void DciIndex::choose_pages(const SelectRequest& request, SearchScratch& kept,
                            Selection& selection) const {
  auto& scratch = kept.as<Scratch>();
  const Scan& found = scratch.scan;
  PageBudget& budget = scratch.budget;
  auto &best = scratch.best, &lse = scratch.lse;
  auto& lists = scratch.lists;
  const int s = table().page_size(), group = request.group;
  scan(request, std::max(request.budget, request.max_budget), scratch);
  const std::size_t pages = found.pages.size();
  best.resize(group * pages);
  lse.resize(group * pages);
  selection.rest_lse.assign(found.unseen_lse, found.unseen_lse + group);
  float total[kMaxGroup];
  std::size_t longest = 0;
  for (int g = 0; g < group; ++g) {
    std::vector<std::int32_t>& list = lists[g];
    list.clear();
    total[g] = log_add(request.near_lse[g], found.unseen_lse[g]);
    for (std::size_t i = 0; i < pages; ++i) {
      const float* logits = found.logits.data() + (i * group + g) * s;
      best[g * pages + i] = *std::max_element(logits, logits + s);
      lse[g * pages + i] = log_sum(logits, s);
      if (!found.heads[i].test(g)) continue;
      list.push_back(static_cast<std::int32_t>(i));
      total[g] = log_add(total[g], lse[g * pages + i]);
    }
    std::sort(list.begin(), list.end(), [&](std::int32_t a, std::int32_t b) {
      const float x = best[g * pages + a], y = best[g * pages + b];
      return x != y ? x > y : a < b;
    });
    longest = std::max(longest, list.size());
  }
  budget.start(request, table(), total);
  for (std::size_t rank = 0; rank < longest && !budget.spent(); ++rank) {
    for (int g = 0; g < group; ++g) {
      if (rank >= lists[g].size()) continue;
      const std::int32_t i = lists[g][rank];
      budget.take(found.pages[i], [&](int head) { return lse[head * pages + i]; });
    }
  }
  for (int g = 0; g < group; ++g) {
    for (std::int32_t i : lists[g]) {
      if (budget.taken(found.pages[i])) continue;
      selection.rest_lse[g] = log_add(selection.rest_lse[g], lse[g * pages + i]);
    }
  }
  budget.finish(selection);
  selection.bytes_scanned = found.bytes;
}

int DciIndex::choose_page(const float* key) {
  if (tree_.empty() || tree_.promotes(size())) return -1;
  return cells_.choose(tree_.nearest(key), project(key));
}

std::uint32_t DciIndex::upper_half(int page) const {
  float key[kMaxHeadDim], projections[kMaxPageSize], start;
  for (int slot = 0; slot < table().page_size(); ++slot) {
    table().key(page, slot, key);
    projections[slot] = project(key);
  }
  return upper_half_of(projections, table().page_size(), start);
}

void DciIndex::page_split(int page, int other) {
  float key[kMaxHeadDim], start = INFINITY;
  for (std::uint32_t mask = table().mask(other); mask != 0; mask &= mask - 1) {
    table().key(other, std::countr_zero(mask), key);
    start = std::min(start, project(key));
  }
  cells_.split(page, other, start);
  page_tokens_.resize(table().page_count());
  page_tokens_[page] = table().count(page);
  page_tokens_[other] = table().count(other);
}

// Its token opens a cell.
void DciIndex::page_opened(int page) {
  page_tokens_.resize(table().page_count());
  page_tokens_[page] = 0;
}

void DciIndex::token_added(int page) {
  int cell = cells_.cell_of(page);
  if (cell < 0) {
    float key[kMaxHeadDim];
    table().key(page, 0, key);
    cell = tree_.promote(key, size() - 1);
    cells_.resize(cell + 1);
    cells_.append(cell, page, project(key));
  }
  ++page_tokens_[page];
  tree_.add_tokens(cell, 1);
}

void DciIndex::tokens_removed(int page) {
  const int cell = cells_.cell_of(page);
  const std::int32_t left = table().count(page);
  tree_.add_tokens(cell, left - page_tokens_[page]);
  page_tokens_[page] = left;
  if (!table().in_use(page)) cells_.remove(page);
}

std::size_t DciIndex::memory_bytes() const {
  return GrowingIndex::memory_bytes() + tree_.memory_bytes() + cells_.memory_bytes() +
         direction_.capacity() * sizeof(float) + page_tokens_.capacity() * sizeof(std::int32_t);
}

void DciIndex::check_integrity() const {
  GrowingIndex::check_integrity();
  if (!whole()) return;
  cells_.check_integrity(table());
  tree_.check_integrity();
  if (tree_.tokens() != size())
    throw IntegrityError(message("the tree counts ", tree_.tokens(), " of ", size(), " tokens"));
  for (int cell = 0; cell < cells_.cell_count(); ++cell) {
    std::int32_t tokens = 0;
    for (int page : cells_.pages_of(cell)) tokens += table().count(page);
    if (tokens != (cell < tree_.cell_count() ? tree_.cell_tokens(cell) : 0))
      throw IntegrityError(message("cell ", cell, " holds ", tokens, " tokens, its node differs"));
  }
}

std::size_t dci_cells(const Config& config, std::int32_t tokens) {
  const std::int64_t step = DciTree::every(config.dci_promotion);
  return static_cast<std::size_t>((tokens + step - 1) / step);
}

}  // namespace icecache

#include "index/paged_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "icecache/error.h"
#include "simd/kernels.h"
#include "simd/prefetch.h"

namespace icecache {
namespace {

constexpr std::size_t kAhead = 12;  // slots whose keys are on their way

}  // namespace

PagedIndex::PagedIndex(const IndexContext& context)
    : context_(context),
      table_(context),
      far_(context.head_dim),
      has_far_field_(context.config->tail == "on") {}

int PagedIndex::node_pages() const {
  return std::max(1, static_cast<int>(config().far_node_tokens / config().page_size));
}

void PagedIndex::attach(int page, int node) {
  if (static_cast<int>(node_of_page_.size()) <= page) node_of_page_.resize(page + 1, -1);
  node_of_page_[page] = node;
  pages_of_node_[node].push_back(page);
}

void PagedIndex::build(const TokenBlock& tokens, const QueryMoments& queries) {
  const int d = context_.head_dim;
  std::vector<float> keys(static_cast<std::size_t>(tokens.count) * d);
  simd::kernels().to_float(tokens.keys, context_.dtype, keys.data(), keys.size());
  const Arrangement arrangement = arrange(keys.data(), tokens.count, queries);
  table_.add_pages(tokens, arrangement.order, arrangement.bounds);
  end_position_ = tokens.first_position + tokens.count;

  const int nodes = 1 + *std::max_element(arrangement.nodes.begin(), arrangement.nodes.end());
  pages_of_node_.resize(nodes);
  for (int p = 0; p < table_.page_count(); ++p) attach(p, arrangement.nodes[p]);
  if (has_far_field_) {
    std::vector<float> mu(d, 0.0f);
    for (int i = 0; i < d && queries.count > 0.0; ++i) {
      mu[i] = static_cast<float>(queries.first[i] / queries.count * context_.scale);
    }
    far_.reset(mu);
    for (int node = 0; node < nodes; ++node) {
      far_.add_node();
      far_.assign(node, table_, pages_of_node_[node]);
    }
  }
  built(keys.data(), arrangement);
}

void PagedIndex::insert(const TokenBlock& tokens) {
  const int d = context_.head_dim;
  const std::size_t row = d * size_of(context_.dtype);
  float key[kMaxHeadDim], value[kMaxHeadDim];
  for (std::int32_t t = 0; t < tokens.count; ++t) {
    const std::byte* raw_key = tokens.keys + t * row;
    const std::byte* raw_value = tokens.values + t * row;
    const std::int32_t position = tokens.first_position + t;
    simd::kernels().to_float(raw_key, context_.dtype, key, d);
    simd::kernels().to_float(raw_value, context_.dtype, value, d);
    int page = choose_page(key);
    if (page >= 0 && table_.full(page)) {
      const std::uint32_t moved = split_mask(page);
      const int other = table_.split(page, moved);
      attach(other, node_of_page_[page]);
      page_split(page, other, moved);
      shrink_node(node_of_page_[page]);
      page = choose_page(key);
      if (table_.full(page)) page = table_.full(other) ? -1 : other;
    }
    if (page >= 0) {
      const int slot = table_.append(page, raw_key, raw_value, position);
      if (has_far_field_) far_.add(node_of_page_[page], key, value);
      token_added(page, slot, key);
    } else {
      page = table_.open(raw_key, raw_value, position);
      if (pages_of_node_.empty() ||
          static_cast<int>(pages_of_node_.back().size()) >= node_pages()) {
        pages_of_node_.emplace_back();
        if (has_far_field_) far_.add_node();
      }
      attach(page, node_count() - 1);
      if (has_far_field_) far_.add(node_count() - 1, key, value);
      page_opened(page);
      token_added(page, 0, key);
    }
    end_position_ = position + 1;
  }
}

std::vector<int> PagedIndex::split_node(int node) const {
  const std::vector<int>& pages = pages_of_node_[node];
  return {pages.begin() + static_cast<std::ptrdiff_t>(pages.size() / 2), pages.end()};
}

void PagedIndex::shrink_node(int node) {
  if (static_cast<int>(pages_of_node_[node].size()) <= 2 * node_pages()) return;
  const std::vector<int> moved = split_node(node);
  const int other = node_count();
  pages_of_node_.emplace_back();
  std::erase_if(pages_of_node_[node], [&](int page) {
    return std::find(moved.begin(), moved.end(), page) != moved.end();
  });
  for (int page : moved) attach(page, other);
  if (has_far_field_) {
    far_.add_node();
    far_.assign(node, table_, pages_of_node_[node]);
    far_.assign(other, table_, pages_of_node_[other]);
  }
  node_was_split(node, other);
}

void PagedIndex::truncate(std::int32_t position) {
  if (position >= end_position_) return;
  const int s = table_.page_size();
  std::vector<int> touched;
  for (int page = 0; page < table_.page_count(); ++page) {
    if (!table_.in_use(page)) continue;
    std::uint32_t gone = 0;
    for (int slot = 0; slot < s; ++slot) {
      if (table_.position(page, slot) >= position) gone |= 1u << slot;
    }
    if (gone == 0) continue;
    table_.remove(page, gone);
    const int node = node_of_page_[page];
    if (touched.empty() || touched.back() != node) touched.push_back(node);
    if (!table_.in_use(page)) {
      std::erase(pages_of_node_[node], page);
      node_of_page_[page] = -1;
    }
    tokens_removed(page, node);
  }
  if (has_far_field_) {
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    for (int node : touched) far_.assign(node, table_, pages_of_node_[node]);
  }
  end_position_ = size() > 0 ? position : 0;
}

std::int64_t PagedIndex::exact_logits(const SelectRequest& request,
                                      std::span<const std::int32_t> slots, float* logits,
                                      std::int64_t stride) const {
  const int s = table_.page_size();
  float page_logits[kMaxGroup * kMaxPageSize];
  for (std::size_t begin = 0, end = 0; begin < slots.size(); begin = end) {
    const int page = slots[begin] / s;
    std::uint32_t mask = 0;
    for (; end < slots.size() && slots[end] / s == page; ++end) mask |= 1u << (slots[end] % s);
    if (const std::size_t ahead = end + kAhead; ahead < slots.size()) {
      simd::prefetch(table_.key(slots[ahead] / s, slots[ahead] % s),
                     table_.head_dim() * size_of(table_.dtype()));
    }
    simd::kernels().page_logits({request.queries, table_.keys(page), nullptr, table_.dtype(),
                                 request.group, table_.head_dim(), s, mask},
                                page_logits);
    for (std::size_t i = begin; i < end; ++i) {
      for (int g = 0; g < request.group; ++g) {
        logits[g * stride + static_cast<std::int64_t>(i)] = page_logits[g * s + slots[i] % s];
      }
    }
  }
  return static_cast<std::int64_t>(slots.size() * table_.head_dim() * size_of(table_.dtype()));
}

std::int64_t PagedIndex::wanted_candidates(const SelectRequest& request) const {
  return std::max<std::int64_t>(config().candidates, request.max_budget);
}

void PagedIndex::select(const SelectRequest& request, Selection& selection) const {
  thread_local Candidates candidates;
  thread_local std::vector<float> logits;
  candidates.slots.clear();
  candidates.rest_lse.assign(request.group, -INFINITY);
  candidates.bytes = 0;
  if (size() <= wanted_candidates(request)) {
    for (std::size_t i = 0; i < table_.positions().size(); ++i) {
      if (table_.positions()[i] >= 0) candidates.slots.push_back(static_cast<std::int32_t>(i));
    }
  } else {
    find(request, candidates);
  }
  const std::size_t count = candidates.slots.size();
  logits.resize(count * request.group);
  candidates.bytes +=
      exact_logits(request, candidates.slots, logits.data(), static_cast<std::int64_t>(count));
  pick(request, candidates, logits.data(), selection);
}

std::int64_t PagedIndex::far_field(const SelectRequest& request, const Selection& selection,
                                   const AttentionState& state,
                                   std::vector<FarNodeInfo>* nodes) const {
  if (!has_far_field_) return 0;
  return far_.merge_into(
      {request.queries, request.group, &table_, node_of_page_, pages_of_node_, selection.picks},
      state, nodes);
}

void PagedIndex::all_pages(std::vector<PagePick>& picks) const {
  for (int page = 0; page < table_.page_count(); ++page) {
    if (table_.in_use(page)) picks.push_back(table_.pick(page, table_.page(page).mask));
  }
}

std::vector<PageInfo> PagedIndex::pages() const {
  std::vector<PageInfo> result;
  for (int page = 0; page < table_.page_count(); ++page) {
    if (!table_.in_use(page)) continue;
    PageInfo info;
    info.page = table_.page(page).id;
    info.node = node_of_page_[page];
    for (int slot = 0; slot < table_.page_size(); ++slot) {
      if (table_.position(page, slot) >= 0) info.positions.push_back(table_.position(page, slot));
    }
    result.push_back(std::move(info));
  }
  return result;
}

void PagedIndex::selected_positions(const Selection& selection,
                                    std::vector<std::int32_t>& positions) const {
  positions.clear();
  for (const PagePick& pick : selection.picks) {
    for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1) {
      positions.push_back(table_.position(pick.local_page, std::countr_zero(slots)));
    }
  }
  std::sort(positions.begin(), positions.end());
}

std::size_t PagedIndex::memory_bytes() const {
  std::size_t bytes =
      table_.memory_bytes() + far_.memory_bytes() + node_of_page_.capacity() * sizeof(int);
  for (const auto& pages : pages_of_node_) bytes += pages.capacity() * sizeof(int);
  return bytes;
}

void PagedIndex::check_integrity() const {
  table_.check_integrity();
  std::vector<int> seen(table_.page_count(), 0);
  for (int node = 0; node < node_count(); ++node) {
    for (int page : pages_of_node_[node]) {
      if (!table_.in_use(page) || node_of_page_[page] != node || seen[page]++ != 0)
        throw IntegrityError(message("page ", page, " is not in node ", node, " exactly once"));
    }
    if (has_far_field_) far_.check_node(node, table_, pages_of_node_[node]);
  }
  for (int page = 0; page < table_.page_count(); ++page) {
    if (table_.in_use(page) && seen[page] != 1)
      throw IntegrityError(message("page ", page, " is in no node"));
  }
}

}  // namespace icecache

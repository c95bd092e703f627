#include "index/paged_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "icecache/error.h"
#include "index/log_sum.h"
#include "index/page_bound.h"
#include "index/sketch_scores.h"
#include "simd/four.h"
#include "simd/kernels.h"

namespace icecache {

PagedIndex::PagedIndex(const IndexContext& context)
    : context_(context),
      table_(context),
      sketch_(static_cast<int>(context.config->sketch_rank),
              static_cast<int>(context.config->sketch_bits),
              static_cast<int>(context.config->page_size)),
      far_(context.head_dim, context.dtype),
      has_far_field_(context.config->tail == "on") {}

int PagedIndex::node_pages() const {
  return static_cast<int>(node_tokens(config()) / static_cast<std::size_t>(config().page_size));
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
  std::vector<float> coordinates;
  if (has_sketches()) {
    space_ = TokenSpace::fit(keys.data(), tokens.values, context_.dtype, tokens.count, d, queries,
                             static_cast<int>(config().sketch_rank),
                             TokenSpace::value_rank_of(config(), d));
    coordinates.resize(static_cast<std::size_t>(tokens.count) * space_.width());
    space_.coordinates(keys.data(), tokens.values, context_.dtype, tokens.count,
                       coordinates.data());
    sketch_.fit(coordinates.data(), tokens.count, space_.width());
  }
  const Arrangement arrangement =
      arrange(keys.data(), has_sketches() ? coordinates.data() : nullptr, tokens.count);
  table_.add_pages(tokens, arrangement.order, arrangement.bounds);
  end_position_ = tokens.first_position + tokens.count;

  if (has_sketches()) {
    sketch_.resize(table_.page_count());
    for (int p = 0; p < table_.page_count(); ++p) {
      for (int i = arrangement.bounds[p]; i < arrangement.bounds[p + 1]; ++i) {
        sketch_.write(
            p, i - arrangement.bounds[p],
            coordinates.data() + static_cast<std::size_t>(arrangement.order[i]) * space_.width());
      }
    }
  }
  const int nodes = 1 + *std::max_element(arrangement.nodes.begin(), arrangement.nodes.end());
  pages_of_node_.resize(nodes);
  for (int p = 0; p < table_.page_count(); ++p) attach(p, arrangement.nodes[p]);
  for (int node = 0; has_far_field_ && node < nodes; ++node) {
    far_.add_node();
    far_.assign(node, table_, pages_of_node_[node]);
  }
  built(keys.data(), has_sketches() ? coordinates.data() : nullptr, arrangement);
}

bool PagedIndex::may_split() const {
  return table_.used_pages() < most_pages(size() + 1, table_.page_size());
}

void PagedIndex::insert(const TokenBlock& tokens) {
  const std::size_t row = context_.head_dim * size_of(context_.dtype);
  for (std::int32_t t = 0; t < tokens.count; ++t) {
    add_token(tokens.keys + t * row, tokens.values + t * row, tokens.first_position + t);
  }
}

int PagedIndex::split_page(int page) {
  const std::uint32_t moved = split_mask(page);
  const int other = table_.split(page, moved);
  whole_ = false;
  attach(other, node_of_page_[page]);
  if (has_sketches()) {
    sketch_.resize(table_.page_count());
    int to = 0;
    for (std::uint32_t slots = moved; slots != 0; slots &= slots - 1) {
      sketch_.copy(other, to++, page, std::countr_zero(slots));
    }
  }
  page_split(page, other, moved);
  shrink_node(node_of_page_[page]);
  whole_ = true;
  return other;
}

int PagedIndex::open_page(const std::byte* key, const std::byte* value, std::int32_t position) {
  const int page = table_.open(key, value, position);
  whole_ = false;
  end_position_ = position + 1;
  if (pages_of_node_.empty() || static_cast<int>(pages_of_node_.back().size()) >= node_pages()) {
    pages_of_node_.emplace_back();
    if (has_far_field_) far_.add_node();
  }
  attach(page, node_count() - 1);
  if (has_sketches()) sketch_.resize(table_.page_count());
  page_opened(page);
  return page;
}

void PagedIndex::add_token(const std::byte* raw_key, const std::byte* raw_value,
                           std::int32_t position) {
  const int d = context_.head_dim;
  float key[kMaxHeadDim], value[kMaxHeadDim], place[2 * kMaxHeadDim];
  const bool sketched = has_sketches();
  const float* coordinates = sketched ? place : nullptr;
  simd::kernels().to_float(raw_key, context_.dtype, key, d);
  simd::kernels().to_float(raw_value, context_.dtype, value, d);
  if (sketched) space_.coordinates(key, raw_value, context_.dtype, 1, place);
  int page = choose_page(key, coordinates);
  if (page >= 0 && table_.full(page) && !may_split()) {
    if (const int other = choose_other_page(page, coordinates); other >= 0) page = other;
  }
  if (page >= 0 && table_.full(page)) {
    const int other = split_page(page);
    page = choose_page(key, coordinates);
    if (table_.full(page)) page = table_.full(other) ? -1 : other;
  }
  int slot = 0;
  if (page >= 0) {
    slot = table_.append(page, raw_key, raw_value, position);
    whole_ = false;
    end_position_ = position + 1;
  } else {
    page = open_page(raw_key, raw_value, position);
  }
  if (has_far_field_) far_.add(node_of_page_[page], value);
  if (sketched) sketch_.write(page, slot, place);
  token_added(page, slot, key, coordinates);
  whole_ = true;
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

void PagedIndex::truncate(std::int32_t position) noexcept {
  if (position >= end_position_) return;
  const int s = table_.page_size();
  for (int page = 0; page < table_.page_count(); ++page) {
    if (!table_.in_use(page)) continue;
    std::uint32_t gone = 0;
    for (int slot = 0; slot < s; ++slot) {
      if (table_.position(page, slot) >= position) gone |= 1u << slot;
    }
    if (gone == 0) continue;
    table_.remove(page, gone);
    if (!whole_) continue;
    const int node = node_of_page_[page];
    if (!table_.in_use(page)) {
      std::erase(pages_of_node_[node], page);
      node_of_page_[page] = -1;
    }
    tokens_removed(page, node);
  }
  for (int node = 0; whole_ && has_far_field_ && node < node_count(); ++node) {
    std::int32_t left = 0;
    for (const int page : pages_of_node_[node]) left += table_.count(page);
    if (left != far_.tokens(node)) far_.assign(node, table_, pages_of_node_[node]);
  }
  end_position_ = size() > 0 ? position : 0;
}

void PagedIndex::select(const SelectRequest& request, Selection& selection) const {
  thread_local Candidates candidates_buffer;
  thread_local SketchScores scores_buffer;
  Candidates& candidates = candidates_buffer;
  const int s = table_.page_size();
  candidates.slots.clear();
  candidates.rest_lse.assign(request.group, -INFINITY);
  candidates.bytes = 0;
  const bool chosen = choose_pages(request, selection);
  const bool few = !chosen && size() <= wanted_candidates(request);
  SketchScores* scores = nullptr;
  if (!few && has_sketches()) {
    scores = &scores_buffer;
    candidates.bytes +=
        sketch_.scan(space_.metric, request.queries, request.group, table_.masks(), *scores);
  }
  if (chosen) {
    for (const PagePick& pick : selection.picks) {
      for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1) {
        candidates.slots.push_back(pick.local_page * s + std::countr_zero(slots));
      }
    }
    candidates.rest_lse = selection.rest_lse;
    candidates.bytes += selection.bytes_scanned;
    candidates.picked.assign(candidates.size(), 1);
    rescore(request, candidates);  // of what is attended anyway: read once
  } else {
    if (few) {
      for (std::size_t i = 0; i < table_.positions().size(); ++i) {
        if (table_.positions()[i] >= 0) candidates.slots.push_back(static_cast<std::int32_t>(i));
      }
    } else {
      find(request, scores, candidates);
    }
    candidates.bytes += rescore(request, candidates);
    do {
      if (scores != nullptr) {
        scores->exclude(candidates.slots);
        if (request.mass_target > 0.0) scores->log_totals(candidates.rest_lse.data());
      }
    } while (pick(request, candidates) && find_more(request, scores, candidates));
  }
  // Whole pages brought more candidates.
  if (scores != nullptr && config().select == "page") scores->exclude(candidates.slots);
  take_picked(candidates, request.group, selection);
  weigh_rest(scores, candidates, request.group, selection);
  selection.bytes_scanned = candidates.bytes;
}

namespace {

// Adds four columns of the page masses, times `scale`, to those of the pages' nodes. Pages of a
// node mostly follow one another.
void add_page_masses(const SketchScores& scores, const std::vector<int>& node_of_page, int first,
                     const float* scale, float* mass) {
  const int columns = simd::mass_stride(scores.group());
  const auto pages = static_cast<int>(node_of_page.size());
  const simd::Four scales = simd::load_four(scale);
  const float* from = scores.page_mass(0) + first;
  for (int page = 0; page < pages;) {
    const int node = node_of_page[page];
    simd::Four sum = {};
    for (; page < pages && node_of_page[page] == node; ++page, from += columns) {
      sum += simd::load_four(from);
    }
    if (node < 0) continue;
    float* to = mass + static_cast<std::ptrdiff_t>(node) * columns;
    simd::store_four(to, simd::load_four(to) + scales * sum);
  }
}

}  // namespace

void PagedIndex::weigh_nodes(const SketchScores* scores, const Candidates& candidates, int group,
                             std::vector<float>& mass, std::vector<float>& shift) const {
  const auto count = static_cast<std::int64_t>(candidates.size());
  const int nodes = node_count(), columns = simd::mass_stride(group);
  mass.assign(static_cast<std::size_t>(nodes) * columns, 0.0f);
  shift.assign(group, 0.0f);
  float of_scan[kMaxGroup + 3] = {}, of_candidates[kMaxGroup] = {};
  for (int g = 0; g < group; ++g) {
    const float scan_max = scores != nullptr ? scores->log_max(g) : -INFINITY;
    const float max = std::max(scan_max, candidates.max[g]);
    if (max == -INFINITY) continue;
    of_scan[g] = std::exp(scan_max - max);
    of_candidates[g] = std::exp(candidates.max[g] - max);
    shift[g] = max;
  }
  for (int first = 0; scores != nullptr && first < columns; first += 4) {
    add_page_masses(*scores, node_of_page_, first, of_scan + first, mass.data() + first);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (candidates.picked[i] != 0) continue;
    const int node = node_of_page_[table_.page_of(candidates.slots[i])];
    float* to = mass.data() + static_cast<std::size_t>(node) * columns;
    const float* weight = candidates.weights.data() + i;
    for (int g = 0; g < group; ++g) to[g] += of_candidates[g] * weight[g * count];
  }
}

void PagedIndex::weigh_rest(const SketchScores* scores, const Candidates& candidates, int group,
                            Selection& selection) const {
  const auto count = static_cast<std::int64_t>(candidates.size());
  const int nodes = node_count(), columns = simd::mass_stride(group);
  thread_local std::vector<float> mass_buffer;
  thread_local std::vector<std::int32_t> left_buffer;
  std::vector<float>& mass = mass_buffer;         // [C, columns]
  std::vector<std::int32_t>& left = left_buffer;  // [C] tokens that were not picked
  weigh_nodes(scores, candidates, group, mass, selection.far_shift);
  float total[kMaxGroup + 3];
  for (int first = 0; first < columns; first += 4) {
    simd::store_four(total + first, simd::sum_rows(mass.data() + first, nodes, columns));
  }
  selection.far_total.assign(total, total + group);
  // Where tokens are neither sketched nor candidates, only find() or choose_pages() knows of them.
  const bool others = scores == nullptr && static_cast<std::int32_t>(count) < size();
  selection.rest_lse.resize(group);
  for (int g = 0; g < group; ++g) {
    const float seen = selection.far_shift[g] + std::log(selection.far_total[g]);
    selection.rest_lse[g] = others ? log_add(candidates.rest_lse[g], seen) : seen;
  }
  if (!has_far_field_) {
    selection.far_weights.clear();
    selection.far_share.clear();
    selection.far_total.assign(group, 0.0f);
    return;
  }
  left.resize(nodes);
  for (int c = 0; c < nodes; ++c) left[c] = far_.tokens(c);
  for (const PagePick& pick : selection.picks) {
    left[node_of_page_[pick.local_page]] -= std::popcount(pick.slots);
  }
  selection.far_weights.resize(static_cast<std::size_t>(group) * nodes);
  for (int c = 0; c < nodes; ++c) {
    // The mean of those left is (tokens x mean - sum of the picked) / left.
    const auto tokens = static_cast<float>(far_.tokens(c));
    const float share = left[c] > 0 ? tokens / static_cast<float>(left[c]) : 0.0f;
    for (int g = 0; g < group; ++g) {
      selection.far_weights[g * nodes + c] = share * mass[c * columns + g];
    }
  }
  selection.far_share.resize(static_cast<std::size_t>(group) * selection.tokens);
  std::size_t at = 0;
  for (const PagePick& pick : selection.picks) {
    const int node = node_of_page_[pick.local_page];
    const float share = 1.0f / static_cast<float>(far_.tokens(node));
    for (int t = std::popcount(pick.slots); t > 0; --t, ++at) {
      for (int g = 0; g < group; ++g) {
        selection.far_share[g * selection.tokens + at] =
            share * selection.far_weights[g * nodes + node];
      }
    }
  }
}

void PagedIndex::far_nodes(const Selection& selection, std::vector<FarNodeInfo>& nodes) const {
  nodes.assign(has_far_field_ ? node_count() : 0, {});
  std::vector<int> left(nodes.size());
  for (std::size_t c = 0; c < nodes.size(); ++c) {
    left[c] = nodes[c].tokens = far_.tokens(static_cast<int>(c));
  }
  for (const PagePick& pick : selection.picks) {
    if (!nodes.empty()) left[node_of_page_[pick.local_page]] -= std::popcount(pick.slots);
  }
  for (std::size_t c = 0; c < nodes.size(); ++c) {
    for (std::size_t g = 0; g < selection.far_shift.size(); ++g) {
      const float share = static_cast<float>(left[c]) / static_cast<float>(nodes[c].tokens);
      const float mass = left[c] > 0 ? share * selection.far_weights[g * nodes.size() + c] : 0.0f;
      nodes[c].weight.push_back(std::log(mass) + selection.far_shift[g]);
    }
  }
}

PagedIndex::Snapshot PagedIndex::snapshot() const {
  return [table = std::make_shared<const PageTable>(table_)](std::byte* keys, std::byte* values) {
    table->gather(keys, values);
  };
}

void PagedIndex::all_pages(std::vector<PagePick>& picks) const {
  for (int page = 0; page < table_.page_count(); ++page) {
    if (table_.in_use(page)) picks.push_back(table_.pick(page, table_.mask(page)));
  }
}

std::vector<PageInfo> PagedIndex::pages() const {
  std::vector<PageInfo> result;
  for (int page = 0; page < table_.page_count(); ++page) {
    if (!table_.in_use(page)) continue;
    PageInfo info;
    info.page = table_.page(page).id;
    info.node = node_of_page_[page];
    info.positions.reserve(static_cast<std::size_t>(table_.count(page)));
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
  std::size_t bytes = table_.memory_bytes() + sketch_.memory_bytes() + far_.memory_bytes() +
                      (space_.metric.from_key.capacity() + space_.metric.from_query.capacity() +
                       space_.from_value.capacity()) *
                          sizeof(float) +
                      node_of_page_.capacity() * sizeof(int);
  for (const auto& pages : pages_of_node_) bytes += pages.capacity() * sizeof(int);
  return bytes;
}

void PagedIndex::check_integrity() const {
  table_.check_integrity();
  if (!whole_) return;
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

// What a step does not pick: its weight, and the far field that stands for it.
#include <algorithm>
#include <bit>
#include <cmath>

#include "index/log_sum.h"
#include "index/selector.h"
#include "simd/four.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Adds four columns of page masses, times `scale`, to those of the pages' nodes. Pages of a node
// mostly follow one another.
void add_page_masses(const float* from, std::span<const int> node_of_page, int columns,
                     const float* scale, float* mass) {
  const auto pages = static_cast<int>(node_of_page.size());
  const simd::Four scales = simd::load_four(scale);
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

void Selector::weigh_nodes(std::vector<float>& shift) {
  const Candidates& c = candidates_;
  const auto count = static_cast<std::int64_t>(c.size());
  const int columns = simd::mass_stride(group_);
  node_mass_.assign(static_cast<std::size_t>(nodes_) * columns, 0.0f);
  shift.assign(group_, 0.0f);
  float of_candidates[kMaxGroup];
  std::fill_n(of_candidates, group_, 0.0f);
  for (int g = 0; g < group_; ++g) {
    const float max = std::max(has_scores_ ? scores_.log_max(g) : -INFINITY, c.max[g]);
    if (max == -INFINITY) continue;
    of_candidates[g] = std::exp(c.max[g] - max);
    shift[g] = max;
  }
  for (std::size_t p = 0; has_scores_ && p < parts_.size(); ++p) {
    const Part& part = parts_[p];
    float of_scan[kMaxGroup];
    std::fill_n(of_scan + group_, columns - group_, 0.0f);
    for (int g = 0; g < group_; ++g)
      of_scan[g] = std::exp(scores_.log_max(part.number, g) - shift[g]);
    float* const mass = node_mass_.data() + static_cast<std::size_t>(part.first_node) * columns;
    for (int first = 0; first < columns; first += 4) {
      add_page_masses(scores_.page_mass(part.number, 0) + first,
                      part.segment->index().nodes_of_pages(), columns, of_scan + first,
                      mass + first);
    }
  }
  for_each(c.slots, [&](const Part& part, std::size_t i, std::int32_t local) {
    if (c.picked[i] != 0) return;
    const int node = part.first_node + part.segment->index().node_of(part.table().page_of(local));
    float* const to = node_mass_.data() + static_cast<std::size_t>(node) * columns;
    const float* const weight = c.weights.data() + i;
    for (int g = 0; g < group_; ++g) to[g] += of_candidates[g] * weight[g * count];
  });
}

void Selector::weigh_rest(Selection& selection) {
  const int columns = simd::mass_stride(group_);
  weigh_nodes(selection.far_shift);
  float total[kMaxGroup];
  for (int first = 0; first < columns; first += 4) {
    simd::store_four(total + first, simd::sum_rows(node_mass_.data() + first, nodes_, columns));
  }
  selection.far_total.assign(total, total + group_);
  // Where tokens are neither scanned nor candidates, only find() or choose_pages() knows of them.
  std::int64_t size = 0;
  for (const Part& part : parts_) size += part.segment->size();
  const bool others = !has_scores_ && static_cast<std::int64_t>(candidates_.size()) < size;
  selection.rest_lse.resize(group_);
  for (int g = 0; g < group_; ++g) {
    const float seen = selection.far_shift[g] + std::log(selection.far_total[g]);
    selection.rest_lse[g] = others ? log_add(candidates_.rest_lse[g], seen) : seen;
  }
  if (!has_far_field_) {
    selection.far_weights.clear();
    selection.far_share.clear();
    selection.far_total.assign(group_, 0.0f);
    return;
  }
  share_out(selection);
}

// What the nodes weigh without the picked tokens, and how much of that is theirs.
void Selector::share_out(Selection& selection) {
  const int columns = simd::mass_stride(group_);
  left_.clear();  // [C] tokens that were not picked
  for (const Part& part : parts_) {
    for (int node = 0; node < part.segment->index().node_count(); ++node) {
      left_.push_back(part.segment->node_tokens(node));
    }
  }
  const auto for_each_pick = [&](const auto& body) {
    const Part* part = parts_.data();
    for (const PagePick& pick : selection.picks) {
      while (pick.local_page >= part->first_page + part->pages()) ++part;
      const int node = part->segment->index().node_of(pick.local_page - part->first_page);
      body(pick, part->first_node + node, part->segment->node_tokens(node));
    }
  };
  for_each_pick([&](const PagePick& pick, int node, std::int32_t) {
    left_[node] -= std::popcount(pick.slots);
  });
  selection.far_weights.resize(static_cast<std::size_t>(group_) * nodes_);
  for (const Part& part : parts_) {
    for (int node = 0; node < part.segment->index().node_count(); ++node) {
      const int c = part.first_node + node;
      // The mean of those left is (tokens x mean - sum of the picked) / left.
      const auto tokens = static_cast<float>(part.segment->node_tokens(node));
      const float share = left_[c] > 0 ? tokens / static_cast<float>(left_[c]) : 0.0f;
      for (int g = 0; g < group_; ++g) {
        selection.far_weights[g * nodes_ + c] = share * node_mass_[c * columns + g];
      }
    }
  }
  selection.far_share.resize(static_cast<std::size_t>(group_) * selection.tokens);
  std::size_t at = 0;
  for_each_pick([&](const PagePick& pick, int node, std::int32_t tokens) {
    const float share = 1.0f / static_cast<float>(tokens);
    for (int t = std::popcount(pick.slots); t > 0; --t, ++at) {
      for (int g = 0; g < group_; ++g) {
        selection.far_share[g * selection.tokens + at] =
            share * selection.far_weights[g * nodes_ + node];
      }
    }
  });
}

void Selector::far_nodes(const Selection& selection, std::vector<FarNodeInfo>& nodes) const {
  nodes.clear();
  if (!has_far_field_) return;
  // left_ and node_mass_ are those of the selection.
  const int columns = simd::mass_stride(group_);
  for (const Part& part : parts_) {
    for (int node = 0; node < part.segment->index().node_count(); ++node) {
      FarNodeInfo info;
      const int c = part.first_node + node;
      info.tokens = part.segment->node_tokens(node);
      for (int g = 0; g < group_; ++g) {
        const float mass = left_[c] > 0 ? node_mass_[c * columns + g] : 0.0f;
        info.weight.push_back(std::log(mass) + selection.far_shift[g]);
      }
      nodes.push_back(std::move(info));
    }
  }
}

void Selector::pages(std::vector<PageInfo>& pages) const {
  pages.clear();
  for (const Part& part : parts_) {
    const std::span<const std::uint32_t> masks = part.segment->masks();
    for (int page = 0; page < part.pages(); ++page) {
      if (masks[page] == 0) continue;
      PageInfo info;
      info.page = part.table().page(page).id;
      info.node = part.first_node + part.segment->index().node_of(page);
      for (std::uint32_t slots = masks[page]; slots != 0; slots &= slots - 1) {
        info.positions.push_back(part.table().position(page, std::countr_zero(slots)));
      }
      pages.push_back(std::move(info));
    }
  }
}

void Selector::selected_positions(const Selection& selection,
                                  std::vector<std::int32_t>& positions) const {
  positions.clear();
  for (const PagePick& pick : selection.picks) {
    const Part& part = part_of_page(pick.local_page);
    for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1) {
      positions.push_back(
          part.table().position(pick.local_page - part.first_page, std::countr_zero(slots)));
    }
  }
  std::sort(positions.begin(), positions.end());
}

}  // namespace icecache

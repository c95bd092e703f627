#include "index/tree_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <ranges>

#include "icecache/error.h"
#include "index/bisect.h"
#include "simd/kernels.h"

namespace icecache {

TreeIndex::TreeIndex(const IndexContext& context)
    : PagedIndex(context),
      tree_(static_cast<int>(context.config->sketch_rank) +
            TokenSpace::value_rank_of(*context.config, context.head_dim)) {}

std::unique_ptr<SemanticIndex> TreeIndex::fork() const {
  return std::unique_ptr<SemanticIndex>(new TreeIndex(*this));
}

TreeIndex::Arrangement TreeIndex::arrange(const float* keys, const float* coordinates,
                                          std::int32_t count) {
  (void)keys;
  const int s = static_cast<int>(config().page_size);
  Arrangement arrangement;
  arrangement.order.resize(count);
  std::iota(arrangement.order.begin(), arrangement.order.end(), 0);
  bisect(coordinates, width(), arrangement.order, s, node_pages());
  for (std::int32_t begin = 0; begin < count; begin += s) {
    arrangement.nodes.push_back(begin / s / node_pages());
    arrangement.bounds.push_back(begin);
  }
  arrangement.bounds.push_back(count);
  return arrangement;
}

void TreeIndex::built(const float* keys, const float* coordinates, const Arrangement& arrangement) {
  (void)keys;
  page_sums_.assign(static_cast<std::size_t>(table().page_count()) * width(), 0.0f);
  for (int page = 0; page < table().page_count(); ++page) {
    for (int i = arrangement.bounds[page]; i < arrangement.bounds[page + 1]; ++i) {
      const float* y = coordinates + static_cast<std::size_t>(arrangement.order[i]) * width();
      for (int j = 0; j < width(); ++j) page_sums_[page * width() + j] += y[j];
    }
  }
  for (int node = 0; node < node_count(); ++node) set_leaf(node, node - 1);
}

void TreeIndex::find(const SelectRequest& request, SketchScores* scores,
                     Candidates& candidates) const {
  scores->top(request.near_lse, wanted_candidates(request), candidates.slots);
}

float TreeIndex::distance(int page, const float* coordinates) const {
  const float scale = 1.0f / static_cast<float>(table().count(page));
  float distance = 0.0f;
  for (int j = 0; j < width(); ++j) {
    const float delta = coordinates[j] - page_sums_[page * width() + j] * scale;
    distance += delta * delta;
  }
  return distance;
}

template <typename Pages, typename Fits>
int TreeIndex::nearest_page(const Pages& pages, const float* coordinates, const Fits& fits) const {
  int nearest = -1;
  float best = std::numeric_limits<float>::infinity();
  for (const int page : pages) {
    if (!fits(page)) continue;
    const float from_token = distance(page, coordinates);
    if (nearest < 0 || from_token < best) {
      best = from_token;
      nearest = page;
    }
  }
  return nearest;
}

int TreeIndex::choose_page(const float* key, const float* coordinates) {
  (void)key;
  const int node = tree_.nearest(coordinates);
  if (node < 0) return -1;
  return nearest_page(pages_of(node), coordinates, [](int) { return true; });
}

// Of the same node, whose summary is then the same; else of any.
int TreeIndex::choose_other_page(int full, const float* coordinates) const {
  const auto has_room = [this](int page) { return table().in_use(page) && !table().full(page); };
  const int near = nearest_page(pages_of(node_of(full)), coordinates, has_room);
  if (near >= 0) return near;
  return nearest_page(std::views::iota(0, table().page_count()), coordinates, has_room);
}

void TreeIndex::page_coordinates(int page, std::vector<float>& out) const {
  const int d = table().head_dim(), s = table().page_size();
  std::vector<float> keys(static_cast<std::size_t>(s) * d);
  simd::kernels().to_float(table().keys(page), table().dtype(), keys.data(), keys.size());
  out.resize(static_cast<std::size_t>(s) * width());
  space().coordinates(keys.data(), table().values(page), table().dtype(), s, out.data());
}

std::uint32_t TreeIndex::split_mask(int page) const {
  std::vector<float> coordinates;
  page_coordinates(page, coordinates);
  return upper_half(coordinates.data(), width(), table().page_size());
}

std::vector<int> TreeIndex::split_node(int node) const {
  const int width = this->width();
  const std::vector<int>& pages = pages_of(node);
  std::vector<float> centroids(pages.size() * width);
  for (std::size_t p = 0; p < pages.size(); ++p) {
    for (int j = 0; j < width; ++j) {
      centroids[p * width + j] =
          page_sums_[pages[p] * width + j] / static_cast<float>(table().count(pages[p]));
    }
  }
  const std::uint32_t upper = upper_half(centroids.data(), width, static_cast<int>(pages.size()));
  std::vector<int> moved;
  for (std::size_t p = 0; p < pages.size(); ++p) {
    if (upper >> p & 1u) moved.push_back(pages[p]);
  }
  return moved;
}

void TreeIndex::sum_page(int page) {
  const int width = this->width();
  float key[kMaxHeadDim], y[2 * kMaxHeadDim];
  float* sum = page_sums_.data() + static_cast<std::size_t>(page) * width;
  std::fill_n(sum, width, 0.0f);
  for (std::uint32_t mask = table().mask(page); mask != 0; mask &= mask - 1) {
    const int slot = std::countr_zero(mask);
    table().key(page, slot, key);
    space().coordinates(key, table().value(page, slot), table().dtype(), 1, y);
    for (int j = 0; j < width; ++j) sum[j] += y[j];
  }
}

void TreeIndex::set_leaf(int node, int near) {
  float sum[2 * kMaxHeadDim] = {};
  std::int32_t count = 0;
  for (int page : pages_of(node)) {
    count += table().count(page);
    for (int j = 0; j < width(); ++j) sum[j] += page_sums_[page * width() + j];
  }
  if (node == tree_.leaf_count()) {
    tree_.add_leaf(near, sum, count);
  } else {
    tree_.set(node, sum, count);
  }
}

void TreeIndex::token_added(int page, int slot, const float* key, const float* coordinates) {
  (void)slot, (void)key;
  for (int j = 0; j < width(); ++j) page_sums_[page * width() + j] += coordinates[j];
  tree_.add(node_of(page), coordinates);
}

void TreeIndex::page_split(int page, int other, std::uint32_t moved) {
  (void)moved;
  page_sums_.resize(static_cast<std::size_t>(table().page_count()) * width());
  sum_page(page);
  sum_page(other);
}

void TreeIndex::page_opened(int page) {
  page_sums_.resize(static_cast<std::size_t>(table().page_count()) * width());
  std::fill_n(page_sums_.data() + static_cast<std::size_t>(page) * width(), width(), 0.0f);
  // The token itself is added by token_added().
  if (node_of(page) == tree_.leaf_count()) {
    tree_.add_leaf(-1, page_sums_.data() + static_cast<std::size_t>(page) * width(), 0);
  }
}

void TreeIndex::node_was_split(int node, int other) {
  set_leaf(node, node);
  set_leaf(other, node);
}

void TreeIndex::tokens_removed(int page, int node) {
  if (table().in_use(page)) sum_page(page);
  set_leaf(node, node);
}

std::size_t TreeIndex::memory_bytes() const {
  return PagedIndex::memory_bytes() + tree_.memory_bytes() + page_sums_.capacity() * sizeof(float);
}

void TreeIndex::check_integrity() const {
  PagedIndex::check_integrity();
  if (!whole()) return;
  tree_.check_integrity();
  if (tree_.leaf_count() != node_count())
    throw IntegrityError(
        message("tree has ", tree_.leaf_count(), " leaves for ", node_count(), " nodes"));
  std::vector<float> coordinates;
  for (int page = 0; page < table().page_count(); ++page) {
    if (!table().in_use(page)) continue;
    page_coordinates(page, coordinates);
    for (int j = 0; j < width(); ++j) {
      double sum = 0.0, size = 1e-6;
      for (std::uint32_t mask = table().mask(page); mask != 0; mask &= mask - 1) {
        const double y = coordinates[std::countr_zero(mask) * width() + j];
        sum += y;
        size += std::abs(y);
      }
      if (!(std::abs(sum - page_sums_[page * width() + j]) <= 1e-3 * size))
        throw IntegrityError(message("page ", page, " differs from the sum of its members"));
    }
  }
}

std::unique_ptr<SemanticIndex> make_tree_index(const IndexContext& context) {
  return std::make_unique<TreeIndex>(context);
}

}  // namespace icecache

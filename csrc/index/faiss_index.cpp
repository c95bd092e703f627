#include "index/faiss_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <optional>

#include "icecache/error.h"
#include "index/bisect.h"
#include "index/faiss_search.h"
#include "index/tree_index.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

class FaissIndex final : public TreeIndex {
 public:
  explicit FaissIndex(const IndexContext& context) : TreeIndex(context) {
    if (config().faiss_search != "sketch") search_.emplace(config().faiss_search, context.head_dim);
  }
  std::unique_ptr<SemanticIndex> fork() const override {
    return std::unique_ptr<SemanticIndex>(new FaissIndex(*this));
  }
  std::size_t memory_bytes() const override {
    return TreeIndex::memory_bytes() + (search_ ? search_->memory_bytes() : 0);
  }

 protected:
  Arrangement arrange(const float* keys, const float* coordinates, std::int32_t count) override;
  void find(const SelectRequest& request, SketchScores* scores,
            Candidates& candidates) const override;

  void built(const float* keys, const float* coordinates, const Arrangement& arrangement) override {
    TreeIndex::built(keys, coordinates, arrangement);
    if (search_) build_search();
  }
  void token_added(int page, int slot, const float* key, const float* coordinates) override {
    TreeIndex::token_added(page, slot, key, coordinates);
    if (!search_) return;
    if (search_->is_stale()) {
      build_search();
    } else {
      search_->add(key, page * table().page_size() + slot);
    }
  }
  void page_split(int page, int other, std::uint32_t moved) override {
    TreeIndex::page_split(page, other, moved);
    if (!search_) return;
    const int s = table().page_size();
    for (int to = 0; moved != 0; moved &= moved - 1, ++to) {
      search_->move(page * s + std::countr_zero(moved), other * s + to);
    }
  }
  void tokens_removed(int page, int node) override {
    TreeIndex::tokens_removed(page, node);
    if (!search_) return;
    const int s = table().page_size();
    for (int slot = 0; slot < s; ++slot) {
      if (!table().in_use(page) || table().position(page, slot) < 0)
        search_->remove(page * s + slot);
    }
  }

 private:
  FaissIndex(const FaissIndex&) = default;

  // Over the keys as they are in the pages now.
  void build_search() {
    const int s = table().page_size(), d = table().head_dim();
    std::vector<std::int32_t> slots;
    for (std::size_t i = 0; i < table().positions().size(); ++i) {
      if (table().positions()[i] >= 0) slots.push_back(static_cast<std::int32_t>(i));
    }
    std::vector<float> keys(slots.size() * d);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      table().key(slots[i] / s, slots[i] % s, keys.data() + i * d);
    }
    search_->build(keys.data(), slots);
  }

  std::optional<FaissSearch> search_;  // none with faiss_search = "sketch"
};

// Each k-means cell is cut into pages by bisection, and into nodes of node_pages() pages. A cell's
// last page may be partly filled: that is the price of k-means, and what new tokens fill first.
FaissIndex::Arrangement FaissIndex::arrange(const float* keys, const float* coordinates,
                                            std::int32_t count) {
  const int s = static_cast<int>(config().page_size), d = context().head_dim;
  const std::int64_t cells =
      std::max<std::int64_t>(1, count / (static_cast<std::int64_t>(node_pages()) * s));
  const std::vector<std::int32_t> cell = faiss_cells(keys, count, d, cells, config().seed);
  Arrangement arrangement;
  arrangement.order.resize(count);
  std::iota(arrangement.order.begin(), arrangement.order.end(), 0);
  std::stable_sort(arrangement.order.begin(), arrangement.order.end(),
                   [&](std::int32_t a, std::int32_t b) { return cell[a] < cell[b]; });
  int node = 0;
  for (std::int32_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && cell[arrangement.order[end]] == cell[arrangement.order[begin]]) ++end;
    bisect(coordinates, space().width(), std::span(arrangement.order).subspan(begin, end - begin),
           s, node_pages());
    int page = 0;
    for (std::int32_t at = begin; at < end; at += s, ++page) {
      if (page > 0 && page % node_pages() == 0) ++node;
      arrangement.bounds.push_back(at);
      arrangement.nodes.push_back(node);
    }
    ++node;
  }
  arrangement.bounds.push_back(count);
  return arrangement;
}

void FaissIndex::find(const SelectRequest& request, SketchScores* scores,
                      Candidates& candidates) const {
  if (!search_) return TreeIndex::find(request, scores, candidates);
  // Each head of the group looks for its own; together they may find up to G times as many.
  candidates.bytes +=
      search_->search(request.queries, request.group, wanted_candidates(request), candidates.slots);
  std::sort(candidates.slots.begin(), candidates.slots.end());
  candidates.slots.erase(std::unique(candidates.slots.begin(), candidates.slots.end()),
                         candidates.slots.end());
}

}  // namespace

std::unique_ptr<SemanticIndex> make_faiss_index(const IndexContext& context) {
  return std::make_unique<FaissIndex>(context);
}

}  // namespace icecache

#include "compared/faiss_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <optional>

#include "compared/faiss_search.h"
#include "icecache/error.h"
#include "index/bisect.h"
#include "index/tree_index.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

class FaissIndex final : public TreeIndex, CandidateFinder {
 public:
  explicit FaissIndex(const HeadContext& context) : TreeIndex(context) {
    if (config().faiss_search != "sketch") search_.emplace(config().faiss_search, context.head_dim);
  }
  std::size_t memory_bytes() const override {
    return TreeIndex::memory_bytes() + (search_ ? search_->memory_bytes() : 0);
  }
  const CandidateFinder* finder() const override { return search_ ? this : nullptr; }

 protected:
  Arrangement arrange(const Rows& rows) override;
  void built() override {
    TreeIndex::built();
    if (search_) build_search();
  }

 private:
  void find(const SelectRequest& request, std::int64_t wanted, SearchScratch&,
            Found& found) const override;
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
FaissIndex::Arrangement FaissIndex::arrange(const Rows& rows) {
  const int s = static_cast<int>(config().page_size), d = context().head_dim;
  const std::int32_t count = rows.count;
  const std::int64_t cells =
      std::max<std::int64_t>(1, count / (static_cast<std::int64_t>(node_pages()) * s));
  const std::vector<std::int32_t> cell = faiss_cells(rows.keys, count, d, cells, config().seed);
  Arrangement arrangement;
  arrangement.order.resize(count);
  std::iota(arrangement.order.begin(), arrangement.order.end(), 0);
  std::stable_sort(arrangement.order.begin(), arrangement.order.end(),
                   [&](std::int32_t a, std::int32_t b) { return cell[a] < cell[b]; });
  int node = 0;
  for (std::int32_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && cell[arrangement.order[end]] == cell[arrangement.order[begin]]) ++end;
    bisect(rows.coordinates, space().width(),
           std::span(arrangement.order).subspan(begin, end - begin), s, node_pages());
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

void FaissIndex::find(const SelectRequest& request, std::int64_t wanted, SearchScratch&,
                      Found& found) const {
  // Each head of the group looks for its own; together they may find up to G times as many.
  found.bytes = search_->search(request.queries, request.group, wanted, found.slots);
  std::sort(found.slots.begin(), found.slots.end());
  found.slots.erase(std::unique(found.slots.begin(), found.slots.end()), found.slots.end());
}

}  // namespace

std::unique_ptr<SemanticIndex> make_faiss_index(const HeadContext& context) {
  return std::make_unique<FaissIndex>(context);
}

}  // namespace icecache

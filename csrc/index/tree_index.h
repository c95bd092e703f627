// TreeIndex (index = "tree"): pages from balanced bisection in the query metric, candidates from a
// flat scan of key sketches. design: docs/index.md.
#pragma once

#include <memory>
#include <vector>

#include "index/centroid_tree.h"
#include "index/paged_index.h"
#include "index/query_metric.h"
#include "index/sketch.h"

namespace icecache {

class TreeIndex : public PagedIndex {
 public:
  explicit TreeIndex(const IndexContext& context);
  std::unique_ptr<SemanticIndex> fork() const override;
  std::size_t memory_bytes() const override;
  void check_integrity() const override;

 protected:
  Arrangement arrange(const float* keys, std::int32_t count, const QueryMoments& queries) override;
  void built(const float* keys, const Arrangement& arrangement) override;
  void find(const SelectRequest& request, Candidates& candidates) const override;
  int choose_page(const float* key) override;
  std::uint32_t split_mask(int page) const override;
  std::vector<int> split_node(int node) const override;
  void token_added(int page, int slot, const float* key) override;
  void page_split(int page, int other, std::uint32_t moved) override;
  void page_opened(int page) override;
  void node_was_split(int node, int other) override;
  void tokens_removed(int page, int node) override;

  TreeIndex(const TreeIndex&) = default;
  // Pages of tokens with keys [N, D] and, in the query metric, coordinates [N, R].
  virtual Arrangement cluster(const float* keys, const float* coordinates, std::int32_t count);

 private:
  // Coordinates [S, R] of a page's tokens; rows of empty slots are left as they are.
  void page_coordinates(int page, std::vector<float>& out) const;
  // Sets the sum of a page from its members.
  void sum_page(int page);
  // Sets the tree's leaf of a node, which is added beside leaf `near` where there is none yet.
  void set_leaf(int node, int near);

  QueryMetric metric_;
  Sketch sketch_;
  CentroidTree tree_;
  std::vector<float> page_sums_;    // [P, R]
  std::vector<float> coordinates_;  // of the keys being built; of the key being inserted
};

std::unique_ptr<SemanticIndex> make_tree_index(const IndexContext& context);

}  // namespace icecache

// TreeIndex (index = "tree"): pages from balanced bisection of the space of tokens, candidates from
// a flat scan of key sketches. design: docs/index.md.
#pragma once

#include <memory>
#include <vector>

#include "index/centroid_tree.h"
#include "index/paged_index.h"

namespace icecache {

class TreeIndex : public PagedIndex {
 public:
  explicit TreeIndex(const IndexContext& context);
  std::unique_ptr<SemanticIndex> fork() const override;
  std::size_t memory_bytes() const override;
  void check_integrity() const override;

 protected:
  bool has_sketches() const override { return true; }
  bool finds_by_scores() const override { return true; }
  Arrangement arrange(const float* keys, const float* coordinates, std::int32_t count) override;
  void built(const float* keys, const float* coordinates, const Arrangement& arrangement) override;
  void find(const SelectRequest& request, SketchScores* scores,
            Candidates& candidates) const override;
  int choose_page(const float* key, const float* coordinates) override;
  int choose_other_page(int full, const float* coordinates) const override;
  std::uint32_t split_mask(int page) const override;
  std::vector<int> split_node(int node) const override;
  void token_added(int page, int slot, const float* key, const float* coordinates) override;
  void page_split(int page, int other, std::uint32_t moved) override;
  void page_opened(int page) override;
  void node_was_split(int node, int other) override;
  void tokens_removed(int page, int node) override;

  TreeIndex(const TreeIndex&) = default;

 private:
  int width() const { return space().width(); }
  // Squared distance of a token to the mean of a page.
  float distance(int page, const float* coordinates) const;
  // The nearest of `pages` that fits(page).
  template <typename Pages, typename Fits>
  int nearest_page(const Pages& pages, const float* coordinates, const Fits& fits) const;
  // Coordinates [S, width] of a page's tokens; rows of empty slots are left as they are.
  void page_coordinates(int page, std::vector<float>& out) const;
  // Sets the sum of a page from its members. Needs no memory.
  void sum_page(int page);
  // Sets the tree's leaf of a node, which is added beside leaf `near` where there is none yet; else
  // it needs no memory.
  void set_leaf(int node, int near);

  CentroidTree tree_;
  std::vector<float> page_sums_;  // [P, width]
};

std::unique_ptr<SemanticIndex> make_tree_index(const IndexContext& context);

}  // namespace icecache

// PagedIndex: what all indexes share. It owns the pages, the sketches and the far field, inserts
// with splits, truncates, forks, rescores candidates with exact keys, spends the budget on them and
// weighs the rest. An implementation says how tokens are arranged into pages and how candidates are
// found.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "icecache/semantic_index.h"
#include "index/far_field.h"
#include "index/page_table.h"
#include "index/sketch.h"
#include "index/token_space.h"

namespace icecache {

class PagedIndex : public SemanticIndex {
 public:
  explicit PagedIndex(const IndexContext& context);

  // Tokens per far-field node as built.
  static std::size_t node_tokens(const Config& config) {
    return static_cast<std::size_t>(std::max(config.far_node_tokens, config.page_size));
  }

  void build(const TokenBlock& tokens, const QueryMoments& queries) final;
  void insert(const TokenBlock& tokens) final;
  void select(const SelectRequest& request, Selection& selection) const final;
  std::span<const std::byte> far_values() const final { return far_.means(); }
  void far_nodes(const Selection& selection, std::vector<FarNodeInfo>& nodes) const final;
  void truncate(std::int32_t position) noexcept final;
  bool whole() const final { return whole_; }
  void gather(std::byte* keys, std::byte* values) const final { table_.gather(keys, values); }
  Snapshot snapshot() const final;
  std::int32_t size() const final { return table_.size(); }
  std::int32_t end_position() const final { return end_position_; }
  void all_pages(std::vector<PagePick>& picks) const final;
  std::vector<PageInfo> pages() const final;
  void selected_positions(const Selection& selection,
                          std::vector<std::int32_t>& positions) const final;
  std::size_t memory_bytes() const override;
  void check_integrity() const override;

 protected:
  PagedIndex(const PagedIndex&) = default;

  // Rows of the block in page order; page p holds order[bounds[p]..bounds[p + 1]), 1..S of them,
  // and belongs to far-field node nodes[p]; nodes are numbered from 0 without gaps.
  struct Arrangement {
    std::vector<std::int32_t> order, bounds, nodes;
  };
  // Tokens worth an exact score, and what the others weigh.
  struct Candidates {
    std::vector<std::int32_t> slots;  // slot ids, ascending, each once
    // [G] estimated log weight of all tokens that are not in slots; not asked for with sketches.
    std::vector<float> rest_lse;
    std::vector<float> logits;  // [G, slots] exact
    // exp(logits - max), [G, slots]; 0 where the logit is -inf. max, sum of weights: [G].
    std::vector<float> weights, max, sum;
    std::vector<char> picked;  // [slots]
    std::int64_t bytes = 0;    // read to find them
    std::size_t size() const { return slots.size(); }
    // Exact log weight of all of them, for one head.
    float lse(int g) const { return max[g] + std::log(sum[g]); }
  };

  // Whether keys are sketched: where the far field needs to know what tokens weigh.
  virtual bool has_sketches() const { return has_far_field_; }
  // keys: [N, D] fp32; coordinates: [N, width] in space(), null without sketches. Called once,
  // before the pages are taken.
  virtual Arrangement arrange(const float* keys, const float* coordinates, std::int32_t count) = 0;
  // Called once, when page p of the arrangement is local page p.
  virtual void built(const float* keys, const float* coordinates,
                     const Arrangement& arrangement) = 0;
  // Whether find() takes the tokens of the best scores, so that more of them can follow.
  virtual bool finds_by_scores() const { return false; }
  // Called where there are more tokens than wanted_candidates(); finds about that many. `scores` is
  // null without sketches.
  virtual void find(const SelectRequest& request, SketchScores* scores,
                    Candidates& candidates) const = 0;
  // Indexes that rank whole pages by themselves fill picks, tokens, rest_lse and bytes_scanned, and
  // return true; then there are no candidates.
  virtual bool choose_pages(const SelectRequest& request, Selection& selection) const {
    (void)request, (void)selection;
    return false;
  }

  // The page that a new key [D] joins (it may be full: then it is split), -1: a page of its own.
  // coordinates: [width] of the token, null without sketches.
  virtual int choose_page(const float* key, const float* coordinates) = 0;
  // Where a full page must not split, because most_pages() are in use: another one for the token,
  // that has room. -1: none will do, and the page splits all the same.
  virtual int choose_other_page(int full, const float* coordinates) const {
    (void)full, (void)coordinates;
    return -1;
  }
  // Which tokens of a full page move to a new one; neither none nor all.
  virtual std::uint32_t split_mask(int page) const = 0;
  // Which pages of a node that has grown too large move to a new node; neither none nor all.
  virtual std::vector<int> split_node(int node) const;

  // Bookkeeping hooks, called after the change.
  virtual void token_added(int page, int slot, const float* key, const float* coordinates) = 0;
  virtual void page_split(int page, int other, std::uint32_t moved) = 0;
  virtual void page_opened(int page) = 0;
  virtual void node_was_split(int node, int other) { (void)node, (void)other; }
  // `page` may have been dropped; it belonged to `node`. Needs no memory.
  virtual void tokens_removed(int page, int node) { (void)page, (void)node; }

  const PageTable& table() const { return table_; }
  const Config& config() const { return *context_.config; }
  const IndexContext& context() const { return context_; }
  int node_of(int page) const { return node_of_page_[page]; }
  int node_count() const { return static_cast<int>(pages_of_node_.size()); }
  const std::vector<int>& pages_of(int node) const { return pages_of_node_[node]; }
  const TokenSpace& space() const { return space_; }
  // Tokens that get an exact score at first; at least the budget, and where no more can follow,
  // what mass_target may pick.
  std::int64_t wanted_candidates(const SelectRequest& request) const;
  // Pages per far-field node as built.
  int node_pages() const;

 private:
  bool may_split() const;
  void attach(int page, int node);
  void shrink_node(int node);
  // Gives a full page's upper half to a new page, whose number it returns.
  int split_page(int page);
  void add_token(const std::byte* key, const std::byte* value, std::int32_t position);
  int open_page(const std::byte* key, const std::byte* value, std::int32_t position);
  // Exact logits of the candidates, and what they weigh. Returns the bytes read.
  std::int64_t rescore(const SelectRequest& request, Candidates& candidates) const;
  // Twice as many candidates as there are, at most what may be picked; false: there are no more.
  bool find_more(const SelectRequest& request, SketchScores* scores, Candidates& candidates) const;
  // Fills `picked` within the budget; picking whole pages adds their tokens to the candidates.
  // Returns whether all candidates are picked and mass_target asks for more.
  bool pick(const SelectRequest& request, Candidates& candidates) const;
  void complete_pages(const SelectRequest& request, Candidates& candidates) const;
  // Picks, tokens and logits of the selection.
  void take_picked(const Candidates& candidates, int group, Selection& selection) const;
  // What the tokens of each node weigh that were not picked, over exp(shift): mass
  // [C, simd::mass_stride(G)], shift [G]. Arguments as of weigh_rest().
  void weigh_nodes(const SketchScores* scores, const Candidates& candidates, int group,
                   std::vector<float>& mass, std::vector<float>& shift) const;
  // The far field and what is left unpicked, from the page masses of `scores` (candidates excluded;
  // null: no token but the candidates) and the exact logits of candidates that were not picked.
  void weigh_rest(const SketchScores* scores, const Candidates& candidates, int group,
                  Selection& selection) const;

  IndexContext context_;
  PageTable table_;
  TokenSpace space_;
  Sketch sketch_;
  FarField far_;
  bool has_far_field_;
  std::int32_t end_position_ = 0;
  bool whole_ = true;              // false from the change of a page until all summaries know of it
  std::vector<int> node_of_page_;  // [P]
  std::vector<std::vector<int>> pages_of_node_;  // [C]
};

}  // namespace icecache

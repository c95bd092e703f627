// SemanticIndex: tokens of one (sequence, layer, KV head) at consecutive positions, stored in pages
// of similar keys, with what tells a query which of them it needs and what the others weigh.
//
// An index is built once, and then only read: any number of sequences share it (Segment). One that
// can grow says so (GrowingIndex). An implementation says how tokens are arranged into pages, and
// may find candidates or choose pages by itself (index_search.h); what a step picks of candidates
// is the Selector's to say.
//
// Invariants (check_integrity)
//  1. Every token given to it is in exactly one page.
//  2. A summary equals the sum over its members to rounding, after any sequence of calls.
//  3. Deterministic: the same calls give bitwise the same.
//  4. Any finite keys and values are accepted: equal keys, zero keys, huge norms.
// After a build() that threw for want of pages or memory, the index can only be destroyed.
//
// Threads: const methods any number, others one caller; different indexes are independent.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "icecache/step_trace.h"
#include "index/far_field.h"
#include "index/index_search.h"
#include "index/node_keys.h"
#include "index/query_moments.h"
#include "index/sketch.h"
#include "index/token_space.h"
#include "pages/page_table.h"

namespace icecache {

class SemanticIndex {
 public:
  explicit SemanticIndex(const HeadContext& context)
      : SemanticIndex(context, context.config->tail == "on") {}
  virtual ~SemanticIndex() = default;
  SemanticIndex& operator=(const SemanticIndex&) = delete;

  // Tokens per far-field node as built.
  static std::size_t node_tokens(const Config& config) {
    return static_cast<std::size_t>(std::max(config.far_node_tokens, config.page_size));
  }

  // Fills an empty index; at least one token.
  void build(const TokenBlock& tokens, const QueryMoments& queries);

  std::int32_t size() const { return table_.size(); }
  // Positions of the tokens are from the one to below the other; equal where there are none.
  std::int32_t first_position() const { return first_position_; }
  std::int32_t end_position() const { return end_position_; }
  // Bytes of sketches, summaries and tables (not of pages).
  virtual std::size_t memory_bytes() const;
  virtual void check_integrity() const;

  const PageTable& table() const { return table_; }
  // Far-field node of a page.
  int node_of(int page) const { return node_of_page_[page]; }
  std::span<const int> nodes_of_pages() const { return node_of_page_; }
  int node_count() const { return node_count_; }
  // Whether keys are sketched: where the far field needs to know what tokens weigh.
  virtual bool has_sketches() const { return has_far_field_; }
  bool has_far_field() const { return has_far_field_; }
  // True for an index that only stores tokens: a step cannot pick some of them, it attends to all.
  virtual bool only_holds() const { return false; }
  // True for a part of a prompt of which more is to come: it is merged with what follows.
  bool in_prompt() const { return context_.in_prompt; }
  const Sketch& sketch() const { return sketch_; }
  const TokenSpace& space() const { return space_; }
  const FarField& far_field() const { return far_; }
  // Of the nodes of far_field(), with prefill_budget; else empty.
  const NodeKeys& node_keys() const { return node_keys_; }

  // Who names a query's candidates; null: the best sketch scores do.
  virtual const CandidateFinder* finder() const { return nullptr; }
  // Who chooses the pages that a query picks, in place of candidates; null: nobody.
  virtual const PageChooser* chooser() const { return nullptr; }

 protected:
  SemanticIndex(const HeadContext& context, bool has_far_field);
  SemanticIndex(const SemanticIndex&) = default;

  // Rows of the block in page order; page p holds order[bounds[p]..bounds[p + 1]), 1..S of them,
  // and belongs to far-field node nodes[p]; nodes are numbered from 0 without gaps.
  struct Arrangement {
    std::vector<std::int32_t> order, bounds, nodes;
  };
  // Rows of the block as floats.
  struct Rows {
    const float* keys;         // [N, D]; null where it only holds them
    const float* coordinates;  // [N, width] in space(); null without sketches
    std::int32_t count;        // N
  };
  // Called once, before the pages are taken.
  virtual Arrangement arrange(const Rows& rows) = 0;
  // Called once, when page p of the arrangement is local page p. What only an index that grows
  // needs is given back here.
  virtual void built();

  const Config& config() const { return *context_.config; }
  const HeadContext& context() const { return context_; }
  // Pages per far-field node as built.
  int node_pages() const;
  // Pages of each node.
  std::vector<std::vector<int>> pages_by_node() const;

  // What a GrowingIndex changes.
  HeadContext context_;
  PageTable table_;
  TokenSpace space_;
  Sketch sketch_;
  FarField far_;
  NodeKeys node_keys_;
  const bool has_far_field_;
  std::int32_t first_position_ = 0, end_position_ = 0;
  int node_count_ = 0;
  std::vector<int> node_of_page_;  // [P]
};

}  // namespace icecache

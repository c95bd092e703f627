// HeadCache: the KV cache of one (sequence, layer, KV head): sink, index and tail.
//
//   position 0 .. sink_tokens | .. index->end_position() | .. length
//            sink run         |  index (pages of alike)  |  tail run: window and what leaves it
//
// Invariants
//  1. Every token is in exactly one of sink, index, tail; the three cover 0..length without a gap.
//  2. A token is attended from the tail until the index holds it: running out of pages in the index
//     costs time, never a token.
//
// Threads: none of its own. Engine lets either one attend/append or one background update in.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/page_run.h"
#include "core/residency.h"
#include "icecache/engine.h"

namespace icecache {

class HeadCache {
 public:
  // `dense`: the layer always attends in full and builds no index.
  HeadCache(const IndexContext& context, Residency& residency, bool dense);
  HeadCache(const HeadCache& other);  // fork
  HeadCache(HeadCache&&) noexcept = default;

  std::int32_t length() const;
  std::size_t pages_for(std::int64_t tokens) const;
  // All rows of `head`; all or nothing.
  void append(const TensorView& keys, const TensorView& values, std::int64_t head);
  void truncate(std::int32_t length) noexcept;

  // True where a query at the end is answered within the token budget.
  bool sparse() const;

  // Exact causal attention of `rows` = T x G queries [T, G, D] (scaled), query t at position
  // first_position + t, merged into `state` (group = T * G).
  void attend_exact(const float* queries, int tokens, std::int32_t first_position,
                    const AttentionState& state, HeadStats& stats) const;
  // One query per head of the group [G, D] (scaled) at `position`; out [G, D] fp32, normalised.
  // REQUIRES: sparse().
  void decode(const float* queries, std::int32_t position, float* out, HeadStats& stats);

  // Queries [n, D], unscaled, that the metric of the next build is made from.
  void observe(const float* queries, int n);
  // Moves the tokens below `window_start` from the tail into the index, which is built, extended or
  // built anew. Without a change where the sequence fits the budget or pages run out.
  void update_index(std::int32_t window_start, HeadStats& stats);
  // Where the window begins for the step after the newest token.
  std::int32_t next_window_start() const;
  // True where update_index() would build, which takes long.
  bool build_is_due() const;
  bool dense() const { return dense_; }

  // Rows [length, D] in order of position.
  void gather(std::byte* keys, std::byte* values) const;
  std::size_t index_bytes() const { return index_ ? index_->memory_bytes() : 0; }
  std::size_t run_pages() const { return sink_.page_count() + tail_.page_count(); }
  std::int32_t indexed_tokens() const { return index_ ? index_->size() : 0; }
  const StepTrace& trace() const { return trace_; }
  void check_integrity() const;

 private:
  void attend_picks(std::span<const PagePick> picks, const float* queries, int rows,
                    const AttentionState& state, HeadStats& stats) const;
  // Pages of a run for T query tokens: whole pages at once, the causal edge token by token.
  void attend_run(const PageRun& run, const float* queries, int tokens, std::int32_t first_position,
                  const AttentionState& state, HeadStats& stats) const;
  void rebuild(std::int32_t due);
  bool rebuild_is_due(std::int32_t due) const;
  void record(const SelectRequest& request, const Selection& selection, std::int32_t position,
              const float* near_lse, std::vector<FarNodeInfo> far_nodes);

  IndexContext context_;
  Residency* residency_;
  bool dense_;
  PageRun sink_;
  PageRun tail_;
  std::unique_ptr<SemanticIndex> index_;
  std::int32_t built_tokens_ = 0;  // in the index when it was last built
  QueryMoments moments_;
  StepTrace trace_;
};

}  // namespace icecache

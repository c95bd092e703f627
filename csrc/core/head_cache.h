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

#include "core/index_rebuild.h"
#include "core/page_run.h"
#include "core/residency.h"
#include "cpu/paged_attention.h"
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
  // True where there is no index and none is due.
  bool is_short() const;

  // Exact causal attention of `rows` = T x G queries [T, G, D] (scaled), query t at position
  // first_position + t, merged into `state` (group = T * G).
  void attend_exact(const float* queries, int tokens, std::int32_t first_position,
                    const AttentionState& state, HeadStats& stats) const;
  // One query per head of the group [G, D] (scaled) at `position`; out [G, D] fp32, normalised.
  // REQUIRES: sparse().
  void decode(const float* queries, std::int32_t position, float* out, HeadStats& stats);

  // Queries [n, D], unscaled, that the metric of the next build is made from: see QueryMoments.
  void observe(const float* queries, std::int64_t n, std::int64_t skipped = 0);
  std::int64_t needed_queries(std::int64_t n) const { return moments_.needed(n); }
  // Moves the tokens below the window of the next step from the tail into the index, which is
  // built, extended or built anew, however long that takes. Without a change where the sequence
  // fits the budget or pages run out.
  void update_index(HeadStats& stats);
  // True where update_index() would build.
  bool build_is_due() const;
  bool dense() const { return dense_; }

  // Where the index has doubled since it was built: the work of building it anew, for a background
  // thread; null where it is not due or under way. `ready_at` is the length at which it takes over:
  // before the next decode() from there on the work must be done.
  std::shared_ptr<IndexRebuild> start_rebuild(std::int32_t delay, std::int32_t ready_after);
  // True where decode() would use the result of a rebuild.
  bool rebuild_is_ready() const;
  // Gives up a rebuild, whose work must be done.
  void drop_rebuild() { rebuild_ = nullptr; }

  // Rows [length, D] in order of position.
  void gather(std::byte* keys, std::byte* values) const;
  std::size_t index_bytes() const { return index_ ? index_->memory_bytes() : 0; }
  std::size_t run_pages() const { return sink_.page_count() + tail_.page_count(); }
  std::int32_t indexed_tokens() const { return index_ ? index_->size() : 0; }
  const StepTrace& trace() const { return trace_; }
  void check_integrity() const;

 private:
  void attend_picks(std::span<const PagePick> picks, QueryBlock block, const AttentionState& state,
                    HeadStats& stats) const;
  // The first query stands at `first_position`; none sees what comes after it.
  void attend_run(const PageRun& run, QueryBlock block, std::int32_t first_position,
                  const AttentionState& state, HeadStats& stats) const;
  // Where the window begins for the step after the newest token.
  std::int32_t next_window_start() const;
  void build(std::int32_t due);
  // Moves tokens from the tail into the index, and those of a rebuild a step on.
  void insert(std::int32_t due);
  void use_rebuild();
  bool has_doubled(std::int32_t more) const;
  // Calls body(lease, picks, first) for the picks in batches that the device has room for; `first`:
  // tokens before the batch.
  template <typename Body>
  void with_pages(std::span<const PagePick> picks, HeadStats& stats, const Body& body) const;
  void record(const SelectRequest& request, const Selection& selection, std::int32_t position,
              const float* near_lse);

  IndexContext context_;
  Residency* residency_;
  bool dense_;
  PageRun sink_;
  PageRun tail_;
  std::unique_ptr<SemanticIndex> index_;
  std::int32_t built_tokens_ = 0;  // in the index when it was last built
  // Not copied: a fork does without the rebuild that is under way, until the length at which it
  // would have taken over. Forks at every step, as beams make them, do not start one at every step.
  std::shared_ptr<IndexRebuild> rebuild_;
  std::int32_t next_rebuild_ = 0;
  QueryMoments moments_;
  StepTrace trace_;
};

}  // namespace icecache

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

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/index_rebuild.h"
#include "core/page_run.h"
#include "core/residency.h"
#include "cpu/exact_attention.h"
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
  // Undoes an append(): truncate() of what no step has seen.
  void take_back(std::int32_t length) noexcept;

  // True where a query at the end is answered within the token budget.
  bool sparse() const;
  // True where there is no index and none is due.
  bool is_short() const;

  // Exact causal attention of queries [T, G, D] (scaled), query t at position first_position + t;
  // out [T, G, D] fp32, normalised. Any finite numbers give what exact arithmetic would, to float's
  // rounding of the logits; a query with NaN or Inf gives NaN.
  void attend_exact(const float* queries, int tokens, std::int32_t first_position, float* out,
                    HeadStats& stats) const;
  // One query per head of the group [G, D] (scaled) at `position`; out [G, D] fp32, normalised.
  // Attends to everything where logits may be too large for a float to tell tokens apart, or a
  // query has NaN or Inf.
  // With telemetry = "trace", `trace` becomes what it looked at. Where it throws, tokens may have
  // moved from the tail into the index, which the same step would move again.
  // REQUIRES: sparse().
  void decode(const float* queries, std::int32_t position, float* out, HeadStats& stats,
              StepTrace& trace);
  // Pages that decode() of a step's last `tokens` tokens takes at most.
  std::size_t pages_for_decode(std::int64_t tokens) const;
  void set_trace(StepTrace trace) noexcept { trace_ = std::move(trace); }

  // The moments with queries [n, D], unscaled, that the metric of the next build is made from: see
  // QueryMoments. set_moments() lets the head have them.
  QueryMoments observed(const float* queries, std::int64_t n, std::int64_t skipped = 0) const;
  void set_moments(QueryMoments moments) noexcept { moments_ = std::move(moments); }
  std::int64_t needed_queries(std::int64_t n) const { return moments_.needed(n); }
  // Moves the tokens below the window of the next step from the tail into the index, which is
  // built, extended or built anew, however long that takes. Without a change where the sequence
  // fits the budget or pages run out. Where memory runs out, it throws; no token is lost, and the
  // next call makes up for it.
  void update_index(HeadStats& stats);
  // True where update_index() would build.
  bool build_is_due() const;
  // Pages that update_index() takes at most.
  std::size_t pages_for_update() const;
  bool dense() const { return dense_; }

  // Where the index has doubled since it was built: the work of building it anew, for a background
  // thread; null where it is not due or under way. It takes over when `ready_after` more tokens are
  // there: before the next decode() from there on the work must be done.
  std::shared_ptr<IndexRebuild> make_rebuild(std::int32_t delay, std::int32_t ready_after) const;
  void start_rebuild(std::shared_ptr<IndexRebuild> rebuild) noexcept;
  // No rebuild until `tokens` more tokens are there.
  void postpone_rebuild(std::int32_t tokens) noexcept { next_rebuild_ = length() + tokens; }
  // True where decode() would use the result of a rebuild.
  bool rebuild_is_ready() const;
  // Gives up a rebuild, whose work must be done.
  void drop_rebuild() noexcept { rebuild_ = nullptr; }
  // Pages that drop_rebuild() gives back.
  std::size_t rebuild_pages() const { return rebuild_ ? rebuild_->held_pages() : 0; }

  // Rows [length, D] in order of position.
  void gather(std::byte* keys, std::byte* values) const;
  std::size_t index_bytes() const { return index_ ? index_->memory_bytes() : 0; }
  std::size_t query_bytes() const { return moments_.memory_bytes(); }
  std::size_t run_pages() const { return sink_.page_count() + tail_.page_count(); }
  std::int32_t indexed_tokens() const { return index_ ? index_->size() : 0; }
  const StepTrace& trace() const { return trace_; }
  void check_integrity() const;

 private:
  // Tokens that a step of decoding inserts at once. What an insertion reads has left the caches
  // since the last one: four take half as long as one after the other. Until then they are window.
  static constexpr std::int32_t kInsertTogether = 4;

  struct Step;

  PageLayout layout() const;
  // Query t sees the first seen + t tokens of the picks.
  void attend_picks(std::span<const PagePick> picks, std::int64_t seen, ExactAttention& attention,
                    HeadStats& stats) const;
  // The parts of decode().
  void insert_due(std::int32_t position, HeadStats& stats);
  void score_near(const float* queries, std::int32_t position, Step& step, HeadStats& stats) const;
  void weigh(std::int64_t nodes, Step& step) const;
  void add_values(std::span<const std::byte> far_values, Step& step, float* out,
                  HeadStats& stats) const;
  void count_step(const Step& step, bool any_far, std::chrono::steady_clock::time_point start,
                  HeadStats& stats) const;
  // Where the window begins for the step after the newest token.
  std::int32_t next_window_start() const;
  // How many tokens of the tail lie before that window, and are to join the index.
  std::int32_t due_tokens() const;
  void build(std::int32_t due);
  // Moves tokens from the tail into the index, and those of a rebuild a step on.
  void insert(std::int32_t due);
  void use_rebuild();
  bool has_doubled(std::int32_t more) const;
  // True where an insertion failed half-way: until the index is built anew, everything is attended.
  bool is_broken() const { return index_ != nullptr && !index_->whole(); }
  // Calls body(lease, picks, first) for the picks in batches that the device has room for; `first`:
  // tokens before the batch.
  template <typename Body>
  void with_pages(std::span<const PagePick> picks, HeadStats& stats, const Body& body) const;
  StepTrace traced(const SelectRequest& request, const Selection& selection, std::int32_t position,
                   const float* near_lse) const;

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
  Magnitudes held_;  // of all keys and values that were ever here
  StepTrace trace_;
};

}  // namespace icecache

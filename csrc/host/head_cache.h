// HeadCache: the KV cache of one (sequence, layer, KV head).
//
//   position 0 .. sink_tokens | segment | segment | .. | tail run: .. what leaves it, window
//
// A segment is built once and shared with forks. Tokens that leave the window stay in the tail, and
// are attended exactly, until there are hundreds of them, which are sealed into a segment;
// neighbouring segments of like size are merged: both behind decoding, a log-structured merge tree
// (O'Neil et al. 1996). An index that grows by itself (grows()) takes the segments' place.
//
// Invariants
//  1. Every token is in exactly one of these; they cover 0..length without a gap.
//  2. A token is attended from the tail until an index holds it: running out of pages costs time,
//     never a token.
//
// Threads: none of its own. Engine lets either one attend/append or one background update in.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "cpu/exact_attention.h"
#include "host/attend_workspace.h"
#include "host/segment_build.h"
#include "icecache/engine.h"
#include "index/growing_index.h"
#include "pages/page_run.h"

namespace icecache {

class HeadCache {
 public:
  // `dense`: the layer always attends in full. Its segments only hold tokens, in eight bits; without
  // those there are none.
  HeadCache(const HeadContext& context, bool dense);
  HeadCache(const HeadCache& other);  // fork; REQUIRES: builds that are ready are done
  HeadCache(HeadCache&&) noexcept = default;

  std::int32_t length() const;
  std::size_t pages_for(std::int64_t tokens) const;
  // All rows of `head`; all or nothing.
  void append(const TensorView& keys, const TensorView& values, std::int64_t head);
  // What truncate() needs memory for, which then fails no more.
  struct Truncation {
    std::int32_t length = 0;
    std::optional<Segment> cut;  // the last segment that is left
  };
  Truncation prepare_truncate(std::int32_t length) const;
  // Keeps the first tokens. The trace goes, too, unless no step has seen what is taken back.
  void truncate(Truncation&& truncation, bool seen) noexcept;
  // Undoes an append() of the same call: no index has been built of what goes.
  void take_back(std::int32_t length) noexcept { truncate({length, std::nullopt}, false); }

  // True where a query at the end is answered within the token budget.
  bool sparse() const { return sparse_at(length() - 1); }
  // The same of a query at `position`. REQUIRES: builds that are ready there are done.
  bool sparse_at(std::int32_t position) const;
  // True where there is no index and none is due.
  bool is_short() const;

  // What attention writes, fp32: normalised rows [T, G, D], and the logs of their total weights
  // [T, G] unless null.
  struct Out {
    float* rows;
    float* lse;
  };
  // Exact causal attention of queries [T, G, D] (scaled), query t at position first_position + t.
  // Any finite numbers give what exact arithmetic would, to float's rounding of the logits; a query
  // with NaN or Inf gives NaN.
  void attend_exact(const float* queries, int tokens, std::int32_t first_position, Out out,
                    HeadStats& stats, AttendWorkspace& workspace) const;
  // A prompt within prefill_budget. Its tokens become segments chunk by chunk, at lengths that do not
  // depend on how it comes in calls, and blocks of kPromptBlock queries attend to sinks, to what is
  // in no chunk yet and to kPromptWindow tokens before the block exactly.
  static constexpr std::int32_t kPromptBlock = 64;
  // Chunks of the tail that queries behind the first `length` tokens pick of.
  int due_chunks(std::int32_t length) const;
  // Segments of the first chunks of the tail, beside the tokens: add_chunks() lets the head have
  // them, in their place. `queries` [Hq, T, D] are of the last T tokens. Throws OutOfPages.
  std::vector<Segment> build_chunks(int count, const TensorView& queries, int kv_head) const;
  std::size_t pages_for_chunks(int count) const;
  void reserve_chunks(std::size_t count) { segments_.reserve(segments_.size() + count + 2); }
  void add_chunks(std::vector<Segment> chunks) noexcept;
  // attend_exact() of a block that begins at a multiple of kPromptBlock, or goes on in one: with
  // those of `chunks`, of the tail, that it picks of.
  void attend_prompt(const float* queries, int tokens, std::int32_t first_position,
                     std::span<const Segment> chunks, Out out, HeadStats& stats,
                     AttendWorkspace& workspace) const;
  // One query per head of the group [G, D] (scaled) at `position`; T = 1.
  // Attends to everything where logits may be too large for a float to tell tokens apart, or a
  // query has NaN or Inf.
  // With telemetry = "trace", `trace` becomes what it looked at.
  // REQUIRES: sparse_at() and insert_due() for this position.
  void decode(const float* queries, std::int32_t position, Out out, HeadStats& stats,
              StepTrace& trace, AttendWorkspace& step) const;
  // What comes first in a step whose query is at `position`: an index that grows takes in the tokens
  // that have left the window. Where it throws, some of them have moved; the same step would move
  // the others.
  void insert_due(std::int32_t position, HeadStats& stats, AttendWorkspace& workspace);
  // Pages that insert_due() takes at most.
  std::size_t pages_for_decode() const;
  void set_trace(StepTrace trace) noexcept { trace_ = std::move(trace); }

  // The moments with n queries more, of which [counting_queries(n).size(), D], unscaled, are given:
  // see QueryMoments. The metric of the next build is made from them once set_moments() lets the
  // head have them.
  QueryMoments observed(const float* queries, std::int64_t n) const;
  void set_moments(QueryMoments moments) noexcept { moments_ = std::move(moments); }
  std::vector<std::int64_t> counting_queries(std::int64_t n) const { return moments_.counting(n); }
  // What a decoded token leaves once it stays.
  struct Decoded {
    std::int32_t position;
    HeadStats stats;  // of its step
    // [G, D] in the cache's dtype, unscaled; null where they do not shape the metric. Forks share it.
    std::shared_ptr<const std::vector<std::byte>> queries;
  };
  // Puts what is left of earlier calls, in order of position, to those of one: layers that share
  // these keys attend for the same tokens one after the other.
  void join_decoded(std::vector<Decoded>& decoded) const;
  // In place of what was left. truncate() drops those whose tokens go.
  void set_decoded(std::vector<Decoded> decoded) noexcept { decoded_ = std::move(decoded); }
  // Statistics of the tokens below `position`, which are counted elsewhere from now on.
  HeadStats take_stats(std::int32_t position) noexcept;
  void add_last_stats(HeadStats& sum) const;  // of all that is left
  // The tokens below `position` stay: their queries join the moments. All or nothing.
  void observe_until(std::int32_t position);
  // Moves the tokens below the window of the next step from the tail into a segment, if they are
  // enough, or the growing index, however long that takes. Without a change where the sequence fits
  // the budget or pages run out. Where memory runs out, it throws; no token is lost, and the next
  // call makes up for it.
  // With `packs`, more of a prompt is to come: where kv_dtype is int8 its tokens are stored in eight
  // bits now, and indexed at the prompt's end. Until then everything is attended.
  void update_index(bool packs, HeadStats& stats);
  // True where update_index() would build.
  bool build_is_due(bool packs) const;
  // Pages that update_index() takes at most.
  std::size_t pages_for_update(bool packs) const;
  bool dense() const { return dense_; }
  // True where a prompt's tokens attend within prefill_budget.
  bool picks_in_prompts() const { return context_.config->prefill_budget > 0 && !dense_; }
  // True where tokens are inserted into one index, in place of segments.
  bool grows() const { return grows_; }
  // True where no index is ever built: all tokens are attended, and stay as the model makes them.
  bool stays_whole() const { return dense_ && context_.stored() == context_.dtype; }

  // Work for a background thread: tokens to be sealed, or segments to be merged.
  enum class Work : std::uint8_t { kSeal, kMerge };
  static constexpr Work kWorks[] = {Work::kSeal, Work::kMerge};
  static std::size_t at(Work work) { return static_cast<std::size_t>(work); }
  // `length` below: the tokens of the sequence that will not be taken back. It may hold more.
  // Tokens of the segment that is due to be built; 0 where none is due, or one is under way.
  std::int32_t due_work(Work work, std::int32_t length) const;
  // It takes over when the sequence has `ready_at` tokens: before decode() of a query from there on
  // it must be done. REQUIRES: observe_until(length).
  std::shared_ptr<SegmentBuild> make_build(Work work, std::int32_t length, std::int32_t ready_at);
  void start_build(Work work, std::shared_ptr<SegmentBuild> build) noexcept;
  // None until the sequence has `length` tokens.
  void postpone_build(Work work, std::int32_t length) noexcept { next_build_[at(work)] = length; }
  // True where decode() of the last of `length` tokens uses the result.
  bool build_is_ready(Work work, std::int32_t length) const;
  // Adds the segments whose builds are ready at `length`, in place of the tokens or segments that
  // they were built of.
  void use_builds(std::int32_t length, HeadStats& stats) noexcept;
  // Gives up what is under way, whose work must be done.
  void drop_builds() noexcept;
  // Pages that drop_builds() gives back.
  std::size_t build_pages() const;

  // Rows [length, D] in order of position, in the model's type.
  void gather(std::byte* keys, std::byte* values) const;
  // Sets the entries of the pages that it holds.
  void mark_pages(std::vector<bool>& held) const;
  // Bytes of the indexes that are not in `counted`, and puts these into it.
  std::size_t index_bytes(std::set<const SemanticIndex*>& counted) const;
  std::size_t query_bytes() const;
  std::size_t run_pages() const { return sink_.page_count() + tail_.page_count(); }
  std::int32_t indexed_tokens() const;
  const StepTrace& trace() const { return trace_; }
  void check_integrity() const;

 private:
  // Tokens that a step of decoding inserts at once. What an insertion reads has left the caches
  // since the last one: four take half as long as one after the other. Until then they are window.
  static constexpr std::int32_t kInsertTogether = 4;

  // Of a segment that is sealed, at least.
  std::int32_t seal_tokens() const {
    return static_cast<std::int32_t>(context_.config->segment_tokens);
  }
  bool has_index() const { return !segments_.empty() || growing_ != nullptr; }
  // Of the first `end` segments, those from this one on are merged with `more` tokens that follow;
  // of all, with the last one.
  std::size_t first_to_merge(std::size_t end, std::int32_t more) const;
  std::size_t first_to_merge() const;
  // The first segment of a prompt of which more was to come; their number: none is.
  std::size_t first_in_prompt() const;
  bool has_in_prompt() const { return first_in_prompt() < segments_.size(); }
  // The format of its segments, if there are any.
  std::optional<RowFormat> format() const;
  // Pages of sink and tail, and of an index.
  PageLayout run_layout() const;
  static PageLayout layout_of(const PageTable& table);
  // Query t sees the first seen + t tokens of workspace.picks.
  void attend_picks(const PageLayout& layout, std::int64_t seen, ExactAttention& attention,
                    HeadStats& stats, AttendWorkspace& workspace) const;
  // All tokens of a segment that queries from `first_position` on see.
  void attend_segment(const Segment& segment, std::int32_t first_position,
                      ExactAttention& attention, HeadStats& stats,
                      AttendWorkspace& workspace) const;
  void attend_run(const PageRun& run, std::int32_t begin, std::int32_t first_position,
                  std::int32_t end, ExactAttention& attention, HeadStats& stats,
                  AttendWorkspace& workspace) const;
  // Where chunk `number` of the tail ends. Queries below `seen_from` that position shape its metric,
  // and those from there on pick of it.
  std::int32_t chunk_end(int number) const;
  static std::int32_t seen_from(std::int32_t end_position);
  // The parts of attend_prompt().
  // What the block picks of, and attends to whole: workspace.segments, and from there on the tail.
  void look_back(std::int32_t first_position, std::span<const Segment> chunks,
                 AttendWorkspace& workspace) const;
  // What the nodes of workspace.segments[number] weigh without the picked tokens.
  void add_nodes(std::size_t number, std::span<const BlockSelector::Pick> picks,
                 const float* queries, int tokens, ExactAttention& attention,
                 AttendWorkspace& workspace) const;
  // Their mean keys and values, spreads and numbers of tokens, in the workspace.
  void take_picks_out(const Segment& segment, std::span<const BlockSelector::Pick> picks,
                      AttendWorkspace& workspace) const;
  // The parts of decode().
  void score_near(const float* queries, std::int32_t position, AttendWorkspace& step) const;
  void weigh(std::int64_t nodes, AttendWorkspace& step) const;
  // The rows become those of the picks, keys or values.
  void set_rows(const PageLayout& layout, std::span<const PagePick> picks, bool values,
                AttendWorkspace& step) const;
  // Fills step.turned and step.bias where rows of the segments have codes, and lets the request have
  // them.
  void turn_queries(SelectRequest& request, AttendWorkspace& step) const;
  void add_values(std::int64_t nodes, float* out, HeadStats& stats, AttendWorkspace& step) const;
  void count_step(const AttendWorkspace& step, bool any_far,
                  std::chrono::steady_clock::time_point start, HeadStats& stats) const;
  // What a build that is ready at `length` has made; null: nothing, or there is none.
  const SemanticIndex* ready_segment(Work work, std::int32_t length) const;
  // The number of the first segment that a build merges.
  std::ptrdiff_t first_source(const SegmentBuild& build) const;
  // What a query at `position` sees of the sequence: step.segments, and of the tail the tokens from
  // step.tail_begin on. A build that is ready takes its place here, and for good in use_builds().
  void look_at(std::int32_t position, AttendWorkspace& step) const;
  // Where the window begins for a query at `position`.
  std::int32_t window_start(std::int32_t position) const;
  // How many tokens of the tail lie before the window of the query after `length` tokens, and are
  // to join the index.
  std::int32_t due_tokens(std::int32_t length) const;
  // Throws OutOfPages where there are certainly too few pages for an index of so many tokens: where
  // they are scarce, every step tries to build.
  void require_pages(std::int32_t tokens) const;
  // Makes a segment of the due tokens and the last segments; the growing index anew, with them.
  void build_segment(std::int32_t due);
  // Makes a segment of the due tokens that only holds them.
  void pack_segment(std::int32_t due);
  void build_growing(std::int32_t due);
  // Moves tokens from the tail into the growing index. `moving` is scratch.
  void insert(std::int32_t due, std::vector<std::byte>& moving);
  // True where an insertion failed half-way: until the index is built anew, everything is attended.
  bool is_broken() const { return growing_ != nullptr && !growing_->whole(); }
  // Throws IntegrityError where a page is not what it was when it was picked.
  void verify(std::span<const PagePick> picks) const;
  StepTrace traced(std::int32_t position, const AttendWorkspace& step) const;

  HeadContext context_;
  bool dense_, grows_;
  PageRun sink_;
  PageRun tail_;
  std::vector<Segment> segments_;          // with room for two more than there are
  std::unique_ptr<GrowingIndex> growing_;  // null unless grows(), and where there is none yet
  // A fork has what is ready, and does without what is under way, until the length at which it
  // would have taken over. Forks at every step, as beams make them, do not start builds at every
  // step.
  std::shared_ptr<SegmentBuild> builds_[2];
  std::int32_t next_build_[2] = {};
  QueryMoments moments_;
  std::vector<Decoded> decoded_;
  Magnitudes held_;  // of all keys and values that were ever here
  StepTrace trace_;
};

}  // namespace icecache

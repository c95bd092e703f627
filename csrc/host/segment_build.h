// SegmentBuild: how a segment is made: of decoded tokens that are sealed, of segments that are
// merged, or of both.
//
// On a background thread, decoding goes on without it and never waits for it, and its results do
// not depend on timing: the segment takes over at a length that is fixed when the work starts,
// which is so far away that the work is long done.
//
// Threads: run() on a background thread, once; afterwards (the caller has waited) the owner alone.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "index/segment.h"
#include "pages/page_run.h"

namespace icecache {

class SegmentBuild {
 public:
  // What a segment is made of: segments that follow one another, and the first `run_tokens` tokens
  // of `run`, which follow them; there may be no segments, and no run.
  struct Sources {
    std::vector<Segment> segments;
    std::optional<PageRun> run;
    std::int32_t run_tokens = 0;
    // Of all segments that the head has, these or others; none: it has no other.
    std::optional<RowFormat> format;
  };
  // Takes over when the sequence has `ready_at` tokens.
  SegmentBuild(const HeadContext& context, Sources sources, const QueryMoments& queries,
               std::int32_t ready_at);

  // The segment's index. Throws OutOfPages and std::bad_alloc, and then has changed nothing.
  std::shared_ptr<const SemanticIndex> build() const;
  // Builds and lets go of what it was made from. Without pages or memory result() is null.
  void run();

  std::int32_t first_position() const { return first_position_; }
  std::int32_t end_position() const { return first_position_ + count_; }
  std::int32_t ready_at() const { return ready_at_; }
  // Segments that it merges; 0: it seals tokens.
  std::size_t source_count() const { return source_count_; }
  // Pages that run() takes at most.
  std::size_t most_pages() const;
  // The segment. REQUIRES: run() has ended.
  const std::shared_ptr<const SemanticIndex>& result() const { return result_; }

 private:
  HeadContext context_;
  Sources sources_;
  QueryMoments queries_;
  std::size_t source_count_;
  std::int32_t first_position_, count_, ready_at_;
  std::shared_ptr<const SemanticIndex> result_;
};

}  // namespace icecache

// SegmentBuild: a segment that is made on a background thread while decoding goes on without it: of
// decoded tokens that are sealed, or of segments that are merged.
//
// Decoding never waits for it and its results do not depend on timing: the segment takes over at a
// length that is fixed when the work starts, which is so far away that the work is long done.
//
// Threads: run() on a background thread, once; afterwards (the caller has waited) the owner alone.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/page_run.h"
#include "index/segment.h"

namespace icecache {

class SegmentBuild {
 public:
  // Seals the first `count` tokens of a run. Takes over when the sequence has `ready_at` tokens.
  SegmentBuild(const IndexContext& context, const PageRun& run, std::int32_t count,
               const QueryMoments& queries, std::int32_t ready_at);
  // Merges segments that follow one another.
  SegmentBuild(const IndexContext& context, std::vector<Segment> sources,
               const QueryMoments& queries, std::int32_t ready_at);

  // Builds. Without pages or memory there is no segment, and result() is null.
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
  IndexContext context_;
  std::optional<PageRun> run_;
  std::vector<Segment> sources_;
  QueryMoments queries_;
  std::size_t source_count_;
  std::int32_t first_position_, count_, ready_at_;
  std::shared_ptr<const SemanticIndex> result_;
};

}  // namespace icecache

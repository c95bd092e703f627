// BlockSelector: chooses which tokens of a head's sealed segments a block of neighbouring queries of
// a prompt attends to exactly.
//
// A block picks together: what is scattered for one query is a matrix product for many, and tokens
// next to each other want much the same. Every query of the block scans the sketches; a token ranks
// by the largest share of attention that any of them gives it, by 32 directions of the sketch: there
// are so many picks that finer ones would change few. (Queries that do not scan lose what
// they alone attend to: with every fourth one scanning, SmolLM2's KL was 35 times as large.) No exact
// scores: all that is picked is attended.
//
// Threads: none of its own. Keeps its buffers.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "index/segment.h"
#include "index/sketch_scores.h"

namespace icecache {

class BlockSelector {
 public:
  struct Request {
    const float* queries = nullptr;   // [T, G, D] scaled, finite; logits as SelectRequest has them
    const float* near_lse = nullptr;  // [T, G] log weight of what is attended anyway
    int tokens = 0;                   // T
    int group = 0;                    // G
    float logit_softcap = 0.0f;
    std::int64_t budget = 0;  // tokens to pick at most
    std::int32_t exact_from = std::numeric_limits<
        std::int32_t>::max();  // tokens from this position on are picked beside them
  };
  // Tokens of one page of a segment.
  struct Pick {
    int segment;  // its number
    PagePick page;
  };
  // Of `segments`, which have sketches: picks in order, each page once. Returns the bytes read.
  std::int64_t select(std::span<const Segment* const> segments, const Request& request,
                      std::vector<Pick>& picks);
  // Of the last selection: queries in directions of a segment's sketch, times the step of its codes,
  // [T, G, NodeKeys::dims()].
  std::span<const float> projected(std::size_t segment) const { return projected_[segment]; }

 private:
  void prepare(std::span<const Segment* const> segments, const Request& request);
  // Scans the sketches for the queries of one pass. Each token keeps the highest rank that a pass so
  // far has given it. Returns the bytes read.
  std::int64_t scan(std::span<const Segment* const> segments, const Request& request, int number);

  // Gives the tokens from `position` on the highest rank. Returns their number.
  std::int64_t prefer(std::span<const Segment* const> segments, std::int32_t position);

  // Rows that scan together.
  struct Pass {
    int first = 0, rows = 0;
    std::vector<Sketch::Query> prepared;  // of each segment
  };
  std::vector<Pass> passes_;
  int pass_count_ = 0, octave_ = 0;
  SketchScores scores_;
  std::vector<int> pages_;
  std::vector<float> basis_;
  std::vector<std::vector<float>> projected_;  // of each segment
  float share_of_one_ = 0.0f;                  // the rank of a share of 1 in the first pass
  std::vector<std::int32_t> slots_;
};

}  // namespace icecache

// Sketch: a few quantised coordinates of every key, in page order, for a flat scan with the query.
//
// 16 bytes a key with R = 32 and 4 bits. The scan scores every token: pruning by bounds of pages or
// cells loses needles, single tokens in a cell of strangers (docs/index.md).
// Layout: see simd::SketchScanArgs. Each coordinate is quantised uniformly between the smallest and
// the largest value it had in fit(); later keys are clamped into that range.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "index/query_metric.h"
#include "index/sketch_scores.h"

namespace icecache {

class Sketch {
 public:
  Sketch(int rank, int bits, int page_size) : rank_(rank), bits_(bits), page_size_(page_size) {}

  // Ranges from coordinates [n, stride], of which the first R count.
  void fit(const float* coordinates, std::int64_t n, std::int64_t stride);
  // Makes room for pages 0..pages-1.
  void resize(int pages);
  void write(int page, int slot, const float* coordinates);
  // The first `dims` codes of a slot, a multiple of 8.
  void read(int page, int slot, int dims, std::uint8_t* codes) const;
  // Copies the codes of one slot.
  void copy(int to_page, int to_slot, int from_page, int from_slot);

  // Queries [G, D] (scaled) as a scan takes them: in its directions, and quantised to 7 or 8 bits
  // on a scale common to the group; that adds a tenth at most to the error that 4 bits a coordinate
  // make.
  struct Query {
    std::vector<float> projected;      // [G, R]
    std::vector<std::int8_t> rounded;  // [G, dims]
    int dims = 0;                      // the first ones of R
    std::int32_t base[kMaxGroup];      // such that no score is below 0
    float bias[kMaxGroup];             // nats of a score of 0
    int level = 0, reach = 0;          // its unit is 2^level; the largest sum
    int octave = 0;                    // of SketchScores, at least
  };
  void prepare(const QueryMetric& metric, const float* queries, int group, Query& query) const;
  // The same in two steps, for a scan that looks at the first `dims` of the R directions, those in
  // which keys vary most, and for many queries [n, D] whose projections [n, dims] are made at once.
  // `projected` [G, dims] become times the step of a code. `basis` is scratch.
  void project(const QueryMetric& metric, const float* queries, std::int64_t n, int dims,
               std::vector<float>& basis, float* projected) const;
  void prepare(const QueryMetric& metric, const float* queries, float* projected, int group,
               int dims, Query& query) const;
  // Scores of all tokens, those that `masks` [P] has: near q.k, or that capped. Part `part` of `out`
  // becomes these, in out's unit, of at least query.octave. Returns the bytes read.
  std::int64_t scan(const Query& query, std::span<const std::uint32_t> masks, int part,
                    float logit_softcap, SketchScores& out) const;

  int page_size() const { return page_size_; }
  std::size_t memory_bytes() const { return codes_.capacity(); }

 private:
  int page_bytes() const { return page_size_ * rank_ * bits_ / 8; }

  int rank_, bits_, page_size_;
  std::vector<float> low_, step_;  // [R]
  // Codes, and behind them what the scan asks for in advance.
  std::vector<std::uint8_t> codes_;  // [P, page_bytes()]
};

}  // namespace icecache

// Sketch: a few quantised coordinates of every key, in page order, for a flat scan with the query.
//
// 16 bytes a key with R = 32 and 4 bits. The scan scores every token: pruning by bounds of pages or
// cells loses needles, single tokens in a cell of strangers (docs/index.md).
// Layout: see simd::SketchScanArgs. Each coordinate is quantised uniformly between the smallest and
// the largest value it had in fit(); later keys are clamped into that range.
#pragma once

#include <cstdint>
#include <vector>

#include "index/query_metric.h"

namespace icecache {

class Sketch {
 public:
  Sketch(int rank, int bits, int page_size) : rank_(rank), bits_(bits), page_size_(page_size) {}

  // Ranges from coordinates [n, R].
  void fit(const float* coordinates, std::int64_t n);
  // Makes room for pages 0..pages-1.
  void resize(int pages);
  void write(int page, int slot, const float* coordinates);
  // Copies the codes of one slot.
  void copy(int to_page, int to_slot, int from_page, int from_slot);

  // scores[g * stride + page * S + slot] ~ q_g . k for all slots, those not in use included (their
  // scores mean nothing). Queries [G, D] scaled. Returns the bytes read.
  std::int64_t scan(const QueryMetric& metric, const float* queries, int group, int pages,
                    float* scores, std::int64_t stride) const;

  std::size_t memory_bytes() const { return codes_.capacity(); }

 private:
  int page_bytes() const { return page_size_ * rank_ * bits_ / 8; }

  int rank_, bits_, page_size_;
  std::vector<float> low_, step_;    // [R]
  std::vector<std::uint8_t> codes_;  // [P, page_bytes()]
};

}  // namespace icecache

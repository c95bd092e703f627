// NodeKeys: what the far-field nodes of an index look like to a query that scores none of their
// tokens: their mean key, and how far keys are from it in the directions of the sketch.
//
// With keys k of a node spread like a normal distribution, the mean of exp(q.k) is
// exp(q.mean + var(q.k) / 2).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "index/sketch.h"
#include "pages/page_table.h"

namespace icecache {

class NodeKeys {
 public:
  // Directions that are looked at, of R.
  static int dims(int rank) { return rank < 32 ? rank : 32; }

  NodeKeys() = default;
  NodeKeys(const PageTable& table, const Sketch& sketch, int rank,
           std::span<const std::vector<int>> pages_of_nodes);

  bool empty() const { return means_.empty(); }
  // Mean keys [D, C], and half the variance of the codes [dims, C].
  std::span<const float> means() const { return means_; }
  std::span<const float> spreads() const { return spreads_; }
  // Sums over a node's tokens of their codes, and of their squares: [dims].
  const float* sum(int node) const {
    return sums_.data() + static_cast<std::size_t>(2 * node) * dims_;
  }
  const float* square(int node) const { return sum(node) + dims_; }
  // Half the variance of `tokens` codes.
  static float spread(float sum, float square, float tokens) {
    const float mean = sum / tokens, variance = square / tokens - mean * mean;
    return variance > 0.0f ? 0.5f * variance : 0.0f;
  }
  std::size_t memory_bytes() const {
    return (means_.capacity() + spreads_.capacity() + sums_.capacity()) * sizeof(float);
  }

 private:
  int dims_ = 0;
  std::vector<float> means_, spreads_;
  std::vector<float> sums_;  // [C, 2, dims]
};

}  // namespace icecache

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
  // [D]
  const float* mean(int node) const {
    return means_.data() + static_cast<std::size_t>(node) * head_dim_;
  }
  // Sums over the node's tokens of their codes, and of their squares: [dims].
  const float* sum(int node) const {
    return sums_.data() + static_cast<std::size_t>(2 * node) * dims_;
  }
  const float* square(int node) const { return sum(node) + dims_; }
  std::size_t memory_bytes() const {
    return (means_.capacity() + sums_.capacity()) * sizeof(float);
  }

 private:
  int head_dim_ = 0, dims_ = 0;
  std::vector<float> means_;  // [C, D]
  std::vector<float> sums_;   // [C, 2, dims]
};

}  // namespace icecache

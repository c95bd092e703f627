// FarField: one summary per node of tokens, so that what is not picked is still seen, only
// coarsely.
//
// A node stands for its unpicked tokens with the mean of their values. What it weighs for a query
// is the sum of its tokens' weights, which the sketch scores tell (Selector::weigh_rest).
//
// Threads: const methods any number, others one caller.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pages/page_table.h"

namespace icecache {

class FarField {
 public:
  FarField(int head_dim, DType dtype)
      : head_dim_(head_dim), dtype_(dtype), row_bytes_(head_dim * size_of(dtype)) {}

  DType dtype() const { return dtype_; }
  int node_count() const { return static_cast<int>(counts_.size()); }
  std::int32_t tokens(int node) const { return counts_[node]; }
  // Mean values of the nodes, picked tokens included: [C, D] in the cache's dtype.
  std::span<const std::byte> means() const { return means_; }
  // Mean value of one node, a row in the cache's dtype.
  const std::byte* mean(int node) const { return means_.data() + node * row_bytes_; }

  // Makes room: add_node() of so many nodes in all needs no memory.
  void reserve(int nodes);
  int add_node();
  // No node will be changed again: gives back what only that needs.
  void finish() { sums_ = std::vector<float>(); }
  // Sums over the tokens in `pages`, replacing what the node held.
  void assign(int node, const PageTable& table, std::span<const int> pages);
  // Adds one token's value [D].
  void add(int node, const float* value);

  std::size_t memory_bytes() const;
  // Throws IntegrityError when a node differs from the sums over its pages by more than rounding.
  void check_node(int node, const PageTable& table, std::span<const int> pages) const;

 private:
  void accumulate(int node, const float* value);
  void make_room(const float* value);
  void publish(int node);

  int head_dim_;
  DType dtype_;
  std::size_t row_bytes_;
  std::vector<float> sums_;           // [C, D] times scale_
  float scale_ = 1.0f;                // a power of two: less where sums would be no floats
  std::vector<std::byte> means_;      // [C, D], what a step reads
  std::vector<std::int32_t> counts_;  // [C]
};

}  // namespace icecache

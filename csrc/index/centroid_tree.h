// CentroidTree: the levels above the far-field nodes, for finding where a new token belongs.
//
// A B-tree-like hierarchy over leaves numbered 0, 1, .. (the far-field nodes): every inner node has
// 2 to 2 * kFanout children and keeps the sum of its members' coordinates, so its centroid is exact
// to rounding. A leaf without members is passed over.
//
// Threads: none of its own.
#pragma once

#include <cstdint>
#include <vector>

namespace icecache {

class CentroidTree {
 public:
  static constexpr int kFanout = 4;

  explicit CentroidTree(int rank) : rank_(rank) {}

  // Adds leaf number leaf_count() beside leaf `near` (-1: anywhere) with the sum of its members'
  // coordinates [R] and their number.
  void add_leaf(int near, const float* sum, std::int32_t count);
  // Replaces what a leaf holds.
  void set(int leaf, const float* sum, std::int32_t count);
  void add(int leaf, const float* coordinates);
  // The leaf whose centroid is nearest along a greedy descent; -1 where all are empty.
  int nearest(const float* coordinates) const;

  int leaf_count() const { return static_cast<int>(leaves_.size()); }
  std::size_t memory_bytes() const;
  // Throws IntegrityError when an inner node differs from the sum over its children.
  void check_integrity() const;

 private:
  struct Node {
    int parent = -1;
    int place = -1;  // among the parent's children
    int leaf = -1;   // leaf number, -1 for an inner node
    std::int32_t count = 0;
    std::vector<double> sum;  // [R]
    std::vector<int> children;
    // Of the children, side by side as the descent reads them; a child without members has NaN.
    std::vector<float> centroids;   // [children, R]
    std::vector<float> half_norms;  // [children] |centroid|^2 / 2
  };
  int add_node(int leaf);
  void attach(int child, int parent);
  void split(int node);
  void recompute(int node);
  // Writes a node's centroid where its parent looks for it.
  void publish(int node);

  int rank_;
  int root_ = -1;
  std::vector<Node> nodes_;
  std::vector<int> leaves_;  // leaf number -> node
};

}  // namespace icecache

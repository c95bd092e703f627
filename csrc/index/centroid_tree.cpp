#include "index/centroid_tree.h"

#include <algorithm>
#include <cmath>

#include "icecache/error.h"
#include "index/bisect.h"
#include "simd/kernels.h"

namespace icecache {

int CentroidTree::add_node(int leaf) {
  nodes_.emplace_back();
  nodes_.back().leaf = leaf;
  nodes_.back().sum.assign(rank_, 0.0);
  return static_cast<int>(nodes_.size()) - 1;
}

void CentroidTree::attach(int child, int parent) {
  Node& target = nodes_[parent];
  nodes_[child].parent = parent;
  nodes_[child].place = static_cast<int>(target.children.size());
  target.children.push_back(child);
  target.centroids.resize(target.children.size() * rank_);
  target.half_norms.resize(target.children.size());
  publish(child);
}

void CentroidTree::publish(int node) {
  const Node& source = nodes_[node];
  if (source.parent < 0) return;
  Node& target = nodes_[source.parent];
  float* centroid = target.centroids.data() + static_cast<std::size_t>(source.place) * rank_;
  const double share = 1.0 / source.count;
  for (int j = 0; j < rank_; ++j) centroid[j] = static_cast<float>(source.sum[j] * share);
  target.half_norms[source.place] =
      source.count > 0 ? 0.5f * simd::kernels().dot(centroid, centroid, rank_) : NAN;
}

void CentroidTree::recompute(int node) {
  Node& target = nodes_[node];
  target.count = 0;
  std::fill(target.sum.begin(), target.sum.end(), 0.0);
  for (int child : target.children) {
    target.count += nodes_[child].count;
    for (int j = 0; j < rank_; ++j) target.sum[j] += nodes_[child].sum[j];
  }
  publish(node);
}

void CentroidTree::add_leaf(int near, const float* sum, std::int32_t count) {
  if (root_ < 0) root_ = add_node(-1);
  int parent = near >= 0 ? nodes_[leaves_[near]].parent : root_;
  while (near < 0 && !nodes_[parent].children.empty() &&
         nodes_[nodes_[parent].children.back()].leaf < 0) {
    parent = nodes_[parent].children.back();
  }
  leaves_.push_back(add_node(leaf_count()));
  attach(leaves_.back(), parent);
  // Before any split: a split goes by the centroids.
  set(leaf_count() - 1, sum, count);
  while (parent >= 0 && static_cast<int>(nodes_[parent].children.size()) > 2 * kFanout) {
    split(parent);
    parent = nodes_[parent].parent;
  }
}

void CentroidTree::split(int node) {
  if (nodes_[node].parent < 0) {
    root_ = add_node(-1);
    attach(node, root_);
    recompute(root_);
  }
  const std::vector<int> children = nodes_[node].children;
  std::vector<float> centroids(children.size() * rank_);
  for (std::size_t c = 0; c < children.size(); ++c) {
    const Node& child = nodes_[children[c]];
    for (int j = 0; j < rank_; ++j) {
      centroids[c * rank_ + j] =
          static_cast<float>(child.sum[j] / std::max<std::int32_t>(1, child.count));
    }
  }
  const std::uint32_t moved =
      upper_half(centroids.data(), rank_, static_cast<int>(children.size()));
  const int other = add_node(-1);
  attach(other, nodes_[node].parent);
  nodes_[node].children.clear();
  nodes_[node].centroids.clear();
  nodes_[node].half_norms.clear();
  for (std::size_t c = 0; c < children.size(); ++c) {
    attach(children[c], moved >> c & 1u ? other : node);
  }
  recompute(node);
  recompute(other);
}

void CentroidTree::set(int leaf, const float* sum, std::int32_t count) {
  Node& target = nodes_[leaves_[leaf]];
  for (int j = 0; j < rank_; ++j) target.sum[j] = sum[j];
  target.count = count;
  publish(leaves_[leaf]);
  for (int node = target.parent; node >= 0; node = nodes_[node].parent) recompute(node);
}

void CentroidTree::add(int leaf, const float* coordinates) {
  for (int node = leaves_[leaf]; node >= 0; node = nodes_[node].parent) {
    ++nodes_[node].count;
    for (int j = 0; j < rank_; ++j) nodes_[node].sum[j] += coordinates[j];
    publish(node);
  }
}

int CentroidTree::nearest(const float* coordinates) const {
  if (root_ < 0 || nodes_[root_].count == 0) return -1;
  const simd::Kernels& kernels = simd::kernels();
  int node = root_;
  while (nodes_[node].leaf < 0) {
    const Node& parent = nodes_[node];
    float best = 0.0f;
    int next = -1;
    for (std::size_t i = 0; i < parent.children.size(); ++i) {
      if (std::isnan(parent.half_norms[i])) continue;
      // Larger where the distance is smaller.
      const float score = kernels.dot(coordinates, parent.centroids.data() + i * rank_, rank_) -
                          parent.half_norms[i];
      if (next < 0 || score > best) {
        best = score;
        next = parent.children[i];
      }
    }
    if (next < 0) return -1;
    node = next;
  }
  return nodes_[node].leaf;
}

std::size_t CentroidTree::memory_bytes() const {
  std::size_t bytes = leaves_.capacity() * sizeof(int);
  for (const Node& node : nodes_) {
    bytes += sizeof(Node) + node.sum.capacity() * sizeof(double) +
             node.children.capacity() * sizeof(int) +
             (node.centroids.capacity() + node.half_norms.capacity()) * sizeof(float);
  }
  return bytes;
}

void CentroidTree::check_integrity() const {
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    const Node& node = nodes_[n];
    if (node.leaf >= 0) continue;
    if (static_cast<int>(node.children.size()) > 2 * kFanout)
      throw IntegrityError(message("tree node ", n, " has ", node.children.size(), " children"));
    std::int32_t count = 0;
    std::vector<double> sum(rank_, 0.0), size(rank_, 1.0);
    for (int child : node.children) {
      if (nodes_[child].parent != static_cast<int>(n))
        throw IntegrityError(message("tree node ", child, " does not know its parent ", n));
      count += nodes_[child].count;
      for (int j = 0; j < rank_; ++j) {
        sum[j] += nodes_[child].sum[j];
        size[j] += std::abs(nodes_[child].sum[j]);
      }
    }
    if (count != node.count)
      throw IntegrityError(message("tree node ", n, " counts ", node.count, ", has ", count));
    for (int j = 0; j < rank_; ++j) {
      if (!(std::abs(sum[j] - node.sum[j]) <= 1e-3 * size[j]))
        throw IntegrityError(message("tree node ", n, " differs from the sum of its children"));
    }
  }
}

}  // namespace icecache

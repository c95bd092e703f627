// FarField: one summary per node of tokens, so that what is not picked is still seen, only
// coarsely.
//
// Every node is expanded around the group's mean query mu (already scaled). With w_i = exp(mu.k_i):
//   log_weight = log sum w_i,   mean = sum w_i k_i / Z,   value = sum w_i v_i / Z,
//   variance = sum w_i (k_i - mean)^2 / Z  (per dimension)
// For a query q the node stands for its tokens with logit
//   log_weight + (q - mu).mean + min(1, ((q - mu)^2 . variance) / 2)   and value `value`:
// the second-order cumulant expansion of log sum exp(q.k_i) in q - mu. Expanding around mu and not
// 0, and clamping the second-order term, are what keep it from diverging (docs/index.md). Stored
// normalised, hence free of overflow for any key norm. Picked tokens are taken out of their node
// exactly, from the central moments; where nearly all of a node's weight was picked, the rest is
// summed anew from its members instead, since the difference would be rounding noise.
//
// Threads: const methods any number, others one caller.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "icecache/attention_state.h"
#include "icecache/semantic_index.h"
#include "index/page_table.h"

namespace icecache {

class FarField {
 public:
  explicit FarField(int head_dim) : head_dim_(head_dim) {}

  // Drops all nodes; mu [D] is the mean query times the softmax scale.
  void reset(std::span<const float> mu);
  std::span<const float> center() const { return mu_; }
  int node_count() const { return static_cast<int>(counts_.size()); }
  int add_node();
  // Sums over the tokens in `pages`, replacing what the node held.
  void assign(int node, const PageTable& table, std::span<const int> pages);
  // Adds one token [D].
  void add(int node, const float* key, const float* value);
  std::int32_t tokens(int node) const { return counts_[node]; }

  // Merges every token that is not in `picks` into `state`. Returns the bytes read.
  struct Query {
    const float* queries = nullptr;  // [G, D], scaled
    int group = 0;
    const PageTable* table = nullptr;
    std::span<const int> node_of_page;                // [page_count]
    std::span<const std::vector<int>> pages_of_node;  // [C]
    std::span<const PagePick> picks;
  };
  std::int64_t merge_into(const Query& query, const AttentionState& state,
                          std::vector<FarNodeInfo>* nodes) const;

  std::size_t memory_bytes() const;
  // Throws IntegrityError when a node differs from the sums over its pages by more than rounding.
  void check_node(int node, const PageTable& table, std::span<const int> pages) const;

 private:
  struct Sums;
  struct Rest;
  // The tokens of `node` that `picks` (all of this node) leave. False where there is none.
  bool open(int node, const Query& query, std::span<const PagePick> picks, Rest& rest) const;
  float logit(const Rest& rest, const float* dq) const;
  void accumulate(Sums& sums, const PageTable& table, int page, std::uint32_t slots) const;
  void store(int node, const Sums& sums);

  int head_dim_;
  std::vector<float> mu_;                       // [D]
  std::vector<float> log_weight_;               // [C]
  std::vector<float> mean_, variance_, value_;  // [C, D]
  std::vector<std::int32_t> counts_;            // [C]
};

}  // namespace icecache

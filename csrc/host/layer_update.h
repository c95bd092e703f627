// LayerUpdate: what a call leaves to the background for one layer: its last queries, which shape
// the metric, and the tokens that are due in the index.
//
// Threads: run() of different heads from any threads; all else after those have ended.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "host/head_cache.h"

namespace icecache {

class LayerUpdate {
 public:
  // `queries` [Hq, T, D] are copied as far as they count. `packs`: as HeadCache::update_index() takes
  // it. The heads and their statistics [Hkv] outlive this object.
  LayerUpdate(std::span<HeadCache> heads, std::span<HeadStats> stats, const TensorView& queries,
              bool packs);

  // Of one head. Where memory runs out, the head is unchanged, and run_failed() makes up for it.
  void run(int head);
  // Runs once more what had no memory. What has none again is left to the next call that brings
  // queries: until then, the tokens are attended from the tail.
  void run_failed();
  int heads() const { return static_cast<int>(heads_.size()); }

 private:
  std::span<HeadCache> heads_;
  std::span<HeadStats> stats_;
  bool packs_;
  int head_dim_;
  std::int64_t all_;            // rows of a head
  std::int64_t counting_;       // of them those that count
  std::vector<float> queries_;  // [Hkv, counting_, D]
  // [Hkv] each written by the thread that runs the head
  std::vector<char> has_observed_, has_failed_;
};

// Rows [tokens, G, D] fp32 of one KV head's group of queries, times `scale`.
void load_queries(const TensorView& queries, int kv_head, int group, std::int64_t first,
                  std::int64_t tokens, float scale, float* out);

// Rows [rows.size(), D] fp32 of the same queries, unscaled: those with the given numbers, counted
// from token `first` on as [tokens, G].
void load_rows(const TensorView& queries, int kv_head, int group, std::int64_t first,
               std::span<const std::int64_t> rows, float* out);

}  // namespace icecache

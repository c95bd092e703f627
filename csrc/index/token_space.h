// TokenSpace: where tokens lie, so that those that lie close are alike.
//
// R coordinates of the key in the query metric, which sketches keep as well, and beside them V of
// the value. A far-field node stands for tokens with what each of them weighs and with the mean of
// their values; what it gets wrong is the sum of weight x (value - mean). That is small where
// weights are alike, which is what keys tell, and where values are, which they do not. Measured on
// SmolLM2-135M (LongBench prompts of 5k tokens, 220 of them picked): the far field's error is a
// quarter smaller at the median, and falls no more with more value coordinates than these
// (docs/index.md).
#pragma once

#include <cstdint>
#include <vector>

#include "icecache/config.h"
#include "index/query_metric.h"

namespace icecache {

struct TokenSpace {
  QueryMetric metric;             // of the first R coordinates
  int value_rank = 0;             // V; 0: keys alone
  std::vector<float> from_value;  // [D, V]

  // V of an index: 0 where nothing stands for tokens together.
  static int value_rank_of(const Config& config, int head_dim);

  int width() const { return metric.rank + value_rank; }
  // keys [N, D] fp32, values [N, D] of `dtype`; R = rank, V = value_rank <= D.
  static TokenSpace fit(const float* keys, const void* values, DType dtype, std::int64_t count,
                        int head_dim, const QueryMoments& queries, int rank, int value_rank);
  // Coordinates [n, width()] of keys [n, D] fp32 and values [n, D] of `dtype`. Values that are no
  // numbers lie at 0. One token needs no memory.
  void coordinates(const float* keys, const void* values, DType dtype, std::int64_t n,
                   float* out) const;
};

}  // namespace icecache

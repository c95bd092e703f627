// QueryMetric: the basis in which keys are compared, and the few directions that a sketch keeps.
//
// Two keys are as far apart as recent queries tell them apart: |k - k'|^2 = E[(q.(k - k'))^2], that
// is the Euclidean distance of k M with M = E[q q^T]^(1/2). The sketch keeps the R directions in
// which the keys vary most in that metric, so q.k is well approximated for queries like the recent
// ones. Any finite keys and queries do: where they are far from 1 the unit of coordinates is
// another power of two, and keys beyond all those fitted to are placed at the edge.
#pragma once

#include <cstdint>
#include <vector>

#include "index/query_moments.h"

namespace icecache {

struct QueryMetric {
  int head_dim = 0;               // D
  int rank = 0;                   // R
  std::vector<float> mean;        // [D] of the keys
  std::vector<float> from_key;    // [D, R]: coordinates y = (k - mean) from_key
  std::vector<float> from_query;  // [D, R]: q.k ~ q.mean + (q from_query).y
  double spread = 0.0;            // mean |y|^2 of the keys it was fitted to

  // keys [N, D] fp32. Without queries the metric is the Euclidean one.
  static QueryMetric fit(const float* keys, std::int64_t count, int head_dim,
                         const QueryMoments& queries, int rank);
  // Coordinates [n, R] of keys [n, D]: finite, at most kFarthest from 0. Needs no memory.
  void coordinates(const float* keys, std::int64_t n, float* out) const;

 private:
  void far_coordinates(const float* key, float* out) const;
};

}  // namespace icecache

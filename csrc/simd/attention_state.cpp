#include "simd/attention_state.h"

#include <cmath>
#include <cstddef>

namespace icecache {

void merge(const AttentionState& into, const AttentionState& other) {
  const int dim = into.head_dim;
  for (int g = 0; g < into.group; ++g) {
    // An empty state may carry anything in `out`: it is never read.
    if (other.sum[g] == 0.0f) continue;
    float* a = into.out + static_cast<std::ptrdiff_t>(g) * dim;
    const float* b = other.out + static_cast<std::ptrdiff_t>(g) * dim;
    if (into.sum[g] == 0.0f) {
      for (int d = 0; d < dim; ++d) a[d] = b[d];
      into.max[g] = other.max[g];
      into.sum[g] = other.sum[g];
      continue;
    }
    const float max = into.max[g] > other.max[g] ? into.max[g] : other.max[g];
    const float keep = std::exp(into.max[g] - max);
    const float take = std::exp(other.max[g] - max);
    for (int d = 0; d < dim; ++d) a[d] = keep * a[d] + take * b[d];
    into.sum[g] = keep * into.sum[g] + take * other.sum[g];
    into.max[g] = max;
  }
}

void finish(const AttentionState& state, float* out) {
  for (int g = 0; g < state.group; ++g) {
    const float* from = state.out + static_cast<std::ptrdiff_t>(g) * state.head_dim;
    float* to = out + static_cast<std::ptrdiff_t>(g) * state.head_dim;
    const float sum = state.sum[g];
    for (int d = 0; d < state.head_dim; ++d) to[d] = sum == 0.0f ? 0.0f : from[d] / sum;
  }
}

}  // namespace icecache

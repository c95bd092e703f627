#include <algorithm>
#include <cmath>

#include "icecache/semantic_index.h"
#include "simd/kernels.h"

namespace icecache {

void QueryMoments::reset(int head_dim) {
  second.assign(static_cast<std::size_t>(head_dim) * head_dim, 0.0f);
  first.assign(head_dim, 0.0f);
  count = 0.0;
}

void QueryMoments::observe(const float* queries, int n, int head_dim) {
  if (static_cast<int>(first.size()) != head_dim) reset(head_dim);
  const float keep = 1.0f - std::min(1.0f, static_cast<float>(n) / kHorizon);
  for (float& x : second) x *= keep;
  for (float& x : first) x *= keep;
  count = count * keep + n;
  for (int r = 0; r < n; ++r) {
    const float* q = queries + static_cast<std::size_t>(r) * head_dim;
    for (int i = 0; i < head_dim; ++i) {
      simd::kernels().axpy(q[i], q, second.data() + static_cast<std::size_t>(i) * head_dim,
                           head_dim);
    }
    simd::kernels().axpy(1.0f, q, first.data(), head_dim);
  }
}

}  // namespace icecache

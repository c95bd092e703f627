#include <algorithm>

#include "icecache/semantic_index.h"
#include "simd/kernels.h"

namespace icecache {

std::int64_t QueryMoments::needed(std::int64_t n) const {
  const std::int64_t end = seen_ + n;
  return end - std::max(seen_, (end / kBlock - 1) * kBlock);
}

void QueryMoments::observe(const float* queries, std::int64_t n, int head_dim,
                           std::int64_t skipped) {
  const std::size_t size = static_cast<std::size_t>(head_dim) * head_dim;
  current_.resize(size, 0.0f);
  if (skipped > 0) {  // to the beginning of a block
    seen_ += skipped;
    has_before_ = false;
    current_.assign(size, 0.0f);
  }
  for (std::int64_t r = 0; r < n; ++r) {
    const float* q = queries + r * head_dim;
    for (int i = 0; i < head_dim; ++i) {
      simd::kernels().axpy(q[i], q, current_.data() + static_cast<std::size_t>(i) * head_dim,
                           head_dim);
    }
    if (++seen_ % kBlock != 0) continue;
    before_.swap(current_);
    has_before_ = true;
    current_.assign(size, 0.0f);
  }
}

std::int64_t QueryMoments::count() const {
  return seen_ % kBlock + (has_before_ ? kBlock : 0);
}

std::vector<double> QueryMoments::second() const {
  std::vector<double> sum(current_.begin(), current_.end());
  if (count() == 0) sum.clear();
  for (std::size_t i = 0; has_before_ && i < sum.size(); ++i) sum[i] += before_[i];
  return sum;
}

}  // namespace icecache

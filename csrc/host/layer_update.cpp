#include "host/layer_update.h"

#include <algorithm>
#include <new>

#include "simd/kernels.h"

namespace icecache {

void load_queries(const TensorView& queries, int kv_head, int group, std::int64_t first,
                  std::int64_t tokens, float scale, float* out) {
  const std::int64_t d = queries.dim;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (int g = 0; g < group; ++g) {
      float* row = out + (t * group + g) * d;
      simd::kernels().to_float(queries.at(kv_head * group + g, first + t), queries.dtype, row, d);
      for (std::int64_t i = 0; i < d; ++i) row[i] *= scale;
    }
  }
}

void load_rows(const TensorView& queries, int kv_head, int group, std::int64_t first,
               std::span<const std::int64_t> rows, float* out) {
  for (const std::int64_t row : rows) {
    simd::kernels().to_float(queries.at(kv_head * group + row % group, first + row / group),
                             queries.dtype, out, queries.dim);
    out += queries.dim;
  }
}

LayerUpdate::LayerUpdate(std::span<HeadCache> heads, std::span<HeadStats> stats,
                         const TensorView& queries, bool packs)
    : heads_(heads),
      stats_(stats),
      packs_(packs),
      head_dim_(static_cast<int>(queries.dim)),
      has_observed_(heads.size(), 0),
      has_failed_(heads.size(), 0) {
  const auto count = static_cast<std::int64_t>(heads.size());
  const std::int64_t group = queries.heads / count;
  all_ = queries.tokens * group;
  const std::vector<std::int64_t> rows = heads.front().counting_queries(all_);
  counting_ = static_cast<std::int64_t>(rows.size());
  queries_.resize(static_cast<std::size_t>(count * counting_) * head_dim_);
  for (std::int64_t h = 0; h < count; ++h) {
    load_rows(queries, static_cast<int>(h), static_cast<int>(group), 0, rows,
              queries_.data() + h * counting_ * head_dim_);
  }
}

void LayerUpdate::run(int head) {
  HeadCache& cache = heads_[head];
  try {
    if (has_observed_[head] == 0) {
      cache.set_moments(cache.observed(queries_.data() + head * counting_ * head_dim_, all_));
      has_observed_[head] = 1;
    }
    cache.update_index(packs_, stats_[head]);
  } catch (const std::bad_alloc&) {
    has_failed_[head] = 1;
  }
}

void LayerUpdate::run_failed() {
  for (int head = 0; head < heads(); ++head) {
    if (has_failed_[head] != 0) run(head);
  }
}

}  // namespace icecache

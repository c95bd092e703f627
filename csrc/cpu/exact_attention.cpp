#include "cpu/exact_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd/kernels.h"

namespace icecache {
namespace {

constexpr double kLargestEstimated = 0x1p30;  // logit
// Up to these, float arithmetic has room for products and for sums over all tokens, and what it
// loses of subnormal elements moves no logit. Products of weights and values that are all smaller
// than the last may be subnormal; values that are all subnormal themselves count as zeros.
constexpr double kLargestLogit = 0x1p100;
constexpr float kLargestQuery = 0x1p60f, kLargestRow = 0x1p96f, kSmallestValue = 0x1p-100f;
constexpr float kSmallestNormal = std::numeric_limits<float>::min();

double largest_logit(float query, const Magnitudes& held, int head_dim) {
  return static_cast<double>(query) * held.key * head_dim;
}

float largest_element(const float* x, std::ptrdiff_t n) {
  return simd::kernels().largest(x, DType::kFloat32, static_cast<std::size_t>(n));
}

}  // namespace

bool needs_double(float query, const Magnitudes& held, int head_dim) {
  return query > kLargestQuery || largest_logit(query, held, head_dim) > kLargestLogit ||
         std::max(held.key, held.value) > kLargestRow ||
         (held.value >= kSmallestNormal && held.value < kSmallestValue);
}

bool can_estimate(float query, const Magnitudes& held, int head_dim) {
  return !needs_double(query, held, head_dim) &&
         largest_logit(query, held, head_dim) <= kLargestEstimated;
}

ExactAttention::ExactAttention(const QueryBlock& queries, int head_dim, const Magnitudes& held,
                               float* out)
    : block_(queries), head_dim_(head_dim), out_(out) {
  const int rows = queries.tokens * queries.group, d = head_dim;
  float largest = largest_element(queries.queries, static_cast<std::ptrdiff_t>(rows) * d);
  if (std::isinf(largest)) {
    set_aside_bad_rows();
    largest = largest_element(block_.queries, static_cast<std::ptrdiff_t>(rows) * d);
  }
  if (needs_double(largest, held, d)) {
    wide_.emplace(rows, d);
    return;
  }
  flush_.emplace();
  max_.resize(static_cast<std::size_t>(rows));
  sum_.resize(static_cast<std::size_t>(rows));
  state().clear();
}

void ExactAttention::set_aside_bad_rows() {
  const std::ptrdiff_t rows = static_cast<std::ptrdiff_t>(block_.tokens) * block_.group;
  const int d = head_dim_;
  finite_.assign(block_.queries, block_.queries + rows * d);
  for (int r = 0; r < rows; ++r) {
    float* row = finite_.data() + static_cast<std::ptrdiff_t>(r) * d;
    if (std::isfinite(largest_element(row, d))) continue;
    bad_.push_back(r);
    std::fill_n(row, d, 0.0f);
  }
  block_.queries = finite_.data();
}

const QueryBlock& ExactAttention::turned_for(const RowFormat& format) {
  if (format_ && format_->is(format)) return turned_;
  const std::ptrdiff_t rows = static_cast<std::ptrdiff_t>(block_.tokens) * block_.group;
  queries_.resize(static_cast<std::size_t>(rows * head_dim_));
  bias_.resize(static_cast<std::size_t>(rows));
  format.turn(block_.queries, rows, queries_.data(), bias_.data());
  format_ = format;
  turned_ = block_;
  turned_.queries = queries_.data();
  turned_.bias = bias_.data();
  return turned_;
}

void ExactAttention::attend(std::span<const PageSlots> pages, const PageLayout& layout,
                            std::int64_t seen) {
  if (wide_) {
    block_.seen = seen;
    return wide_->attend(pages, block_, layout);
  }
  QueryBlock block = layout.format == nullptr ? block_ : turned_for(*layout.format);
  block.seen = seen;
  attend_pages(pages, block, layout, state());
}

void ExactAttention::add(std::span<const float> logits, std::span<const float> values) {
  const simd::Kernels& kernels = simd::kernels();
  const auto n = static_cast<std::int64_t>(values.size()) / head_dim_;
  const auto rows = static_cast<std::int64_t>(max_.size());
  weights_.assign(logits.size(), 0.0f);
  added_.resize(static_cast<std::size_t>(rows * (head_dim_ + 2)));
  float *const max = added_.data(), *const sum = max + rows, *const out = sum + rows;
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* const row = logits.data() + r * n;
    kernels.softmax_stats(row, n, max + r, sum + r);
    if (sum[r] > 0.0f) kernels.add_exp(row, max[r], weights_.data() + r * n, n);
  }
  kernels.matmul(weights_.data(), values.data(), out, rows, n, head_dim_);
  merge(state(), {out, max, sum, static_cast<int>(rows), head_dim_});
}

void ExactAttention::lse(float* out) {
  const AttentionState so_far = state();
  for (int r = 0; r < so_far.group; ++r) out[r] = so_far.lse(r);
}

void ExactAttention::finish(float* lse) {
  const int rows = block_.tokens * block_.group, d = head_dim_;
  if (wide_) {
    for (int r = 0; r < rows && lse != nullptr; ++r) lse[r] = static_cast<float>(wide_->lse(r));
    wide_->finish(out_);
  } else {
    if (lse != nullptr) this->lse(lse);
    icecache::finish(state(), out_);
  }
  for (const int r : bad_) {
    std::fill_n(out_ + static_cast<std::ptrdiff_t>(r) * d, d, std::nanf(""));
    if (lse != nullptr) lse[r] = std::nanf("");
  }
}

}  // namespace icecache

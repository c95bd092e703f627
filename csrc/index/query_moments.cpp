#include <algorithm>
#include <cmath>
#include <utility>

#include "icecache/semantic_index.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Of a row's largest element times 2^-exponent: sums of kBlock squares stay far below the largest
// float, and ordinary rows have the exponent 0.
constexpr float kLargestElement = 0x1p50f;
constexpr std::size_t kRowsTogether = 16;  // that room is made for

std::size_t triangle(int d) {
  return static_cast<std::size_t>(d) * (d + 1) / 2;
}

}  // namespace

QueryMoments::QueryMoments(const QueryMoments& other)
    : dtype_(other.dtype_),
      seen_(other.seen_),
      has_before_(other.has_before_),
      is_shared_(true),
      blocks_(other.blocks_) {
  other.is_shared_ = true;
}

QueryMoments& QueryMoments::operator=(QueryMoments other) noexcept {
  dtype_ = other.dtype_;
  seen_ = other.seen_;
  has_before_ = other.has_before_;
  is_shared_ = other.is_shared_;
  blocks_ = std::move(other.blocks_);
  return *this;
}

// A flag and not the number of owners: that may be another thread's to change.
QueryMoments::Blocks& QueryMoments::own() {
  if (blocks_ == nullptr) {
    blocks_ = std::make_shared<Blocks>();
  } else if (is_shared_) {
    blocks_ = std::make_shared<Blocks>(*blocks_);
  }
  is_shared_ = false;
  return *blocks_;
}

void QueryMoments::Sum::add(const float* query, int head_dim) {
  float scaled[kMaxHeadDim];
  const float largest = simd::kernels().largest(query, DType::kFloat32, head_dim);
  if (std::isinf(largest)) return;
  upper.resize(triangle(head_dim), 0.0f);
  if (std::ldexp(largest, -exponent) > kLargestElement) {
    const int higher = std::ilogb(largest);
    for (float& x : upper) x = std::ldexp(x, 2 * (exponent - higher));
    exponent = higher;
  }
  if (exponent != 0) {
    for (int i = 0; i < head_dim; ++i) scaled[i] = std::ldexp(query[i], -exponent);
    query = scaled;
  }
  float* row = upper.data();
  for (int i = 0; i < head_dim; row += head_dim - i, ++i) {
    simd::kernels().axpy(query[i], query + i, row, head_dim - i);
  }
}

void QueryMoments::Blocks::add_rows(DType dtype) {
  float query[kMaxHeadDim];
  const std::size_t row_bytes = head_dim * size_of(dtype);
  for (std::size_t at = 0; at < rows.size(); at += row_bytes) {
    simd::kernels().to_float(rows.data() + at, dtype, query, head_dim);
    current.add(query, head_dim);
  }
  rows = std::vector<std::byte>();
}

std::int64_t QueryMoments::needed(std::int64_t n) const {
  const std::int64_t end = seen_ + n;
  return end - std::max(seen_, (end / kBlock - 1) * kBlock);
}

void QueryMoments::observe(const float* queries, std::int64_t n, int head_dim,
                           std::int64_t skipped) {
  if (n + skipped == 0) return;
  Blocks& blocks = own();
  blocks.head_dim = head_dim;
  if (skipped > 0) {  // to the beginning of a block
    seen_ += skipped;
    has_before_ = false;
    blocks.before = blocks.current = {};
    blocks.rows = std::vector<std::byte>();
  }
  const std::size_t row_bytes = head_dim * size_of(dtype_);
  for (std::int64_t r = 0; r < n; ++r) {
    const float* q = queries + r * head_dim;
    if (blocks.current.upper.empty()) {
      const std::size_t at = blocks.rows.size();
      if (at == blocks.rows.capacity()) blocks.rows.reserve(at + kRowsTogether * row_bytes);
      blocks.rows.resize(at + row_bytes);
      simd::kernels().from_float(q, blocks.rows.data() + at, dtype_, head_dim);
      if (blocks.rows.size() >= triangle(head_dim) * sizeof(float)) blocks.add_rows(dtype_);
    } else {
      blocks.current.add(q, head_dim);
    }
    if (++seen_ % kBlock != 0) continue;
    blocks.add_rows(dtype_);
    blocks.before = std::exchange(blocks.current, {});
    has_before_ = true;
  }
}

std::int64_t QueryMoments::count() const {
  return seen_ % kBlock + (has_before_ ? kBlock : 0);
}

std::vector<double> QueryMoments::second() const {
  if (count() == 0) return {};
  Blocks blocks = *blocks_;
  blocks.add_rows(dtype_);
  const int d = blocks.head_dim;
  std::vector<double> sum(static_cast<std::size_t>(d) * d, 0.0);
  for (const Sum* part : {&blocks.current, &blocks.before}) {
    const double scale = std::ldexp(1.0, 2 * part->exponent);
    const float* x = part->upper.data();
    for (int i = 0; i < d && !part->upper.empty(); ++i) {
      for (int j = i; j < d; ++j) sum[i * d + j] += scale * *x++;
    }
  }
  for (int i = 0; i < d; ++i) {
    for (int j = 0; j < i; ++j) sum[i * d + j] = sum[j * d + i];
  }
  return sum;
}

std::size_t QueryMoments::memory_bytes() const {
  if (blocks_ == nullptr) return 0;
  const std::size_t bytes =
      sizeof(Blocks) + blocks_->rows.capacity() +
      (blocks_->before.upper.capacity() + blocks_->current.upper.capacity()) * sizeof(float);
  return bytes / static_cast<std::size_t>(blocks_.use_count());
}

}  // namespace icecache

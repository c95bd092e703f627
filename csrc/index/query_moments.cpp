#include <algorithm>
#include <cmath>
#include <utility>

#include "index/query_moments.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Of a row's largest element times 2^-exponent: sums of kBlock squares stay far below the largest
// float, and ordinary rows have the exponent 0.
constexpr float kLargestElement = 0x1p50f;
constexpr std::size_t kRowsReserved = 16;  // that room is made for
constexpr double kManyRows = 64;           // so that the sum of all counts as half

std::size_t triangle(int d) {
  return static_cast<std::size_t>(d) * (d + 1) / 2;
}

}  // namespace

QueryMoments::QueryMoments(const QueryMoments& other)
    : dtype_(other.dtype_),
      seen_(other.seen_),
      all_(other.all_),
      has_before_(other.has_before_),
      is_shared_(true),
      blocks_(other.blocks_) {
  other.is_shared_ = true;
}

QueryMoments& QueryMoments::operator=(QueryMoments other) noexcept {
  dtype_ = other.dtype_;
  seen_ = other.seen_;
  all_ = other.all_;
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

std::int64_t QueryMoments::recent_from(std::int64_t end) const {
  return std::max(seen_, (end / kBlock - 1) * kBlock);
}

std::vector<std::int64_t> QueryMoments::counting(std::int64_t n) const {
  std::vector<std::int64_t> rows;
  const std::int64_t recent = recent_from(seen_ + n);
  for (std::int64_t row = seen_; row < seen_ + n; ++row) {
    if (row >= recent || (row >= kBlock && row % kEvery == 0)) rows.push_back(row - seen_);
  }
  return rows;
}

void QueryMoments::add_recent(const float* query) {
  Blocks& blocks = *blocks_;
  if (blocks.current.upper.empty()) {
    const std::size_t row_bytes = blocks.head_dim * size_of(dtype_), at = blocks.rows.size();
    if (at == blocks.rows.capacity()) blocks.rows.reserve(at + kRowsReserved * row_bytes);
    blocks.rows.resize(at + row_bytes);
    simd::kernels().from_float(query, blocks.rows.data() + at, dtype_, blocks.head_dim);
    if (blocks.rows.size() >= triangle(blocks.head_dim) * sizeof(float)) blocks.add_rows(dtype_);
  } else {
    blocks.current.add(query, blocks.head_dim);
  }
}

void QueryMoments::observe_counting(const float* queries, std::int64_t n, int head_dim) {
  if (n == 0) return;
  Blocks& blocks = own();
  blocks.head_dim = head_dim;
  const std::int64_t end = seen_ + n, recent = recent_from(end);
  const auto add_to_all = [&](std::int64_t row) {
    if (row < kBlock || row % kEvery != 0) return false;
    blocks.all.add(queries, head_dim);
    ++all_;
    return true;
  };
  if (seen_ < recent) {
    has_before_ = false;
    blocks.before = blocks.current = {};
    blocks.rows = std::vector<std::byte>();
  }
  for (; seen_ < recent; ++seen_) {
    if (add_to_all(seen_)) queries += head_dim;
  }
  for (; seen_ < end; queries += head_dim) {
    add_to_all(seen_);
    add_recent(queries);
    if (++seen_ % kBlock != 0) continue;
    blocks.add_rows(dtype_);
    blocks.before = std::exchange(blocks.current, {});
    has_before_ = true;
  }
}

void QueryMoments::observe(const float* queries, std::int64_t n, int head_dim) {
  const std::vector<std::int64_t> rows = counting(n);
  if (static_cast<std::int64_t>(rows.size()) == n) return observe_counting(queries, n, head_dim);
  std::vector<float> counted(rows.size() * head_dim);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(queries + rows[i] * head_dim, head_dim, counted.data() + i * head_dim);
  }
  observe_counting(counted.data(), n, head_dim);
}

void QueryMoments::Sum::add_to(std::vector<double>& x, double weight, int head_dim) const {
  const double scale = std::ldexp(weight, 2 * exponent);
  const float* from = upper.data();
  for (int i = 0; i < head_dim && !upper.empty(); ++i) {
    for (int j = i; j < head_dim; ++j) x[i * head_dim + j] += scale * *from++;
  }
}

std::vector<double> QueryMoments::second() const {
  if (empty()) return {};
  Blocks blocks = *blocks_;
  blocks.add_rows(dtype_);
  const int d = blocks.head_dim;
  const double of_all = 0.5 * std::min(1.0, static_cast<double>(all_) / kManyRows);
  const auto recent = static_cast<double>(seen_ % kBlock + (has_before_ ? kBlock : 0));
  std::vector<double> mean(static_cast<std::size_t>(d) * d, 0.0);
  blocks.before.add_to(mean, (1.0 - of_all) / recent, d);
  blocks.current.add_to(mean, (1.0 - of_all) / recent, d);
  if (all_ > 0) blocks.all.add_to(mean, of_all / static_cast<double>(all_), d);
  for (int i = 0; i < d; ++i) {
    for (int j = 0; j < i; ++j) mean[i * d + j] = mean[j * d + i];
  }
  return mean;
}

std::size_t QueryMoments::memory_bytes() const {
  if (blocks_ == nullptr) return 0;
  const std::size_t bytes = sizeof(Blocks) + blocks_->rows.capacity() +
                            (blocks_->before.upper.capacity() + blocks_->current.upper.capacity() +
                             blocks_->all.upper.capacity()) *
                                sizeof(float);
  return bytes / static_cast<std::size_t>(blocks_.use_count());
}

}  // namespace icecache

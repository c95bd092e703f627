#include "cpu/wide_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace icecache {
namespace {

constexpr double kNoLogit = -std::numeric_limits<double>::infinity();

}  // namespace

WideAttention::WideAttention(int rows, int head_dim)
    : head_dim_(head_dim),
      max_(static_cast<std::size_t>(rows), kNoLogit),
      sum_(static_cast<std::size_t>(rows), 0.0),
      out_(static_cast<std::size_t>(rows) * head_dim, 0.0) {}

void WideAttention::add(int row, double logit, const double* value) {
  double* out = out_.data() + static_cast<std::size_t>(row) * head_dim_;
  if (logit > max_[row]) {
    const double factor = std::exp(max_[row] - logit);
    sum_[row] *= factor;
    for (int i = 0; i < head_dim_; ++i) out[i] *= factor;
    max_[row] = logit;
  }
  const double weight = std::exp(logit - max_[row]);
  if (weight == 0.0) return;
  sum_[row] += weight;
  for (int i = 0; i < head_dim_; ++i) out[i] += weight * value[i];
}

void WideAttention::attend(std::span<const PageSlots> pages, const QueryBlock& block,
                           const PageLayout& layout) {
  const int d = layout.head_dim, rows = block.tokens * block.group;
  const std::size_t row_bytes = row_bytes_of(layout.dtype, d);
  const RowFormat numbers(layout.dtype, d);
  const RowFormat& format = layout.format == nullptr ? numbers : *layout.format;
  float stored[kMaxHeadDim];
  double key[kMaxHeadDim], value[kMaxHeadDim];
  std::int64_t token = 0;
  for (const PageSlots& page : pages) {
    for (std::uint32_t slots = page.slots; slots != 0; slots &= slots - 1, ++token) {
      const std::byte* row = page.page + std::countr_zero(slots) * row_bytes;
      format.decode_key(row, stored);
      std::copy_n(stored, d, key);
      format.decode_value(row + layout.page_size * row_bytes, stored);
      std::copy_n(stored, d, value);
      for (int r = 0; r < rows; ++r) {
        if (token >= block.seen + r / block.group) continue;
        const float* query = block.queries + static_cast<std::ptrdiff_t>(r) * d;
        double parts[4] = {};
        for (int i = 0; i < d; i += 4) {
          for (int j = 0; j < 4; ++j) parts[j] += query[i + j] * key[i + j];
        }
        double logit = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        if (block.softcap > 0.0f) logit = block.softcap * std::tanh(logit / block.softcap);
        add(r, logit, value);
      }
    }
  }
}

void WideAttention::finish(float* out) const {
  for (std::size_t i = 0; i < out_.size(); ++i) {
    const double sum = sum_[i / static_cast<std::size_t>(head_dim_)];
    out[i] = sum > 0.0 ? static_cast<float>(out_[i] / sum) : 0.0f;
  }
}

double WideAttention::lse(int row) const {
  return sum_[row] > 0.0 ? max_[row] + std::log(sum_[row]) : kNoLogit;
}

}  // namespace icecache

#include "index/far_field.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "icecache/error.h"
#include "index/magnitude.h"
#include "simd/kernels.h"

namespace icecache {

void FarField::reserve(int nodes) {
  const auto grown = [](auto& rows, std::size_t size) {
    if (rows.capacity() < size) rows.reserve(std::max(size, 2 * rows.size()));
  };
  const auto count = static_cast<std::size_t>(nodes);
  grown(sums_, count * static_cast<std::size_t>(head_dim_));
  grown(means_, count * row_bytes_);
  grown(counts_, count);
}

int FarField::add_node() {
  sums_.resize(sums_.size() + head_dim_, 0.0f);
  means_.resize(means_.size() + row_bytes_);
  counts_.push_back(0);
  return node_count() - 1;
}

// Sums of 2^24 tokens stay below the largest float.
void FarField::make_room(const float* value) {
  constexpr float kLargest = 0x1p100f, kScale = 0x1p-32f;
  if (scale_ < 1.0f || largest_of(value, head_dim_) <= kLargest) return;
  scale_ = kScale;
  for (float& sum : sums_) sum *= kScale;
}

void FarField::accumulate(int node, const float* value) {
  make_room(value);
  simd::kernels().axpy(scale_, value, sums_.data() + static_cast<std::size_t>(node) * head_dim_,
                       head_dim_);
  ++counts_[node];
}

void FarField::publish(int node) {
  float mean[kMaxHeadDim];
  std::fill_n(mean, head_dim_, 0.0f);
  const float share = 1.0f / static_cast<float>(std::max(1, counts_[node]));
  simd::kernels().axpy(share, sums_.data() + static_cast<std::size_t>(node) * head_dim_, mean,
                       head_dim_);
  if (scale_ < 1.0f) {
    // Rounding may leave the range of float, or of the type.
    const float most = largest_number(dtype_);
    for (int i = 0; i < head_dim_; ++i) {
      mean[i] = static_cast<float>(
          std::clamp<double>(static_cast<double>(mean[i]) / scale_, -most, most));
    }
  }
  simd::kernels().from_float(mean, means_.data() + node * row_bytes_, dtype_, head_dim_);
}

void FarField::assign(int node, const PageTable& table, std::span<const int> pages) {
  float value[kMaxHeadDim];
  std::fill_n(sums_.data() + static_cast<std::size_t>(node) * head_dim_, head_dim_, 0.0f);
  counts_[node] = 0;
  for (const int page : pages) {
    for (std::uint32_t slots = table.mask(page); slots != 0; slots &= slots - 1) {
      table.value(page, std::countr_zero(slots), value);
      accumulate(node, value);
    }
  }
  publish(node);
}

void FarField::add(int node, const float* value) {
  accumulate(node, value);
  publish(node);
}

std::size_t FarField::memory_bytes() const {
  return sums_.capacity() * sizeof(float) + means_.capacity() +
         counts_.capacity() * sizeof(std::int32_t);
}

void FarField::check_node(int node, const PageTable& table, std::span<const int> pages) const {
  std::vector<double> sum(head_dim_, 0.0), size(head_dim_, 0.0);
  float value[kMaxHeadDim];
  std::int32_t count = 0;
  for (const int page : pages) {
    for (std::uint32_t slots = table.mask(page); slots != 0; slots &= slots - 1) {
      table.value(page, std::countr_zero(slots), value);
      for (int i = 0; i < head_dim_; ++i) {
        sum[i] += value[i];
        size[i] += std::abs(value[i]);
      }
      ++count;
    }
  }
  if (count != counts_[node])
    throw IntegrityError(message("node ", node, " counts ", counts_[node], " tokens, has ", count));
  float mean[kMaxHeadDim];
  simd::kernels().to_float(means_.data() + node * row_bytes_, dtype_, mean, head_dim_);
  const double rounding = dtype_ == DType::kFloat32 ? 1e-6 : 1.0 / 256.0;
  const double spacing = dtype_ == DType::kFloat16 ? 0x1p-24 : 0.0;  // of the smallest numbers
  for (int i = 0; i < head_dim_; ++i) {
    const double exact = count > 0 ? sum[i] / count : 0.0;
    if (!(std::abs(mean[i] - exact) <=
          rounding * (1e-6 + std::abs(exact)) + 1e-5 * size[i] + spacing))
      throw IntegrityError(message("node ", node, " has a mean that is not its sum's"));
    if (sums_.empty()) continue;
    const double held = sums_[static_cast<std::size_t>(node) * head_dim_ + i] / double{scale_};
    if (!(std::abs(held - sum[i]) <= 1e-5 * (1e-6 + size[i])))
      throw IntegrityError(message("node ", node, " differs from its members in dimension ", i));
  }
}

}  // namespace icecache

#include "simd/row_format.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "simd/kernels.h"
#include "simd/key_steps.h"

namespace icecache {
namespace {

constexpr double kMostCode = 127.0;

// Codes and scale of a row of n numbers: number(i) is the i-th.
template <typename Number>
void write_row(int n, const Number& number, const KeyRounding* rounding, std::byte* row) {
  double x[kMaxHeadDim], largest = 0.0;
  for (int i = 0; i < n; ++i) {
    x[i] = number(i);
    largest = std::max(largest, std::abs(x[i]));
  }
  const auto scale = static_cast<float>(largest / kMostCode);
  const double share = scale > 0.0f ? 1.0 / static_cast<double>(scale) : 0.0;
  for (int i = 0; i < n; ++i) x[i] = std::clamp(x[i] * share, -kMostCode, kMostCode);
  auto* codes = reinterpret_cast<std::int8_t*>(row);
  if (rounding != nullptr) {
    rounding->round({x, static_cast<std::size_t>(n)}, kMostCode, codes);
  } else {
    for (int i = 0; i < n; ++i) codes[i] = nearest_code(x[i]);
  }
  std::memcpy(row + n, &scale, sizeof scale);
}

float scale_of(const std::byte* row, int n) {
  float scale;
  std::memcpy(&scale, row + n, sizeof scale);
  return scale;
}

}  // namespace

RowFormat RowFormat::eight_bits(DType model, int head_dim, const std::byte* keys, std::int64_t n) {
  const int d = head_dim;
  const std::size_t row_bytes = row_bytes_of(model, d);
  std::vector<float> key(static_cast<std::size_t>(d));
  std::vector<double> mean(key.size(), 0.0), square(key.size(), 0.0);
  const auto for_each_key = [&](const auto& body) {
    for (std::int64_t t = 0; t < n; ++t) {
      simd::kernels().to_float(keys + static_cast<std::size_t>(t) * row_bytes, model, key.data(),
                               key.size());
      for (int i = 0; i < d; ++i) body(i);
    }
  };
  const double share = 1.0 / static_cast<double>(n);
  for_each_key([&](int i) { mean[i] += share * key[i]; });
  for_each_key([&](int i) { square[i] += share * (key[i] - mean[i]) * (key[i] - mean[i]); });
  for (double& x : square) x = std::sqrt(x);
  KeySteps steps(square);
  const std::int64_t stride = std::max<std::int64_t>(1, n / KeySteps::kSample);
  for (std::int64_t t = 0; t < n; t += stride) {
    simd::kernels().to_float(keys + static_cast<std::size_t>(t) * row_bytes, model, key.data(),
                             key.size());
    steps.add(key, mean);
  }
  auto codes = std::make_shared<Codes>();
  codes->step = steps.fit();
  const double most = largest_number(DType::kFloat32);
  for (const double x : mean)
    codes->centre.push_back(static_cast<float>(std::clamp(x, -most, most)));
  RowFormat format(model, head_dim);
  format.codes_ = std::move(codes);
  return format;
}

std::size_t RowFormat::memory_bytes() const {
  return codes_ ? (codes_->centre.capacity() + codes_->step.capacity()) * sizeof(float) : 0;
}

KeyRounding RowFormat::rounding_for(std::span<const double> second) const {
  return {second, codes_->step};
}

void RowFormat::encode_key(const std::byte* key, std::byte* row,
                           const KeyRounding* rounding) const {
  if (!codes_) {
    std::memcpy(row, key, row_bytes());
    return;
  }
  float given[kMaxHeadDim];
  simd::kernels().to_float(key, model_, given, static_cast<std::size_t>(head_dim_));
  const auto number = [&](int i) {
    return (static_cast<double>(given[i]) - codes_->centre[i]) / codes_->step[i];
  };
  write_row(head_dim_, number, rounding, row);
}

void RowFormat::encode_value(const std::byte* value, std::byte* row) const {
  if (!codes_) {
    std::memcpy(row, value, row_bytes());
    return;
  }
  float given[kMaxHeadDim];
  simd::kernels().to_float(value, model_, given, static_cast<std::size_t>(head_dim_));
  write_row(
      head_dim_, [&](int i) { return static_cast<double>(given[i]); }, nullptr, row);
}

void RowFormat::decode_key(const std::byte* row, float* key) const {
  if (!codes_) {
    simd::kernels().to_float(row, model_, key, static_cast<std::size_t>(head_dim_));
    return;
  }
  const double scale = scale_of(row, head_dim_), most = largest_number(model_);
  for (int i = 0; i < head_dim_; ++i) {
    const double x = scale * codes_->step[i] * std::bit_cast<std::int8_t>(row[i]);
    key[i] = static_cast<float>(std::clamp(codes_->centre[i] + x, -most, most));
  }
}

void RowFormat::decode_value(const std::byte* row, float* value) const {
  simd::kernels().to_float(row, dtype(), value, static_cast<std::size_t>(head_dim_));
  if (!codes_) return;
  const float most = largest_number(model_);  // which rounding may have left
  for (int i = 0; i < head_dim_; ++i) value[i] = std::clamp(value[i], -most, most);
}

void RowFormat::restore_key(const std::byte* row, std::byte* key) const {
  float x[kMaxHeadDim];
  if (!codes_) {
    std::memcpy(key, row, row_bytes());
    return;
  }
  decode_key(row, x);
  simd::kernels().from_float(x, key, model_, static_cast<std::size_t>(head_dim_));
}

void RowFormat::restore_value(const std::byte* row, std::byte* value) const {
  float x[kMaxHeadDim];
  if (!codes_) {
    std::memcpy(value, row, row_bytes());
    return;
  }
  decode_value(row, x);
  simd::kernels().from_float(x, value, model_, static_cast<std::size_t>(head_dim_));
}

void RowFormat::turn(const float* queries, std::int64_t n, float* turned, float* bias) const {
  for (std::int64_t q = 0; q < n; ++q, queries += head_dim_, turned += head_dim_) {
    double sum = 0.0;
    for (int i = 0; i < head_dim_; ++i) {
      sum += static_cast<double>(queries[i]) * codes_->centre[i];
      turned[i] = queries[i] * codes_->step[i];
    }
    bias[q] = static_cast<float>(sum);
  }
}

}  // namespace icecache

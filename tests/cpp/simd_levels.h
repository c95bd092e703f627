// Test parameter: every SIMD level by name; a level that the CPU or the build lacks is skipped.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "simd/kernels.h"

namespace icecache::simd {

class SimdLevel : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::string name = GetParam();
    const Kernels* level = name == "scalar"   ? &scalar_kernels()
                           : name == "avx2"   ? avx2_kernels()
                           : name == "avx512" ? avx512_kernels()
                                              : avx512vnni_kernels();
    if (level == nullptr) GTEST_SKIP() << "SIMD level " << name << " is not available here";
    kernels_ = level;
  }
  const Kernels& k() const { return *kernels_; }

  std::vector<float> normal(std::size_t n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> x(n);
    for (float& value : x) value = distribution(random_);
    return x;
  }

  std::mt19937 random_{7};

 private:
  const Kernels* kernels_ = nullptr;
};

// Names of all levels, for INSTANTIATE_TEST_SUITE_P.
inline auto all_levels() {
  return ::testing::Values("scalar", "avx2", "avx512", "avx512vnni");
}

// Ranks of tests that meet all; under a sanitizer those that differ in what is left of vectors of 4
// to 16 numbers, and the largest.
inline std::vector<int> all_ranks() {
#ifdef __SANITIZE_ADDRESS__
  return {8, 16, 24, 64, 104, 128, kMaxSketchRank};
#else
  std::vector<int> ranks;
  for (int rank = 8; rank <= kMaxSketchRank; rank += 8) ranks.push_back(rank);
  return ranks;
#endif
}

// Head dims: the same, and some of those above.
inline std::vector<int> all_dims() {
  std::vector<int> dims = all_ranks();
  for (const int dim : {264, 328, kMaxHeadDim}) dims.push_back(dim);
  return dims;
}

// Query heads per KV head: all of the usual ones, and some of those above.
inline std::vector<int> all_groups() {
  std::vector<int> groups;
  for (int group = 1; group <= 17; ++group) groups.push_back(group);
  for (const int group : {32, 33, 71, kMaxGroup}) groups.push_back(group);
  return groups;
}

inline std::string level_name(const ::testing::TestParamInfo<const char*>& info) {
  return info.param;
}

// `values` in `dtype`, as bytes; decode() gives back what those bytes mean.
inline std::vector<std::byte> encode(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  scalar_kernels().from_float(values.data(), bytes.data(), dtype, values.size());
  return bytes;
}

inline std::vector<float> decode(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / size_of(dtype));
  scalar_kernels().to_float(bytes.data(), dtype, values.data(), values.size());
  return values;
}

// The same of rows [n, dim], also of eight bits: codes and a scale for each row.
inline std::vector<std::byte> encode_rows(const std::vector<float>& values, int dim, DType dtype) {
  if (dtype != DType::kInt8) return encode(values, dtype);
  std::vector<std::byte> bytes;
  for (std::size_t first = 0; first < values.size(); first += dim) {
    const float* row = values.data() + first;
    float scale = 0.0f;  // NaN where an element is
    for (int i = 0; i < dim; ++i) scale = std::max(std::abs(row[i]) / 127.0f, scale);
    for (int i = 0; i < dim; ++i) {
      const float code = scale > 0.0f ? std::nearbyint(row[i] / scale) : 0.0f;
      bytes.push_back(static_cast<std::byte>(static_cast<std::int8_t>(code)));
    }
    const auto* of_scale = reinterpret_cast<const std::byte*>(&scale);
    bytes.insert(bytes.end(), of_scale, of_scale + sizeof scale);
  }
  return bytes;
}

inline std::vector<float> decode_rows(const std::vector<std::byte>& bytes, int dim, DType dtype) {
  if (dtype != DType::kInt8) return decode(bytes, dtype);
  std::vector<float> values;
  const std::size_t row_bytes = row_bytes_of(dtype, dim);
  for (std::size_t at = 0; at < bytes.size(); at += row_bytes) {
    float scale;
    std::memcpy(&scale, bytes.data() + at + dim, sizeof scale);
    for (int i = 0; i < dim; ++i) {
      values.push_back(scale * static_cast<float>(static_cast<std::int8_t>(bytes[at + i])));
    }
  }
  return values;
}

// Of rows in pages.
constexpr DType kRowTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt8};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace icecache::simd

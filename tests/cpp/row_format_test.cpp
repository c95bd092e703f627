// Rows of eight bits: how near they are to what they stand for, whatever keys and values are.
#include "simd/row_format.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "normal_numbers.h"
#include "simd/kernels.h"

namespace icecache::row_format_test {
namespace {

using testing::normal;

constexpr int kDim = 64, kCount = 300;

struct Rows {
  std::vector<float> numbers;  // [n, D], as the type holds them
  std::vector<std::byte> bytes;
  DType dtype;

  Rows(std::vector<float> given, DType type) : numbers(std::move(given)), dtype(type) {
    bytes.resize(numbers.size() * size_of(dtype));
    simd::kernels().from_float(numbers.data(), bytes.data(), dtype, numbers.size());
    simd::kernels().to_float(bytes.data(), dtype, numbers.data(), numbers.size());
  }
  const std::byte* row(int i) const {
    return bytes.data() + static_cast<std::size_t>(i) * kDim * size_of(dtype);
  }
  const float* number(int i) const { return numbers.data() + static_cast<std::size_t>(i) * kDim; }
  RowFormat fit() const { return RowFormat::eight_bits(dtype, kDim, bytes.data(), kCount); }
};

// Root mean square of the errors of q.k over queries and keys.
double logit_error(const Rows& keys, const std::vector<float>& queries) {
  const RowFormat format = keys.fit();
  const int count = static_cast<int>(queries.size()) / kDim;
  std::vector<float> turned(queries.size()), bias(count);
  format.turn(queries.data(), count, turned.data(), bias.data());
  std::vector<std::byte> row(format.row_bytes());
  double squares = 0.0;
  for (int i = 0; i < kCount; ++i) {
    format.encode_key(keys.row(i), row.data());
    const void* rows[] = {row.data()};
    std::vector<float> logits(count);
    simd::kernels().row_logits({rows, format.dtype(), 1, count, kDim, bias.data()}, turned.data(),
                               logits.data(), 1);
    for (int q = 0; q < count; ++q) {
      double exact = 0.0;
      for (int d = 0; d < kDim; ++d) exact += double{queries[q * kDim + d]} * keys.number(i)[d];
      squares += (logits[q] - exact) * (logits[q] - exact) / (kCount * count);
    }
  }
  return std::sqrt(squares);
}

TEST(RowFormatTest, RowsTakeAByteANumberAndAScale) {
  const Rows keys(normal(kCount * kDim, 1), DType::kBFloat16);
  EXPECT_EQ(keys.fit().row_bytes(), kDim + sizeof(float));
  EXPECT_EQ(keys.fit().dtype(), DType::kInt8);
  EXPECT_TRUE(keys.fit().has_codes());
  const RowFormat plain(DType::kBFloat16, kDim);
  EXPECT_EQ(plain.row_bytes(), 2u * kDim);
  EXPECT_FALSE(plain.has_codes());
  EXPECT_TRUE(plain.is(RowFormat(DType::kBFloat16, kDim)));
  EXPECT_FALSE(keys.fit().is(keys.fit())) << "fitted twice, it is another";
}

TEST(RowFormatTest, NumbersComeBackToHalfAStep) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Rows keys(normal(kCount * kDim, 1), dtype), values(normal(kCount * kDim, 2), dtype);
    const RowFormat format = keys.fit();
    std::vector<std::byte> row(format.row_bytes());
    std::vector<float> got(kDim);
    for (int i = 0; i < kCount; ++i) {
      format.encode_value(values.row(i), row.data());
      float scale;
      std::memcpy(&scale, row.data() + kDim, sizeof scale);
      format.decode_value(row.data(), got.data());
      for (int d = 0; d < kDim; ++d) {
        ASSERT_NEAR(got[d], values.number(i)[d], 0.501f * scale) << name_of(dtype);
      }
      format.encode_key(keys.row(i), row.data());
      format.decode_key(row.data(), got.data());
      for (int d = 0; d < kDim; ++d) ASSERT_NEAR(got[d], keys.number(i)[d], 0.03f);
    }
  }
}

TEST(RowFormatTest, AModelsOwnRowsAreCopied) {
  const Rows keys(normal(kCount * kDim, 1), DType::kFloat16);
  const RowFormat plain(DType::kFloat16, kDim);
  std::vector<std::byte> row(plain.row_bytes()), back(row.size());
  plain.encode_key(keys.row(7), row.data());
  plain.restore_key(row.data(), back.data());
  EXPECT_TRUE(std::equal(back.begin(), back.end(), keys.row(7)));
  std::vector<float> got(kDim);
  plain.decode_key(row.data(), got.data());
  EXPECT_TRUE(std::equal(got.begin(), got.end(), keys.number(7)));
}

// A bias of norm 600 in a few elements, as Qwen 2's keys have, costs the others nothing, and little
// where it turns with the position.
TEST(RowFormatTest, ALargeBiasOfAFewElementsCostsTheOthersLittle) {
  std::vector<float> queries = normal(8 * kDim, 3);
  const std::vector<float> numbers = normal(kCount * kDim, 1);
  const double without = logit_error({numbers, DType::kFloat32}, queries);
  std::vector<float> biased = numbers, turning = numbers;
  for (int i = 0; i < kCount; ++i) {
    for (int d = 0; d < 4; ++d) {
      biased[i * kDim + d] += 300.0f;
      turning[i * kDim + d] += 300.0f * std::cos(0.02f * static_cast<float>(i));
    }
  }
  EXPECT_LT(logit_error({biased, DType::kFloat32}, queries), 1.05 * without);
  for (int q = 0; q < 8; ++q) std::fill_n(queries.begin() + q * kDim, 4, 0.0f);
  EXPECT_LT(logit_error({turning, DType::kFloat32}, queries), 2.0 * without);
}

TEST(RowFormatTest, AnyFiniteNumbersAreTaken) {
  const float most = std::numeric_limits<float>::max();
  for (const float size : {0.0f, 1e-38f, 1e30f, most}) {
    for (const bool equal : {true, false}) {
      std::vector<float> numbers(kCount * kDim);
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        numbers[i] = equal || i % 3 == 0 ? size : -size;
      }
      const Rows keys(numbers, DType::kFloat32);
      const RowFormat format = keys.fit();
      std::vector<std::byte> row(format.row_bytes());
      std::vector<float> got(kDim);
      for (const bool of_value : {false, true}) {
        of_value ? format.encode_value(keys.row(5), row.data())
                 : format.encode_key(keys.row(5), row.data());
        of_value ? format.decode_value(row.data(), got.data())
                 : format.decode_key(row.data(), got.data());
        for (int d = 0; d < kDim; ++d) {
          ASSERT_TRUE(std::isfinite(got[d]));
          ASSERT_NEAR(got[d], keys.number(5)[d], 0.03f * size);
        }
      }
    }
  }
  // Fitted to small numbers, then given large ones.
  const RowFormat small = Rows(normal(kCount * kDim, 4, 1e-20f), DType::kFloat32).fit();
  const Rows large(std::vector<float>(kCount * kDim, most), DType::kFloat32);
  std::vector<std::byte> row(small.row_bytes());
  std::vector<float> got(kDim);
  small.encode_key(large.row(0), row.data());
  small.decode_key(row.data(), got.data());
  for (const float x : got) EXPECT_GT(x, 0.9f * most);
}

}  // namespace
}  // namespace icecache::row_format_test

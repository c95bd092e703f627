// Steps and rounding of keys in eight bits: what they gain in the logits of queries, and what they
// may cost in others.
#include "simd/key_rounding.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "normal_numbers.h"
#include "simd/key_steps.h"
#include "simd/row_format.h"

namespace icecache::key_rounding_test {
namespace {

using testing::normal;

constexpr int kDim = 64, kCount = 300;

// Queries [n, D] that differ in `rank` directions.
std::vector<float> alike(int n, int rank, unsigned seed) {
  const std::vector<float> directions = normal(rank * kDim, 77), parts = normal(n * rank, seed);
  std::vector<float> queries(n * kDim, 0.0f);
  for (int i = 0; i < n; ++i) {
    for (int r = 0; r < rank; ++r) {
      for (int d = 0; d < kDim; ++d)
        queries[i * kDim + d] += parts[i * rank + r] * directions[r * kDim + d];
    }
  }
  return queries;
}

std::vector<double> second_moments(const std::vector<float>& queries) {
  std::vector<double> second(kDim * kDim, 0.0);
  for (std::size_t q = 0; q < queries.size(); q += kDim) {
    for (int i = 0; i < kDim; ++i) {
      for (int j = 0; j < kDim; ++j) second[i * kDim + j] += queries[q + i] * queries[q + j];
    }
  }
  return second;
}

// Mean square of q.k's error over keys [kCount, D] and queries.
double error(const std::vector<float>& keys, const std::vector<float>& queries,
             const RowFormat& format, const KeyRounding* rounding) {
  std::vector<std::byte> row(format.row_bytes());
  std::vector<float> got(kDim);
  double squares = 0.0;
  for (int t = 0; t < kCount; ++t) {
    const float* key = keys.data() + t * kDim;
    format.encode_key(reinterpret_cast<const std::byte*>(key), row.data(), rounding);
    format.decode_key(row.data(), got.data());
    for (std::size_t q = 0; q < queries.size(); q += kDim) {
      double off = 0.0;
      for (int i = 0; i < kDim; ++i) off += double{queries[q + i]} * (got[i] - key[i]);
      squares += off * off;
    }
  }
  return squares / (kCount * static_cast<double>(queries.size() / kDim));
}

RowFormat fitted(const std::vector<float>& keys) {
  return RowFormat::eight_bits(DType::kFloat32, kDim,
                               reinterpret_cast<const std::byte*>(keys.data()), kCount);
}

TEST(KeyRoundingTest, ErrorsCancelInLogitsOfQueriesLikeThoseSeen) {
  const std::vector<float> keys = normal(kCount * kDim, 1);
  const RowFormat format = fitted(keys);
  const KeyRounding rounding = format.rounding_for(second_moments(alike(200, 4, 2)));
  const std::vector<float> like = alike(50, 4, 3);
  EXPECT_LT(error(keys, like, format, &rounding), 0.2 * error(keys, like, format, nullptr));
}

TEST(KeyRoundingTest, OtherQueriesLoseLittle) {
  const std::vector<float> keys = normal(kCount * kDim, 1), others = normal(100 * kDim, 4);
  const RowFormat format = fitted(keys);
  for (const int rank : {1, 4, 64}) {
    const KeyRounding rounding = format.rounding_for(second_moments(alike(200, rank, 2)));
    EXPECT_LT(error(keys, others, format, &rounding), 2.0 * error(keys, others, format, nullptr));
  }
}

TEST(KeyRoundingTest, WithoutQueriesElementsAreRoundedOneByOne) {
  const std::vector<float> keys = normal(kCount * kDim, 1);
  const RowFormat format = fitted(keys);
  std::vector<std::byte> plain(format.row_bytes()), rounded(plain.size());
  const auto* key = reinterpret_cast<const std::byte*>(keys.data());
  format.encode_key(key, plain.data());
  std::vector<double> second(kDim * kDim, 0.0);
  for (const double variance : {0.0, 1e-300, 3.0, 1e300, HUGE_VAL}) {  // equal in all directions
    for (int i = 0; i < kDim; ++i) second[i * kDim + i] = variance;
    const KeyRounding rounding = format.rounding_for(second);
    format.encode_key(key, rounded.data(), &rounding);
    EXPECT_TRUE(rounded == plain) << variance;
  }
}

// Four elements that vary evenly over a range, as a bias does that turns slowly with the position.
TEST(KeyStepsTest, AnElementThatVariesMuchIsRoundedAsFineAsPaysForAll) {
  std::vector<float> keys = normal(kCount * kDim, 1);
  const double without = error(keys, normal(50 * kDim, 3), fitted(keys), nullptr);
  for (int t = 0; t < kCount; ++t) {
    for (int d = 0; d < 4; ++d) keys[t * kDim + d] += 0.08f * static_cast<float>(t);
  }
  const std::vector<float> queries = normal(50 * kDim, 3);
  std::vector<double> mean(kDim, 0.0), spread(kDim, 0.0);
  for (int t = 0; t < kCount; ++t) {
    for (int d = 0; d < kDim; ++d) mean[d] += keys[t * kDim + d] / kCount;
  }
  for (int t = 0; t < kCount; ++t) {
    for (int d = 0; d < kDim; ++d) spread[d] += std::pow(keys[t * kDim + d] - mean[d], 2) / kCount;
  }
  for (double& x : spread) x = std::sqrt(x);
  KeySteps steps(spread);
  const std::vector<float> own = steps.fit();  // by each one's spread
  for (int t = 0; t < kCount; ++t) steps.add({keys.data() + t * kDim, kDim}, mean);
  const std::vector<float> best = steps.fit();
  const auto cost = [&](const std::vector<float>& step) {
    double largest = 0.0, squares = 0.0;
    for (int t = 0; t < kCount; ++t) {
      double most = 0.0;
      for (int d = 0; d < kDim; ++d)
        most = std::max(most, std::abs(keys[t * kDim + d] - mean[d]) / step[d]);
      largest += most * most;
    }
    for (const float s : step) squares += double{s} * s;
    return largest * squares;
  };
  EXPECT_LT(cost(best), 0.92 * cost(own));
  EXPECT_LT(error(keys, queries, fitted(keys), nullptr), 6.0 * without);
}

}  // namespace
}  // namespace icecache::key_rounding_test

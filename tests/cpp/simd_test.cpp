// Conversions, vectors and matrices, sums of exponentials, and the choice of the level.
#include "simd/kernels.h"

#include <algorithm>
#include <bit>
#include <cstdlib>

#include "icecache/error.h"
#include "simd_levels.h"

namespace icecache::simd::simd_test {
namespace {

const std::size_t kLengths[] = {0, 1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 100, 257, 1025};

class SimdTest : public SimdLevel {};
INSTANTIATE_TEST_SUITE_P(Levels, SimdTest, all_levels(), level_name);

// The value of a half, from its definition.
double half_value(std::uint16_t h, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (h >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double mantissa = h & ((1 << mantissa_bits) - 1);
  const double sign = (h & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0.0 ? kNan : sign * kInf;
  const double scale = std::ldexp(1.0, -mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(mantissa * scale, 1 - bias);
  return sign * std::ldexp(1.0 + mantissa * scale, exponent - bias);
}

TEST_P(SimdTest, EveryHalfConvertsExactly) {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  std::vector<float> values(all.size());
  std::vector<std::uint16_t> back(all.size());
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const bool bf16 = dtype == DType::kBFloat16;
    k().to_float(all.data(), dtype, values.data(), all.size());
    k().from_float(values.data(), back.data(), dtype, all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double expected = half_value(all[i], bf16 ? 8 : 5, bf16 ? 7 : 10);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(values[i])) << name_of(dtype) << " " << i;
        ASSERT_TRUE(std::isnan(half_value(back[i], bf16 ? 8 : 5, bf16 ? 7 : 10))) << i;
      } else {
        ASSERT_EQ(values[i], expected) << name_of(dtype) << " " << i;
        ASSERT_EQ(std::signbit(values[i]), (i & 0x8000) != 0) << name_of(dtype) << " " << i;
        ASSERT_EQ(back[i], all[i]) << name_of(dtype);
      }
    }
  }
}

// Between two neighbouring halves: below the middle down, above it up, the middle to the even one.
TEST_P(SimdTest, RoundsToNearestEven) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const std::uint16_t last = dtype == DType::kBFloat16 ? 0x7f7f : 0x7bff;  // largest finite
    std::vector<float> inputs;
    std::vector<std::uint16_t> expected;
    for (std::uint32_t h = 0; h < last; ++h) {
      const std::uint16_t pair[2] = {static_cast<std::uint16_t>(h),
                                     static_cast<std::uint16_t>(h + 1)};
      float ends[2];
      k().to_float(pair, dtype, ends, 2);
      const float middle = static_cast<float>((static_cast<double>(ends[0]) + ends[1]) / 2);
      inputs.insert(inputs.end(), {std::nextafterf(middle, 0.0f), middle,
                                   std::nextafterf(middle, kInf), -middle});
      const std::uint16_t even = pair[h % 2];
      expected.insert(expected.end(),
                      {pair[0], even, pair[1], static_cast<std::uint16_t>(even | 0x8000)});
    }
    std::vector<std::uint16_t> halves(inputs.size());
    k().from_float(inputs.data(), halves.data(), dtype, inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      ASSERT_EQ(halves[i], expected[i]) << name_of(dtype) << " of " << inputs[i];
    }
  }
}

// Every number of whole vectors and floats behind them, and rows that are left out.
TEST_P(SimdTest, RowsAlongADirection) {
  constexpr int kRows = 37;
  for (int dim = 1; dim <= 272; dim += dim < 110 ? 1 : 27) {
    const std::vector<float> x = normal(kRows * dim), direction = normal(dim);
    std::vector<std::int32_t> rows(kRows);
    for (int i = 0; i < kRows; ++i) rows[i] = i * 7 % kRows;
    for (const int stride : {1, 3}) {
      const SomeRowsArgs args{x.data(), rows.data(), kRows, stride, dim};
      const int count = (kRows + stride - 1) / stride;
      std::vector<float> along(count + 1, 77.0f), next(dim + 1, 77.0f);
      k().project_rows(args, direction.data(), along.data());
      const float total = k().power_step(args, direction.data(), 0.25f, next.data());
      std::vector<double> expected(dim, 77.0);
      double sum = 0.0;
      for (int i = 0; i < count; ++i) {
        const float* row = x.data() + rows[i * stride] * dim;
        double p = 0.0;
        for (int j = 0; j < dim; ++j) p += double{row[j]} * direction[j];
        ASSERT_NEAR(along[i], p, 1e-4) << dim;
        for (int j = 0; j < dim; ++j) expected[j] += (p - 0.25) * row[j];
        sum += p - 0.25;
      }
      for (int j = 0; j < dim; ++j) ASSERT_NEAR(next[j], expected[j], 1e-3) << dim;
      ASSERT_NEAR(total, sum, 1e-3) << dim;
      ASSERT_EQ(along[count], 77.0f) << "wrote past the end";
      ASSERT_EQ(next[dim], 77.0f) << "wrote past the end";
    }
  }
}

TEST_P(SimdTest, FromFloatAtTheEndsOfTheRange) {
  const std::vector<float> inputs = {65504.0f, 65519.99f, 65520.0f, 3.4e38f,  kInf,   -kInf,  kNan,
                                     1e-8f,    -1e-8f,    -0.0f,    2.98e-8f, 1e-40f, -1e-45f};
  const std::vector<std::uint16_t> f16 = {0x7bff, 0x7bff, 0x7c00, 0x7c00, 0x7c00, 0xfc00, 0x7e00,
                                          0x0000, 0x8000, 0x8000, 0x0000, 0x0000, 0x8000};
  // Once within a vector, once in its remainder.
  for (const std::size_t copies : {1u, 3u}) {
    for (std::size_t c = 0; c < copies; ++c) {
      std::vector<std::uint16_t> halves(inputs.size());
      k().from_float(inputs.data(), halves.data(), DType::kFloat16, inputs.size());
      for (std::size_t i = 0; i < inputs.size(); ++i) {
        EXPECT_EQ(halves[i] & (std::isnan(inputs[i]) ? 0x7e00 : 0xffff), f16[i]) << inputs[i];
      }
    }
  }
  // NaN whose payload sits only in the bits that are cut off stays NaN.
  const std::vector<float> sneaky(19, std::bit_cast<float>(0x7f800001u));
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const float x : decode(encode(sneaky, dtype), dtype)) EXPECT_TRUE(std::isnan(x));
    std::vector<std::uint16_t> halves(sneaky.size());
    std::vector<float> back(sneaky.size());
    k().from_float(sneaky.data(), halves.data(), dtype, sneaky.size());
    k().to_float(halves.data(), dtype, back.data(), sneaky.size());
    for (const float x : back) EXPECT_TRUE(std::isnan(x)) << name_of(dtype);
  }
}

TEST_P(SimdTest, AllFiniteFindsOneBadElementAnywhere) {
  for (const DType dtype : kDTypes) {
    for (const std::size_t n : kLengths) {
      std::vector<float> values(n, dtype == DType::kFloat16 ? 65504.0f : 3e38f);
      EXPECT_TRUE(k().all_finite(encode(values, dtype).data(), dtype, n)) << n;
      for (std::size_t i = 0; i < n; i += std::max<std::size_t>(1, n / 9)) {
        for (const float bad : {kInf, -kInf, kNan}) {
          std::vector<float> spoilt = values;
          spoilt[i] = bad;
          EXPECT_FALSE(k().all_finite(encode(spoilt, dtype).data(), dtype, n))
              << name_of(dtype) << " n " << n << " at " << i;
        }
      }
    }
  }
}

TEST_P(SimdTest, LargestFindsTheLargestMagnitudeAnywhere) {
  for (const DType dtype : kDTypes) {
    for (const std::size_t n : kLengths) {
      std::vector<float> values(n, -0.25f);
      EXPECT_EQ(k().largest(encode(values, dtype).data(), dtype, n), n > 0 ? 0.25f : 0.0f);
      for (std::size_t i = 0; i < n; i += std::max<std::size_t>(1, n / 9)) {
        for (const float other : {-65504.0f, 0.5f, 1024.0f, kInf, -kInf, kNan}) {
          std::vector<float> one = values;
          one[i] = other;
          const std::vector<std::byte> stored = encode(one, dtype);
          const float kept = decode(stored, dtype)[i];
          const float expected = std::isnan(kept) ? kInf : std::abs(kept);
          EXPECT_EQ(k().largest(stored.data(), dtype, n), expected)
              << name_of(dtype) << " n " << n << " at " << i;
        }
      }
    }
    // A subnormal of the type is no zero.
    const std::vector<float> tiny(3, dtype == DType::kFloat16 ? 0x1p-24f : 0x1p-133f);
    EXPECT_EQ(k().largest(encode(tiny, dtype).data(), dtype, 3), tiny[0]) << name_of(dtype);
  }
}

TEST_P(SimdTest, DotAndAxpy) {
  for (const std::size_t n : kLengths) {
    const std::vector<float> a = normal(n), b = normal(n);
    double expected = 0.0, size = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
      expected += static_cast<double>(a[i]) * b[i];
      size += std::abs(static_cast<double>(a[i]) * b[i]);
    }
    EXPECT_NEAR(k().dot(a.data(), b.data(), n), expected, 1e-6 * size) << n;

    std::vector<float> y = b;
    y.push_back(42.0f);
    k().axpy(0.75f, a.data(), y.data(), n);
    for (std::size_t i = 0; i < n; ++i) EXPECT_NEAR(y[i], 0.75 * a[i] + b[i], 2e-6) << i;
    EXPECT_EQ(y[n], 42.0f) << "wrote past the end";
  }
}

TEST_P(SimdTest, Matmul) {
  const std::int64_t shapes[][3] = {{0, 3, 4},   {3, 0, 5},     {4, 4, 0},    {1, 1, 1},
                                    {5, 8, 7},   {6, 64, 16},   {13, 33, 65}, {200, 64, 32},
                                    {7, 300, 9}, {31, 600, 80}, {400, 5, 130}};
  for (const auto& [n, depth, m] : shapes) {
    const std::vector<float> a = normal(static_cast<std::size_t>(n * depth));
    const std::vector<float> b = normal(static_cast<std::size_t>(depth * m));
    std::vector<float> c(static_cast<std::size_t>(n * m) + 1, kNan);
    k().matmul(a.data(), b.data(), c.data(), n, depth, m);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < m; ++j) {
        double expected = 0.0, size = 0.0;
        for (std::int64_t d = 0; d < depth; ++d) {
          const double term = static_cast<double>(a[i * depth + d]) * b[d * m + j];
          expected += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(c[i * m + j], expected, 1e-6 * size) << n << "x" << depth << "x" << m;
      }
    }
    EXPECT_TRUE(std::isnan(c.back())) << "wrote past the end";
  }
}

TEST_P(SimdTest, ExpIsAccurateOverItsRange) {
  std::vector<float> x;
  for (float v = -87.3f; v < 88.7f; v += 0.00731f) x.push_back(v);
  for (const float v : {0.0f, -0.0f, 1e-30f, -1e-30f, 88.72f, -87.33f, 0.34657f, -0.34658f}) {
    x.push_back(v);
  }
  std::vector<float> y(x.size(), 0.0f);
  k().add_exp(x.data(), 0.0f, y.data(), static_cast<std::int64_t>(x.size()));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp(static_cast<double>(x[i]));
    ASSERT_LE(std::abs(y[i] - expected), 3e-7 * expected) << x[i];
  }
}

TEST_P(SimdTest, ExpOutsideItsRange) {
  // Copies put every case into a whole vector and into the remainder.
  const std::vector<float> cases = {-kInf, -1e30f, -104.0f, 89.0f, kInf, kNan, 0.0f};
  const std::vector<float> expected = {0.0f, 0.0f, 0.0f, kInf, kInf, kNan, 1.0f};
  for (std::size_t c = 0; c < cases.size(); ++c) {
    const std::vector<float> x(37, cases[c]);
    std::vector<float> y(37, 0.0f);
    k().add_exp(x.data(), 0.0f, y.data(), 37);
    for (const float value : y) {
      if (std::isnan(expected[c])) {
        EXPECT_TRUE(std::isnan(value));
      } else {
        EXPECT_EQ(value, expected[c]) << cases[c];
      }
    }
  }
}

TEST_P(SimdTest, AddExpLeavesOutMinusInfinityWhateverTheShift) {
  const std::vector<float> x(21, -kInf);
  for (const float shift : {0.0f, 1e30f, -1e30f, -kInf}) {
    std::vector<float> y(21, 2.5f);
    k().add_exp(x.data(), shift, y.data(), 21);
    for (const float value : y) EXPECT_EQ(value, 2.5f) << shift;
  }
}

TEST_P(SimdTest, SoftmaxStats) {
  for (const std::size_t n : kLengths) {
    std::vector<float> x = normal(n, 8.0f);
    for (std::size_t i = 0; i < n; i += 5) x[i] = -kInf;
    double best = -kInf, expected = 0.0;
    for (const float v : x) best = std::max(best, static_cast<double>(v));
    for (const float v : x) expected += best == -kInf ? 0.0 : std::exp(v - best);
    float max = kNan, sum = kNan;
    k().softmax_stats(x.data(), static_cast<std::int64_t>(n), &max, &sum);
    EXPECT_EQ(max, best) << n;
    EXPECT_NEAR(sum, expected, 1e-6 * expected) << n;
  }
}

TEST_P(SimdTest, SoftCap) {
  for (const float cap : {1e-3f, 1.0f, 30.0f, 1e4f}) {
    for (const std::size_t n : kLengths) {
      std::vector<float> x = normal(n, 2.0f * cap);
      if (n > 2) x[1] = x[2] = 0.7f * cap;
      for (std::size_t i = 0; i < n; i += 3) x[i] *= 1e-4f;
      std::vector<float> y = x;
      k().soft_cap(y.data(), static_cast<std::int64_t>(n), cap);
      for (std::size_t i = 0; i < n; ++i) {
        const double exact = cap * std::tanh(double{x[i]} / cap);
        ASSERT_NEAR(y[i], exact, 3e-7 * cap) << x[i] << " of cap " << cap;
        if (std::abs(x[i]) > 0.5f * cap) continue;
        ASSERT_NEAR(y[i], exact, 4e-7 * std::abs(exact));
      }
      y = x;
      k().soft_cap(y.data(), static_cast<std::int64_t>(n), 0.0f);
      EXPECT_EQ(y, x);
    }
  }
  std::vector<float> x = {kInf, -kInf, 1e38f, -1e38f, kNan, 0.0f};
  k().soft_cap(x.data(), 6, 30.0f);
  EXPECT_TRUE(std::isnan(x[4]));
  x[4] = 0.0f;
  EXPECT_EQ(x, (std::vector<float>{30.0f, -30.0f, 30.0f, -30.0f, 0.0f, 0.0f}));
}

TEST(SimdDispatchTest, FindsLevelsByName) {
  for (const std::string& name : available_levels()) EXPECT_EQ(find_kernels(name).name, name);
  EXPECT_EQ(available_levels().back(), "scalar");
  EXPECT_EQ(find_kernels("").name, available_levels().front());
}

TEST(SimdDispatchTest, RefusesUnknownAndMissingLevelsByName) {
  for (const std::string name : {"avx2", "avx512", "sse9", "AVX2"}) {
    const std::vector<std::string> levels = available_levels();
    if (std::find(levels.begin(), levels.end(), name) != levels.end()) continue;
    try {
      find_kernels(name);
      FAIL() << name;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

TEST(SimdDispatchTest, KernelsFollowTheEnvironment) {
  const char* name = std::getenv("ICECACHE_SIMD");
  EXPECT_EQ(kernels().name, find_kernels(name == nullptr ? "" : name).name);
  EXPECT_EQ(&kernels(), &kernels());
}

}  // namespace
}  // namespace icecache::simd::simd_test

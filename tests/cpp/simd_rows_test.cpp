// row_logits and add_rows against sums in double.
#include <algorithm>

#include "simd/kernels.h"
#include "simd_levels.h"

namespace icecache::simd::simd_rows_test {
namespace {

class SimdRowsTest : public SimdLevel {
 protected:
  struct Case {
    int group, dim;
    std::int64_t count;
    DType dtype;
  };

  // Rows scattered over a buffer, some taken twice; what lies between them is NaN, or for eight bits
  // of no account.
  void make(const Case& c) {
    const std::int64_t places = 2 * c.count + 1;
    std::vector<float> buffer(static_cast<std::size_t>(places) * c.dim, kNan);
    std::vector<std::int64_t> place(c.count);
    for (std::int64_t i = 0; i < c.count; ++i) {
      place[i] = 1 + 2 * (i % 9 == 8 ? i - 3 : c.count - 1 - i);
      const std::vector<float> row = normal(c.dim);
      std::copy(row.begin(), row.end(), buffer.begin() + place[i] * c.dim);
    }
    if (c.dtype == DType::kInt8) std::replace_if(buffer.begin(), buffer.end(), is_nan, 1e30f);
    bytes_ = encode_rows(buffer, c.dim, c.dtype);
    const std::vector<float> held = decode_rows(bytes_, c.dim, c.dtype);
    bias_ = normal(c.dtype == DType::kInt8 ? c.group : 0);
    rows_.resize(c.count);
    values_.clear();
    for (std::int64_t i = 0; i < c.count; ++i) {
      rows_[i] = bytes_.data() + place[i] * row_bytes_of(c.dtype, c.dim);
      values_.insert(values_.end(), held.begin() + place[i] * c.dim,
                     held.begin() + (place[i] + 1) * c.dim);
    }
  }

  static bool is_nan(float x) { return std::isnan(x); }

  RowsArgs args(const Case& c) const {
    return {rows_.data(), c.dtype, c.count, c.group, c.dim, bias_.empty() ? nullptr : bias_.data()};
  }

  void check_logits(const Case& c) {
    const std::vector<float> queries =
        normal(static_cast<std::size_t>(c.group) * c.dim, 1.0f / std::sqrt(c.dim));
    const std::int64_t stride = c.count + 3;
    std::vector<float> logits(static_cast<std::size_t>(c.group * stride), 77.0f);
    k().row_logits(args(c), queries.data(), logits.data(), stride);
    for (int g = 0; g < c.group; ++g) {
      for (std::int64_t i = 0; i < stride; ++i) {
        double expected = i < c.count ? (bias_.empty() ? 0.0 : bias_[g]) : 77.0;
        for (int d = 0; i < c.count && d < c.dim; ++d) {
          expected += static_cast<double>(queries[g * c.dim + d]) * values_[i * c.dim + d];
        }
        ASSERT_NEAR(logits[g * stride + i], expected, 1e-5) << describe(c, g, i);
      }
    }
  }

  void check_add(const Case& c) {
    const std::int64_t stride = c.count + 5;
    std::vector<float> weights = normal(static_cast<std::size_t>(c.group * stride));
    for (std::size_t i = 0; i < weights.size(); i += 4) weights[i] = 0.0f;
    std::vector<float> out = normal(static_cast<std::size_t>(c.group) * c.dim);
    const std::vector<float> before = out;
    out.push_back(77.0f);
    k().add_rows(args(c), weights.data(), stride, out.data());
    for (int g = 0; g < c.group; ++g) {
      for (int d = 0; d < c.dim; ++d) {
        double expected = before[g * c.dim + d], size = std::abs(expected);
        for (std::int64_t i = 0; i < c.count; ++i) {
          const double term = static_cast<double>(weights[g * stride + i]) * values_[i * c.dim + d];
          expected += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(out[g * c.dim + d], expected, 1e-6 * (1.0 + size)) << describe(c, g, d);
      }
    }
    ASSERT_EQ(out.back(), 77.0f) << "wrote past the end";
  }

  static ::testing::Message describe(const Case& c, int g, std::int64_t i) {
    return ::testing::Message() << "G " << c.group << ", D " << c.dim << ", " << c.count
                                << " rows, " << name_of(c.dtype) << ", query " << g << ", at " << i;
  }

  std::vector<std::byte> bytes_;
  std::vector<const void*> rows_;
  std::vector<float> values_, bias_;  // [N, D], [G]
};
INSTANTIATE_TEST_SUITE_P(Levels, SimdRowsTest, all_levels(), level_name);

TEST_P(SimdRowsTest, EveryHeadDimGroupCountAndType) {
  for (const int dim : all_dims()) {
    for (const std::int64_t count : {0, 1, 2, 3, 64, 65, 130}) {
      // Every group at some head dim and count, all of them at the usual ones.
      const bool usual = dim == 64 || dim == 128;
      for (const int group : all_groups()) {
        if (!usual && (group - 1 - dim / 8 - count) % 5 != 0) continue;
        for (const DType dtype : kRowTypes) {
          const Case c{group, dim, count, dtype};
          make(c);
          check_logits(c);
          check_add(c);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// A row gives the same bits wherever it stands among others, whatever the group.
TEST_P(SimdRowsTest, LogitsDoNotDependOnTheNeighbours) {
  for (const DType dtype : kRowTypes) {
    const Case c{7, 72, 9, dtype};
    make(c);
    const std::vector<float> queries = normal(static_cast<std::size_t>(c.group) * c.dim);
    std::vector<float> together(c.group * c.count);
    k().row_logits(args(c), queries.data(), together.data(), c.count);
    for (int g = 0; g < c.group; ++g) {
      for (std::int64_t i = 0; i < c.count; ++i) {
        float alone = kNan;
        k().row_logits({rows_.data() + i, dtype, 1, 1, c.dim, bias_.empty() ? nullptr : &bias_[g]},
                       queries.data() + g * c.dim, &alone, 1);
        EXPECT_EQ(together[g * c.count + i], alone) << describe(c, g, i);
      }
    }
  }
}

}  // namespace
}  // namespace icecache::simd::simd_rows_test

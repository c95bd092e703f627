// attend_block against softmax attention in double.
#include <algorithm>

#include "simd/attention_state.h"
#include "simd/kernels.h"
#include "simd_levels.h"

namespace icecache::simd::simd_block_test {
namespace {

class SimdBlockTest : public SimdLevel {
 protected:
  struct Case {
    int rows, dim, page_size;
    DType dtype;
    std::uint64_t slots;  // of a page of up to 64
    float softcap = 0.0f;
  };

  // The tokens of a page whose free slots hold NaN, and queries for them.
  void make(const Case& c) {
    queries = normal(static_cast<std::size_t>(c.rows) * c.dim, 1.0f / std::sqrt(c.dim));
    for (std::vector<float>* part : {&keys, &values}) {
      *part = normal(static_cast<std::size_t>(c.page_size) * c.dim);
      for (int s = 0; s < c.page_size; ++s) {
        if ((c.slots >> s & 1) != 0) continue;
        std::fill_n(part->begin() + s * c.dim, c.dim, kNan);
      }
    }
    if (c.dtype == DType::kInt8) {  // has no NaN among its codes
      for (std::vector<float>* part : {&keys, &values}) {
        std::replace_if(
            part->begin(), part->end(), [](float x) { return std::isnan(x); }, 1e30f);
      }
    }
    key_bytes = encode_rows(keys, c.dim, c.dtype);
    value_bytes = encode_rows(values, c.dim, c.dtype);
    keys = decode_rows(key_bytes, c.dim, c.dtype);
    values = decode_rows(value_bytes, c.dim, c.dtype);
    bias = normal(c.dtype == DType::kInt8 ? c.rows : 0);
    key_rows.clear();
    value_rows.clear();
    const std::size_t row_bytes = row_bytes_of(c.dtype, c.dim);
    for (int s = 0; s < c.page_size; ++s) {
      if ((c.slots >> s & 1) == 0) continue;
      key_rows.push_back(key_bytes.data() + s * row_bytes);
      value_rows.push_back(value_bytes.data() + s * row_bytes);
    }
    args = BlockArgs{queries.data(), key_rows.data(), value_rows.data(),
                     nullptr,        c.dtype,         static_cast<int>(key_rows.size()),
                     c.rows,         c.dim,           c.softcap};
    args.bias = bias.empty() ? nullptr : bias.data();
  }

  double logit(const Case& c, int row, int slot) const {
    double sum = bias.empty() ? 0.0 : bias[row];
    for (int d = 0; d < c.dim; ++d) {
      sum += static_cast<double>(queries[row * c.dim + d]) * keys[slot * c.dim + d];
    }
    return c.softcap > 0.0f ? c.softcap * std::tanh(sum / c.softcap) : sum;
  }

  // Two merges: into the empty state, then into one with weight far above, beside and below.
  void check_attend(const Case& c) {
    std::vector<float> out(static_cast<std::size_t>(c.rows) * c.dim), max(c.rows), sum(c.rows);
    const AttentionState state{out.data(), max.data(), sum.data(), c.rows, c.dim};
    state.clear();
    k().attend_block(args, state);
    check_state(c, state, {}, {}, {});

    std::vector<double> out0(out.size()), max0(c.rows), sum0(c.rows);
    for (int r = 0; r < c.rows; ++r) {
      max[r] = static_cast<float>(max0[r] = r % 3 == 0 ? 6.0 : r % 3 == 1 ? 0.25 : -30.0);
      sum[r] = static_cast<float>(sum0[r] = 1.5);
      for (int d = 0; d < c.dim; ++d) {
        out[r * c.dim + d] = static_cast<float>(out0[r * c.dim + d] = 0.125 * d - r);
      }
    }
    k().attend_block(args, state);
    check_state(c, state, out0, max0, sum0);
  }

  void check_state(const Case& c, const AttentionState& state, const std::vector<double>& out0,
                   const std::vector<double>& max0, const std::vector<double>& sum0) {
    for (int r = 0; r < c.rows; ++r) {
      double best = max0.empty() ? -kInf : max0[r];
      for (int s = 0; s < c.page_size; ++s) {
        if ((c.slots >> s & 1) != 0) best = std::max(best, logit(c, r, s));
      }
      if (best == -kInf) {
        ASSERT_EQ(state.max[r], -kInf);
        ASSERT_EQ(state.sum[r], 0.0f);
        ASSERT_EQ(state.out[r * c.dim], 0.0f);
        continue;
      }
      const double before = max0.empty() ? 0.0 : std::exp(max0[r] - best);
      double total = before * (sum0.empty() ? 0.0 : sum0[r]);
      std::vector<double> expected(c.dim, 0.0);
      for (int d = 0; d < c.dim && before > 0.0; ++d) expected[d] = before * out0[r * c.dim + d];
      for (int s = 0; s < c.page_size; ++s) {
        if ((c.slots >> s & 1) == 0) continue;
        const double weight = std::exp(logit(c, r, s) - best);
        total += weight;
        for (int d = 0; d < c.dim; ++d) expected[d] += weight * values[s * c.dim + d];
      }
      ASSERT_NEAR(state.max[r], best, 1e-5) << describe(c);
      ASSERT_NEAR(state.sum[r], total, 2e-5 * total) << describe(c);
      for (int d = 0; d < c.dim; ++d) {
        ASSERT_NEAR(state.out[r * c.dim + d], expected[d], 3e-5 * (8.0 + std::abs(expected[d])))
            << describe(c) << " row " << r << " dim " << d;
      }
    }
  }

  static std::string describe(const Case& c) {
    return ::testing::PrintToString(c.rows) + " rows, D " + ::testing::PrintToString(c.dim) +
           ", S " + ::testing::PrintToString(c.page_size) + ", " + name_of(c.dtype) + ", slots " +
           ::testing::PrintToString(c.slots);
  }

  static std::uint64_t all(int page_size) {
    return page_size == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << page_size) - 1;
  }

  void check(const Case& c) {
    make(c);
    check_attend(c);
  }

  std::vector<float> queries, keys, values, bias;
  std::vector<std::byte> key_bytes, value_bytes;
  std::vector<const void*> key_rows, value_rows;
  BlockArgs args;
};
INSTANTIATE_TEST_SUITE_P(Levels, SimdBlockTest, all_levels(), level_name);

TEST_P(SimdBlockTest, EveryHeadDimPageSizeGroupAndType) {
  for (const int dim : all_dims()) {
    for (const int page_size : {8, 16, 32, 64}) {
      for (const int group : {1, 3, 4, 8, 16}) {
        for (const DType dtype : kRowTypes) {
          check({group, dim, page_size, dtype, all(page_size)});
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(SimdBlockTest, PartialPagesReadOnlyTheirSlots) {
  for (const int page_size : {8, 16, 32, 64}) {
    std::vector<std::uint64_t> masks = {0u,
                                        1u,
                                        std::uint64_t{1} << (page_size - 1),
                                        3u,
                                        0x55555555u,
                                        all(page_size) >> 1,
                                        all(page_size) & ~std::uint64_t{1}};
    for (int i = 0; i < 8; ++i) masks.push_back(random_() * std::uint64_t{0x9e3779b97f4a7c15u});
    for (const std::uint64_t mask : masks) {
      for (const int rows : {1, 3, 5, 16, 17}) {
        for (const int dim : {8, 40, 64, 80}) {
          for (const DType dtype : kRowTypes) {
            check({rows, dim, page_size, dtype, mask & all(page_size)});
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(SimdBlockTest, ManyRows) {
  for (const int rows : {17, 47, 95, 96, 97, 129, 512}) {
    for (const int dim : {8, 24, 64, 136, 256, 512}) {
      for (const int page_size : {8, 16, 32, 64}) {
        check({rows, dim, page_size, kRowTypes[(rows + dim / 8) % 4],
               all(page_size) & ~std::uint64_t{2}});
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(SimdBlockTest, LogitsAreCapped) {
  for (const int rows : {1, 3, 16, 17, 100}) {
    for (const int dim : {8, 64, 136}) {
      for (const int page_size : {8, 16, 64}) {
        for (const float softcap : {0.5f, 2.0f, 50.0f}) {
          const Case c{rows,
                       dim,
                       page_size,
                       kRowTypes[(rows + dim / 8) % 4],
                       all(page_size) & ~std::uint64_t{2},
                       softcap};
          check(c);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Each row against the first tokens that it sees, few rows and many.
TEST_P(SimdBlockTest, RowsSeeTheirFirstTokens) {
  for (const int rows : {2, 6, 16, 17, 60, 200}) {
    for (const int dim : {8, 64, 136}) {
      for (const int count : {1, 7, 16, 33, 64}) {
        for (const DType dtype : kRowTypes) {
          const Case c{rows, dim, count, dtype, all(count)};
          make(c);
          std::vector<int> seen(rows);
          for (int r = 0; r < rows; ++r) seen[r] = std::min(count, 1 + r / 2);
          std::vector<float> out(rows * dim), max(rows), sum(rows);
          const AttentionState state{out.data(), max.data(), sum.data(), rows, dim};
          state.clear();
          args.seen = seen.data();
          k().attend_block(args, state);
          for (int r = 0; r < rows; ++r) {
            std::vector<float> alone(dim), alone_max(1), alone_sum(1);
            const AttentionState one{alone.data(), alone_max.data(), alone_sum.data(), 1, dim};
            one.clear();
            BlockArgs row = args;
            row.queries += r * dim;
            if (row.bias != nullptr) row.bias += r;
            row.rows = 1;
            row.seen = nullptr;
            row.count = seen[r];
            k().attend_block(row, one);
            ASSERT_NEAR(max[r], alone_max[0], 1e-5) << describe(c) << " row " << r;
            ASSERT_NEAR(sum[r], alone_sum[0], 2e-5 * sum[r]) << describe(c) << " row " << r;
            for (int d = 0; d < dim; ++d) {
              ASSERT_NEAR(out[r * dim + d], alone[d], 3e-5 * (8.0 + std::abs(alone[d])));
            }
          }
        }
      }
    }
  }
}

TEST_P(SimdBlockTest, HugeLogitsDoNotOverflow) {
  const Case c{3, 16, 16, DType::kFloat32, 0xffffu};
  make(c);
  for (float& q : queries) q *= 3000.0f;
  std::vector<float> out(c.rows * c.dim), max(c.rows), sum(c.rows);
  const AttentionState state{out.data(), max.data(), sum.data(), c.rows, c.dim};
  state.clear();
  k().attend_block(args, state);
  for (int r = 0; r < c.rows; ++r) {
    int best = 0;
    for (int s = 1; s < c.page_size; ++s) {
      if (logit(c, r, s) > logit(c, r, best)) best = s;
    }
    EXPECT_GE(sum[r], 1.0f);
    EXPECT_LE(sum[r], 1.001f) << "one key outweighs the others";
    EXPECT_NEAR(out[r * c.dim], values[best * c.dim], 1e-3);
  }
}

}  // namespace
}  // namespace icecache::simd::simd_block_test

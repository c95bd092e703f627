// sketch_scan and far_scan against their formulas in double.
#include "simd/kernels.h"
#include "simd_levels.h"

namespace icecache::simd {
namespace {

class SimdScanTest : public SimdLevel {
 protected:
  // The code of one dim of one slot, read as the layout's definition says.
  static int code(const SketchScanArgs& a, std::int64_t page, int slot, int dim) {
    const int per_block = 32 / a.bits;
    const std::int64_t blocks = a.rank / per_block;
    const std::uint8_t* bytes =
        a.codes + ((page * blocks + dim / per_block) * a.page_size + slot) * 4;
    const int within = dim % per_block;
    if (a.bits == 8) return bytes[within];
    return within < 4 ? bytes[within] & 15 : bytes[within - 4] >> 4;
  }

  void check(int bits, int rank, int page_size, int group, std::int64_t pages) {
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(pages * page_size * rank * bits / 8));
    for (std::uint8_t& c : codes) c = static_cast<std::uint8_t>(random_());
    const std::vector<float> queries = normal(static_cast<std::size_t>(group * rank), 0.1f);
    const std::vector<float> bias = normal(static_cast<std::size_t>(group));
    const std::int64_t stride = pages * page_size + 5;
    std::vector<float> scores(static_cast<std::size_t>(group * stride), 77.0f);
    SketchScanArgs args;
    args.codes = codes.data();
    args.queries = queries.data();
    args.bias = bias.data();
    args.scores = scores.data();
    args.score_stride = stride;
    args.pages = pages;
    args.group = group;
    args.rank = rank;
    args.page_size = page_size;
    args.bits = bits;
    k().sketch_scan(args);
    for (int g = 0; g < group; ++g) {
      for (std::int64_t i = 0; i < stride; ++i) {
        double expected = 77.0, size = 0.0;  // untouched behind the last slot
        if (i < pages * page_size) {
          expected = bias[g];
          for (int d = 0; d < rank; ++d) {
            const double term = static_cast<double>(queries[g * rank + d]) *
                                code(args, i / page_size, static_cast<int>(i % page_size), d);
            expected += term;
            size += std::abs(term);
          }
        }
        ASSERT_NEAR(scores[g * stride + i], expected, 1e-6 * (1.0 + size))
            << bits << " bits, R " << rank << ", S " << page_size << ", G " << group << ", P "
            << pages << ", query " << g << ", slot " << i;
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Levels, SimdScanTest, testing::Values("scalar", "avx2", "avx512"),
                         level_name);

TEST_P(SimdScanTest, SketchScan) {
  for (const int bits : {4, 8}) {
    for (const int rank : {8, 16, 32, 40, 64, 256}) {
      for (const int page_size : {8, 16, 32}) {
        for (const int group : {1, 2, 3, 4, 5, 8, 16}) {
          for (const std::int64_t pages : {0, 1, 2, 3, 8}) {
            check(bits, rank, page_size, group, pages);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(SimdScanTest, FarScan) {
  for (int dim = 8; dim <= kMaxHeadDim; dim += 24) {
    for (const int group : {1, 3, 4, 8, 16}) {
      for (const std::int64_t nodes : {0, 1, 3, 4, 5, 21}) {
        std::vector<float> log_weight = normal(static_cast<std::size_t>(nodes), 4.0f);
        std::vector<float> mean = normal(static_cast<std::size_t>(nodes * dim));
        std::vector<float> variance = normal(static_cast<std::size_t>(nodes * dim));
        // Node sizes on both sides of the clamp.
        for (std::size_t i = 0; i < variance.size(); ++i) {
          variance[i] *= variance[i] * (i / dim % 2 == 0 ? 0.01f : 3.0f);
        }
        const std::vector<float> dq = normal(static_cast<std::size_t>(group * dim), 0.3f);
        for (std::int64_t c = 1; c < nodes; c += 3) {  // empty nodes hold no moments
          log_weight[c] = -kInf;
          mean[c * dim] = kNan;
          variance[c * dim] = kNan;
        }
        std::vector<float> out(static_cast<std::size_t>(group * nodes) + 1, 77.0f);
        k().far_scan({log_weight.data(), mean.data(), variance.data(), dq.data(), out.data(), nodes,
                      group, dim});
        for (int g = 0; g < group; ++g) {
          for (std::int64_t c = 0; c < nodes; ++c) {
            double linear = 0.0, square = 0.0;
            for (int d = 0; d < dim; ++d) {
              const double q = dq[g * dim + d];
              linear += q * mean[c * dim + d];
              square += q * q * variance[c * dim + d];
            }
            const double expected = log_weight[c] + linear + std::min(1.0, square / 2);
            if (log_weight[c] == -kInf) {
              ASSERT_EQ(out[g * nodes + c], -kInf);
            } else {
              ASSERT_NEAR(out[g * nodes + c], expected, 2e-5) << dim << " " << group << " " << c;
            }
          }
        }
        EXPECT_EQ(out.back(), 77.0f) << "wrote past the end";
      }
    }
  }
}

}  // namespace
}  // namespace icecache::simd

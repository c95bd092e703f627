#include "host/tensor_overlap.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

namespace icecache::tensor_overlap_test {
namespace {

constexpr std::int64_t kDim = 4;

class TensorOverlapTest : public ::testing::Test {
 protected:
  // [heads, tokens, 4] from an element on.
  TensorView view(std::int64_t first, std::int64_t heads, std::int64_t tokens,
                  std::int64_t head_stride, std::int64_t token_stride) {
    return {
        memory_.data() + first, DType::kFloat32, heads, tokens, kDim, head_stride, token_stride};
  }

  // Elements, in order, with repetitions.
  std::multiset<const float*> elements(const std::vector<TensorView>& views) {
    std::multiset<const float*> all;
    for (const TensorView& v : views) {
      for (std::int64_t h = 0; h < v.heads; ++h) {
        for (std::int64_t t = 0; t < v.tokens; ++t) {
          for (std::int64_t i = 0; i < v.dim; ++i) {
            all.insert(reinterpret_cast<const float*>(v.at(h, t)) + i);
          }
        }
      }
    }
    return all;
  }

  std::vector<float> memory_ = std::vector<float>(4096);
};

TEST_F(TensorOverlapTest, TellsExpandedAndInterleavedRowsApart) {
  using Views = std::vector<TensorView>;
  EXPECT_FALSE(rows_overlap(Views{view(0, 2, 3, 12, 4)}));
  EXPECT_FALSE(rows_overlap(Views{view(0, 2, 3, 4, 8)})) << "tokens outside of heads";
  EXPECT_TRUE(rows_overlap(Views{view(0, 2, 3, 0, 4)})) << "expanded heads";
  EXPECT_TRUE(rows_overlap(Views{view(0, 2, 3, 12, 0)})) << "expanded tokens";
  EXPECT_FALSE(rows_overlap(Views{view(0, 1, 3, 0, 4)})) << "one head has no stride";
  EXPECT_TRUE(rows_overlap(Views{view(0, 2, 3, 12, 3)})) << "rows shorter than D";
  EXPECT_FALSE(rows_overlap(Views{view(0, 2, 3, 6, 12)})) << "a gap within tokens";
  const Views interleaved{view(0, 2, 3, 24, 8), view(4, 2, 3, 24, 8)};
  EXPECT_FALSE(rows_overlap(interleaved));
  EXPECT_TRUE(rows_overlap(Views{view(0, 1, 3, 0, 8), view(3, 1, 3, 0, 8)}));
  EXPECT_FALSE(rows_overlap(Views{view(0, 1, 3, 0, 8)}, Views{view(4, 1, 3, 0, 8)}));
  EXPECT_TRUE(rows_overlap(Views{view(0, 1, 3, 0, 8)}, Views{view(5, 1, 3, 0, 8)}));
  EXPECT_FALSE(rows_overlap(Views{}, Views{view(0, 1, 1, 0, 4)}));
  EXPECT_FALSE(rows_overlap(Views{view(0, 1, 0, 0, 0)}, Views{view(0, 1, 1, 0, 4)}));
}

TEST_F(TensorOverlapTest, AgreesWithCountingElements) {
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<std::int64_t>(random() % n); };
  const auto some = [&] {
    std::vector<TensorView> views(1 + below(3));
    for (TensorView& v : views) {
      v = view(below(60), 1 + below(3), below(4), below(5) * 4, below(4) * 5);
    }
    return views;
  };
  int alone[2] = {}, apart[2] = {};
  for (int i = 0; i < 5000; ++i) {
    const auto written = some(), read = some();
    const auto out = elements(written), in = elements(read);
    const bool repeats = std::set<const float*>(out.begin(), out.end()).size() != out.size();
    ASSERT_EQ(rows_overlap(written), repeats) << "case " << i;
    ++alone[repeats];
    if (repeats) continue;
    bool shared = false;
    for (const float* element : in) shared = shared || out.contains(element);
    ASSERT_EQ(rows_overlap(written, read), shared) << "case " << i;
    ++apart[shared];
  }
  for (const int count : {alone[0], alone[1], apart[0], apart[1]}) EXPECT_GT(count, 100);
}

}  // namespace
}  // namespace icecache::tensor_overlap_test

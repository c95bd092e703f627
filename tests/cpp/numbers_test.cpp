// What an Engine answers for numbers of any size that its types hold, against attention in double:
// from subnormal to the largest keys, values and queries, equal ones, one large among small ones,
// alternating signs; and for queries that are no numbers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "engine_oracle.h"
#include "icecache/engine.h"
#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache::numbers_test {
namespace {

using testing::OracleHead;

// 1 / sqrt(kDim) is a power of two: products of such numbers are exact, and equal logits stay
// equal.
constexpr int kDim = 64, kGroup = 2, kPrompt = 200, kSteps = 6;

float largest_of_type(DType dtype) {
  if (dtype == DType::kFloat16) return 65504.0f;
  return dtype == DType::kBFloat16 ? 0x1.fep127f : std::numeric_limits<float>::max();
}

float smallest_of_type(DType dtype) {
  if (dtype == DType::kFloat16) return 0x1p-24f;
  return dtype == DType::kBFloat16 ? 0x1p-133f : 0x1p-149f;
}

// Rows as the type holds them.
struct Rows {
  std::vector<float> floats;
  std::vector<std::byte> bytes;
  DType dtype;

  Rows(std::vector<float> values, DType type) : floats(std::move(values)), dtype(type) {
    bytes.resize(floats.size() * size_of(dtype));
    simd::kernels().from_float(floats.data(), bytes.data(), dtype, floats.size());
    simd::kernels().to_float(bytes.data(), dtype, floats.data(), floats.size());
  }
  TensorView view(std::int64_t heads) {
    const auto tokens = static_cast<std::int64_t>(floats.size()) / (heads * kDim);
    return {bytes.data(), dtype, heads, tokens, kDim, tokens * kDim, kDim};
  }
};

struct Case {
  const char* index;
  const char* tail;
  DType dtype;
  bool exact;
};

// One sequence of one layer and KV head, and what it holds.
class One {
 public:
  explicit One(const Case& c, int budget = 64) : dtype_(c.dtype) {
    CacheShape shape;
    shape.num_layers = shape.num_kv_heads = 1;
    shape.num_q_heads = kGroup;
    shape.head_dim = kDim;
    shape.dtype = c.dtype;
    Config config;
    config.index = c.index;
    config.tail = c.tail;
    config.exact = c.exact;
    config.token_budget = budget;
    config.window_tokens = 16;
    config.host_memory = 16 << 20;
    config.num_threads = config.index_threads = 1;
    engine_ = std::make_unique<Engine>(shape, config);
    id_ = engine_->new_sequence();
  }

  // Tokens [T, D] and their queries [G, T, D]; outputs likewise.
  std::vector<float> step(const std::vector<float>& keys, const std::vector<float>& values,
                          const std::vector<float>& queries) {
    Rows k(keys, dtype_), v(values, dtype_), q(queries, dtype_), o(queries, dtype_);
    for (std::size_t at = 0; at < k.floats.size(); at += kDim) {
      head_.keys.emplace_back(k.floats.begin() + at, k.floats.begin() + at + kDim);
      head_.values.emplace_back(v.floats.begin() + at, v.floats.begin() + at + kDim);
    }
    queries_ = q.floats;
    const TensorView kv = k.view(1), vv = v.view(1), qv = q.view(kGroup), ov = o.view(kGroup);
    engine_->step({&id_, 1}, 0, {&kv, 1}, {&vv, 1}, {&qv, 1}, {&ov, 1});
    simd::kernels().to_float(o.bytes.data(), dtype_, o.floats.data(), o.floats.size());
    return o.floats;
  }

  // Of the last of T queries of head g, scaled.
  std::vector<double> query(int g, int tokens) const {
    const float* row = queries_.data() + (g * tokens + tokens - 1) * kDim;
    std::vector<double> scaled(row, row + kDim);
    for (double& x : scaled) x /= std::sqrt(static_cast<double>(kDim));
    return scaled;
  }
  std::vector<double> expected(int g, int tokens) const {
    return testing::full_attention(head_, query(g, tokens), head_.keys.size()).out;
  }
  std::vector<double> logits(int g, int tokens) const {
    const std::vector<double> scaled = query(g, tokens);
    std::vector<double> result;
    for (const std::vector<float>& key : head_.keys) {
      double sum = 0.0;
      for (int i = 0; i < kDim; ++i) sum += scaled[i] * key[i];
      result.push_back(sum);
    }
    return result;
  }

  Engine& engine() { return *engine_; }
  SeqId id() const { return id_; }
  const OracleHead& head() const { return head_; }

 private:
  DType dtype_;
  std::unique_ptr<Engine> engine_;
  SeqId id_ = 0;
  OracleHead head_;
  std::vector<float> queries_;
};

// How tokens and queries are filled: element i of row `row`, about 1.
struct Pattern {
  const char* name;
  std::function<float(std::mt19937&, int row, int i)> element;
};

std::vector<Pattern> patterns() {
  const auto normal = [](std::mt19937& random) {
    return std::clamp(std::normal_distribution<float>(0.0f, 0.3f)(random), -1.0f, 1.0f);
  };
  return {
      {"random", [=](std::mt19937& random, int, int) { return normal(random); }},
      {"equal", [](std::mt19937&, int, int) { return 1.0f; }},
      {"one_large", [=](std::mt19937& random, int row,
                        int) { return row == kPrompt / 2 ? 1.0f : normal(random) * 0x1p-10f; }},
      {"alternating",
       [](std::mt19937& random, int row, int i) {
         return (row + i + static_cast<int>(random() % 7 == 0)) % 2 == 0 ? 1.0f : -1.0f;
       }},
  };
}

std::vector<float> fill(const Pattern& pattern, std::mt19937& random, int first_row, int rows,
                        float size) {
  std::vector<float> result;
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kDim; ++i) {
      result.push_back(size * pattern.element(random, first_row + r, i));
    }
  }
  return result;
}

class Numbers : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (std::string(GetParam().index) == "faiss" && !build_info().faiss) {
      GTEST_SKIP() << "index=faiss is not in this build (ICECACHE_FAISS)";
    }
  }

  // Powers of two, and the ends of the type's range.
  std::vector<float> sizes() const {
    const float most = largest_of_type(GetParam().dtype),
                least = smallest_of_type(GetParam().dtype);
    if (GetParam().dtype == DType::kFloat16) return {least, 0x1p-14f, 1.0f, 256.0f, 0x1p15f, most};
    return {least, 0x1p-133f, 0x1p-100f, 1.0f, 0x1p33f, 0x1p64f, 0x1p67f, 0x1p100f, most};
  }

  // Whether a float's rounding of the logits may change which tokens weigh: unequal ones that are
  // close beside their size.
  static bool is_ambiguous(const std::vector<double>& logits) {
    const double max = *std::max_element(logits.begin(), logits.end());
    double size = 0.0;
    for (const double x : logits) size = std::max(size, std::abs(x));
    const double rounding = 4e-6 * size;
    return rounding > 1e-5 && std::any_of(logits.begin(), logits.end(), [&](double x) {
             return x < max && max - x < 25.0 + rounding;
           });
  }

  // Whether a step within the budget has one right answer: few tokens weigh, or all weigh alike
  // and the far field stands for those that are not picked.
  bool is_certain(const std::vector<double>& logits) const {
    if (is_ambiguous(logits)) return false;
    if (GetParam().exact) return true;
    std::vector<double> sorted = logits;
    std::sort(sorted.rbegin(), sorted.rend());
    const bool alike = sorted.front() - sorted.back() < 1e-5;
    return alike ? GetParam().tail == std::string("on") : sorted[20] < sorted[0] - 20.0;
  }

  // Compares the last of `tokens` outputs; counts those with one right answer.
  void check(const One& one, const std::vector<float>& out, int tokens, const std::string& what) {
    double largest = 0.0;
    for (const auto& row : one.head().values) {
      for (const float x : row) largest = std::max(largest, std::abs(double{x}));
    }
    const double rounding = GetParam().dtype == DType::kFloat32    ? 2e-5
                            : GetParam().dtype == DType::kBFloat16 ? 1.0 / 256
                                                                   : 1.0 / 2048;
    // Subnormal values may count as zeros.
    const double tolerance =
        rounding * largest + std::max(0x1p-126f, smallest_of_type(GetParam().dtype));
    for (int g = 0; g < kGroup; ++g) {
      const bool certain = is_certain(one.logits(g, tokens));
      const std::vector<double> expected = one.expected(g, tokens);
      certain_ += certain ? 1 : 0;
      ++all_;
      for (int i = 0; i < kDim; ++i) {
        const double x = out[(g * tokens + tokens - 1) * kDim + i];
        ASSERT_LE(std::abs(x), largest + tolerance) << what << ", head " << g;
        if (!certain) continue;
        ASSERT_NEAR(x, expected[i], tolerance) << what << ", head " << g;
      }
    }
  }

  // A prompt and steps after it, all of one pattern.
  void run(const Pattern& keys, float key_size, float query_size, float value_size) {
    const std::string what = message(GetParam().index, " ", keys.name, " keys ", key_size,
                                     " queries ", query_size, " values ", value_size);
    std::mt19937 random(7);
    const Pattern normal = patterns()[0];
    One one(GetParam());
    const auto feed = [&](int first, int tokens) {
      const std::vector<float> k = fill(keys, random, first, tokens, key_size);
      const std::vector<float> v = fill(normal, random, first, tokens, value_size);
      // One sign, or what some keys add others take away.
      const std::vector<float> q = fill(keys, random, kPrompt / 2, kGroup * tokens, query_size);
      check(one, one.step(k, v, q), tokens, what + message(" at ", first + tokens));
    };
    feed(0, kPrompt);
    for (int t = 0; t < kSteps && !HasFatalFailure(); ++t) feed(kPrompt + t, 1);
    one.engine().check_integrity();
  }

  int certain_ = 0, all_ = 0;
};

TEST_P(Numbers, AnySizeOfKeysQueriesAndValues) {
  for (const Pattern& pattern : patterns()) {
    for (const float size : sizes()) {
      // The largest numbers that are no powers of two round where signs alternate.
      if (size == largest_of_type(DType::kFloat16) && pattern.name == std::string("alternating")) {
        continue;
      }
      run(pattern, size, 1.0f, 1.0f);
      run(pattern, 1.0f, size, size);
      run(pattern, size, size, size);
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_GT(certain_, GetParam().exact ? all_ * 4 / 5 : all_ / 4);
}

// What comes after a prompt of ordinary keys is far from all that the index was built of.
TEST_P(Numbers, LargeKeysJoinAnOrdinaryIndex) {
  std::mt19937 random(3);
  const Pattern normal = patterns()[0];
  const float most = largest_of_type(GetParam().dtype);
  for (const float size : {most, smallest_of_type(GetParam().dtype)}) {
    One one(GetParam());
    for (int at = 0, tokens = kPrompt; at < kPrompt + 60; at += tokens, tokens = 1) {
      const float now = at == 0 || at % 2 == 1 ? 1.0f : size;
      const std::vector<float> k = fill(normal, random, at, tokens, now);
      const std::vector<float> v = fill(normal, random, at, tokens, now);
      const std::vector<float> q = fill(normal, random, at, kGroup * tokens, 1.0f);
      check(one, one.step(k, v, q), tokens, message("size ", size, " at ", at));
      if (HasFatalFailure()) return;
    }
    one.engine().check_integrity();
  }
}

// Weights are relative to a largest logit, and not to the rounded logarithm of a sum.
TEST_P(Numbers, WeightsAddUpToOneAtLargeLogits) {
  const float largest = GetParam().dtype == DType::kFloat16 ? 1024.0f : 4096.0f;
  for (const float size : {1.0f, 32.0f, 1024.0f, largest}) {
    One one(GetParam());
    const std::vector<float> ones(kDim, 1.0f), large(kDim, size), both(kGroup * kDim, size);
    for (int t = 0; t < 120; ++t) {
      const std::vector<float> out = one.step(large, ones, both);
      for (const float x : out) ASSERT_NEAR(x, 1.0f, 1e-5f) << "logits " << 8.0f * size * size;
    }
  }
}

TEST_P(Numbers, QueriesThatAreNoNumbersSpoilTheirOwnOutputsOnly) {
  const float inf = std::numeric_limits<float>::infinity();
  std::mt19937 random(5);
  const Pattern normal = patterns()[0];
  One one(GetParam()), other(GetParam());
  const std::vector<float> bad{std::nanf(""), inf, -inf};
  for (int at = 0, tokens = kPrompt, n = 0; at < kPrompt + 30; at += tokens, tokens = 1, ++n) {
    const std::vector<float> k = fill(normal, random, at, tokens, 8.0f);
    const std::vector<float> v = fill(normal, random, at, tokens, 1.0f);
    std::vector<float> q = fill(normal, random, at, kGroup * tokens, 8.0f);
    const std::vector<float> good = q;
    // One among the last of the prompt, whose queries shape the metric, then one of each kind.
    const std::size_t spoilt = at == 0 ? kPrompt - 3 : 0;
    q[spoilt * kDim + 5] = bad[n % 3];
    const std::vector<float> out = one.step(k, v, q);
    other.step(k, v, good);
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_EQ(std::isnan(out[i]), i / kDim == spoilt) << "output " << i << " at " << at;
    }
    if (at == 0) continue;
    const std::vector<double> expected = other.expected(1, 1);
    const bool certain = is_certain(other.logits(1, 1)) || GetParam().exact;
    for (int i = 0; i < kDim && certain; ++i) ASSERT_NEAR(out[kDim + i], expected[i], 0.01);
  }
  one.engine().check_integrity();
  // Afterwards steps are as they are without.
  const std::vector<float> k = fill(normal, random, 0, 1, 8.0f), q(kGroup * kDim, 0.0f);
  const std::vector<float> out = one.step(k, k, q);
  for (const float x : out) EXPECT_TRUE(std::isfinite(x));
  EXPECT_EQ(one.engine().stats(0, 0).steps > 0, !GetParam().exact);
}

TEST_P(Numbers, TheCallersModeOfSubnormalsStays) {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  run(patterns()[0], 1.0f, 1.0f, 1.0f);
  EXPECT_EQ(_mm_getcsr() & 0x8040u, before & 0x8040u);
#endif
}

// Short sequences hold the rows of their queries and no sums, and forks those of their parent.
TEST(QueryMemory, OfShortSequencesIsTheirRowsAndOfForksNothing) {
  CacheShape shape;
  shape.num_layers = 2;
  shape.num_q_heads = 8;
  shape.num_kv_heads = 2;
  shape.head_dim = 128;
  shape.dtype = DType::kBFloat16;
  Config config;
  config.host_memory = 64 << 20;
  config.num_threads = config.index_threads = 1;
  Engine engine(shape, config);
  constexpr int kTokens = 20, kSequences = 10;
  std::vector<std::uint16_t> rows(8 * kTokens * 128, 0x3f80);
  const auto view = [&](std::int64_t heads) {
    return TensorView{rows.data(), DType::kBFloat16, heads, kTokens, 128, kTokens * 128, 128};
  };
  const TensorView kv = view(2), q = view(8);
  std::vector<std::uint16_t> out(rows.size());
  const TensorView o{out.data(), DType::kBFloat16, 8, kTokens, 128, kTokens * 128, 128};
  std::vector<SeqId> ids;
  for (int s = 0; s < kSequences; ++s) {
    ids.push_back(engine.new_sequence());
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      engine.step({&ids.back(), 1}, layer, {&kv, 1}, {&kv, 1}, {&q, 1}, {&o, 1});
    }
  }
  const std::int64_t heads = kSequences * shape.num_layers * shape.num_kv_heads;
  const std::int64_t rows_of_head = kTokens * shape.group() * 128 * 2;
  const std::int64_t held = engine.memory().query_bytes;
  EXPECT_GE(held, heads * rows_of_head);
  EXPECT_LE(held, heads * (rows_of_head + 16 * 256 + 256));
  for (const SeqId id : ids) engine.fork(id);
  EXPECT_LE(engine.memory().query_bytes, held);
}

// Where all representatives are equally near, no cell takes all tokens: a step reads as much.
TEST(DciWork, IsThatOfOtherKeysWhereAllAreEqual) {
  std::int64_t read[2] = {};
  for (const bool equal : {false, true}) {
    One one({"dci", "off", DType::kFloat32, false}, 128);
    std::mt19937 random(4);
    const Pattern pattern = patterns()[equal ? 1 : 0];
    const auto feed = [&](int first, int tokens) {
      const std::vector<float> k = fill(pattern, random, first, tokens, 1.0f);
      const std::vector<float> q = fill(patterns()[0], random, first, kGroup * tokens, 1.0f);
      one.step(k, k, q);
    };
    feed(0, 4000);
    one.engine().synchronize();
    one.engine().reset_stats();
    for (int t = 0; t < 20; ++t) feed(4000 + t, 1);
    read[equal ? 1 : 0] = one.engine().stats(0, 0).bytes_read;
  }
  EXPECT_LT(read[1], 2 * read[0]);
}

std::vector<Case> cases() {
  std::vector<Case> result;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    result.push_back({"tree", "on", dtype, true});
    for (const char* index : {"tree", "dci", "positional", "faiss"}) {
      for (const char* tail : {"on", "off"}) result.push_back({index, tail, dtype, false});
    }
  }
  return result;
}

INSTANTIATE_TEST_SUITE_P(All, Numbers, ::testing::ValuesIn(cases()), [](const auto& info) {
  const Case& c = info.param;
  return std::string(c.exact ? "exact" : c.index) + "_tail_" + c.tail + "_" +
         std::string(name_of(c.dtype));
});

}  // namespace
}  // namespace icecache::numbers_test

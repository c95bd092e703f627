// What every SemanticIndex promises (icecache/semantic_index.h), for every index, unit of picking,
// far field and dtype.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <set>
#include <span>

#include "icecache/engine.h"
#include "icecache/error.h"
#include "icecache/semantic_index.h"
#include "pool_fixture.h"

namespace icecache {
namespace {

using testing::clustered_tokens;
using testing::PoolFixture;
using testing::Tokens;

constexpr int kDim = 32, kGroup = 3, kPageSize = 8;

struct Variant {
  const char* index;
  const char* faiss_search;
  const char* select;
  const char* tail;
  DType dtype;
};

std::vector<Variant> variants() {
  std::vector<Variant> result;
  for (const char* index : {"tree", "dci", "positional", "faiss"}) {
    for (const char* select : {"token", "page"}) {
      for (const char* tail : {"on", "off"}) {
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
          result.push_back({index, "sketch", select, tail, dtype});
        }
      }
    }
  }
  for (const char* search : {"flat", "ivf", "hnsw"}) {
    result.push_back({"faiss", search, "token", "on", DType::kFloat32});
  }
  return result;
}

std::string variant_name(const ::testing::TestParamInfo<Variant>& info) {
  const Variant& v = info.param;
  return std::string(v.index) + "_" + v.faiss_search + "_" + v.select + "_tail_" + v.tail + "_" +
         std::string(name_of(v.dtype));
}

class IndexContract : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    use_pages(400);
    if (std::string(GetParam().index) == "faiss" && !build_info().faiss) {
      GTEST_SKIP() << "index=faiss is not in this build (ICECACHE_FAISS)";
    }
  }

  void use_pages(std::size_t pages) {
    const Variant& variant = GetParam();
    pool_ = std::make_unique<PoolFixture>(pages, kPageSize, kDim, kGroup, variant.dtype);
    Config config;
    config.index = variant.index;
    config.faiss_search = variant.faiss_search;
    config.select = variant.select;
    config.tail = variant.tail;
    config.page_size = kPageSize;
    config.far_node_tokens = 32;
    CacheShape shape;
    shape.num_layers = 1;
    shape.num_q_heads = kGroup;
    shape.num_kv_heads = 1;
    shape.head_dim = kDim;
    shape.dtype = variant.dtype;
    pool_->config = config.resolved(shape);
  }

  Tokens tokens(int n, unsigned seed = 1) {
    return clustered_tokens(n, kDim, GetParam().dtype, seed);
  }

  // An index of the first `built` tokens at once and the others one call each of 1, 2, 3, ..
  // tokens.
  std::unique_ptr<SemanticIndex> made(const Tokens& all, int built) {
    std::unique_ptr<SemanticIndex> index = make_index(pool_->context);
    index->build(all.block(0, built, kFirst), moments(all));
    for (int at = built, n = 1; at < all.count(); at += n, ++n) {
      n = std::min(n, all.count() - at);
      index->insert(all.block(at, n, kFirst + at));
    }
    return index;
  }

  // Queries that look like keys.
  static QueryMoments moments(const Tokens& all) {
    QueryMoments moments;
    moments.observe(all.keys.data(), std::min(64, all.count()), kDim);
    return moments;
  }

  void expect_holds(const SemanticIndex& index, const Tokens& all, int count) {
    index.check_integrity();
    ASSERT_EQ(index.size(), count);
    EXPECT_EQ(index.end_position(), count > 0 ? kFirst + count : 0);
    std::vector<std::int32_t> positions;
    for (const PageInfo& page : index.pages()) {
      EXPECT_FALSE(page.positions.empty());
      EXPECT_LE(page.positions.size(), kPageSize);
      positions.insert(positions.end(), page.positions.begin(), page.positions.end());
    }
    std::sort(positions.begin(), positions.end());
    std::vector<std::int32_t> expected(count);
    std::iota(expected.begin(), expected.end(), kFirst);
    EXPECT_EQ(positions, expected);
    std::vector<std::byte> keys(count * kDim * size_of(all.dtype)), values(keys.size());
    index.gather(keys.data(), values.data());
    EXPECT_TRUE(std::equal(keys.begin(), keys.end(), all.raw_keys.begin()));
    EXPECT_TRUE(std::equal(values.begin(), values.end(), all.raw_values.begin()));
  }

  struct Answer {
    Selection selection;
    std::vector<float> out, lse;
    bool operator==(const Answer& other) const {
      const Selection& a = selection;
      const Selection& b = other.selection;
      return out == other.out && lse == other.lse && a.tokens == b.tokens && a.logits == b.logits &&
             a.rest_lse == b.rest_lse && a.far_weights == b.far_weights &&
             a.far_share == b.far_share && a.far_total == b.far_total &&
             a.far_shift == b.far_shift &&
             std::equal(a.picks.begin(), a.picks.end(), b.picks.begin(), b.picks.end(),
                        [](const PagePick& x, const PagePick& y) {
                          return x.local_page == y.local_page && x.slots == y.slots;
                        });
    }
  };

  // A step without sink and window, as HeadCache::decode makes one.
  Answer ask(const SemanticIndex& index, const std::vector<float>& queries, int budget) {
    const std::vector<float> near(kGroup, -INFINITY);
    SelectRequest request;
    request.queries = queries.data();
    request.group = kGroup;
    request.near_lse = near.data();
    request.budget = request.max_budget = budget;
    Answer answer;
    Selection& selection = answer.selection;
    index.select(request, selection);
    const auto picked = static_cast<std::size_t>(selection.tokens);
    const std::vector<float> means = node_means(index);
    const std::size_t nodes = means.size() / kDim;
    EXPECT_EQ(selection.logits.size(), kGroup * picked);
    EXPECT_EQ(selection.far_weights.size(), kGroup * nodes);
    EXPECT_EQ(selection.far_share.size(),
              GetParam().tail == std::string("on") ? kGroup * picked : 0);
    std::vector<float> keys, values;
    picked_rows(selection, keys, values);
    answer.out.assign(kGroup * kDim, 0.0f);
    for (int g = 0; g < kGroup; ++g) {
      const float* logits = selection.logits.data() + g * picked;
      float max = selection.far_total[g] > 0.0f ? selection.far_shift[g] : -INFINITY;
      for (std::size_t t = 0; t < picked; ++t) max = std::max(max, logits[t]);
      const float far_scale =
          selection.far_total[g] > 0.0f ? std::exp(selection.far_shift[g] - max) : 0.0f;
      float total = far_scale * selection.far_total[g];
      float* out = answer.out.data() + g * kDim;
      for (std::size_t t = 0; t < picked; ++t) {
        expect_logit(queries.data() + g * kDim, keys.data() + t * kDim, logits[t]);
        float weight = std::exp(logits[t] - max);
        total += weight;
        if (nodes > 0) weight -= far_scale * selection.far_share[g * picked + t];
        for (int j = 0; j < kDim; ++j) out[j] += weight * values[t * kDim + j];
      }
      for (std::size_t c = 0; c < nodes; ++c) {
        const float weight = far_scale * selection.far_weights[g * nodes + c];
        for (int j = 0; j < kDim; ++j) out[j] += weight * means[c * kDim + j];
      }
      for (int j = 0; j < kDim && total > 0.0f; ++j) out[j] /= total;
      answer.lse.push_back(max + std::log(total));
    }
    return answer;
  }

  std::vector<float> node_means(const SemanticIndex& index) const {
    const std::span<const std::byte> raw = index.far_values();
    std::vector<float> means(raw.size() / size_of(GetParam().dtype));
    simd::kernels().to_float(raw.data(), GetParam().dtype, means.data(), means.size());
    return means;
  }

  // Keys and values [T, D] of the picked tokens.
  void picked_rows(const Selection& selection, std::vector<float>& keys,
                   std::vector<float>& values) {
    const std::size_t row = kDim * size_of(GetParam().dtype);
    keys.resize(static_cast<std::size_t>(selection.tokens) * kDim);
    values.resize(keys.size());
    std::size_t at = 0;
    for (const PagePick& pick : selection.picks) {
      for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1, at += kDim) {
        const std::byte* key = pool_->pool->data(pick.page) + std::countr_zero(slots) * row;
        simd::kernels().to_float(key, GetParam().dtype, keys.data() + at, kDim);
        simd::kernels().to_float(key + kPageSize * row, GetParam().dtype, values.data() + at, kDim);
      }
    }
  }

  static void expect_logit(const float* query, const float* key, float logit) {
    double exact = 0.0, size = 0.0;
    for (int j = 0; j < kDim; ++j) {
      exact += double{query[j]} * key[j];
      size += std::abs(double{query[j]} * key[j]);
    }
    EXPECT_NEAR(logit, exact, 1e-6 * (1.0 + size));
  }

  std::vector<float> queries(unsigned seed = 9) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 0.4f);
    std::vector<float> result(kGroup * kDim);
    for (float& x : result) x = normal(random);
    return result;
  }

  static constexpr int kFirst = 4;  // position of the first token; 0..3 would be sinks
  std::unique_ptr<PoolFixture> pool_;
};

TEST_P(IndexContract, EveryTokenIsHeldOnceThroughBuildInsertAndTruncate) {
  const Tokens all = tokens(420);
  std::unique_ptr<SemanticIndex> index = made(all, 300);
  expect_holds(*index, all, 420);
  index->truncate(kFirst + 420);
  expect_holds(*index, all, 420);
  for (const int left : {419, 390, 250, 7}) {
    index->truncate(kFirst + left);
    expect_holds(*index, all, left);
  }
  for (int at = 7; at < 60; ++at) index->insert(all.block(at, 1, kFirst + at));
  expect_holds(*index, all, 60);
  index->truncate(kFirst);
  expect_holds(*index, all, 0);
  EXPECT_EQ(pool_->pool->used_pages(), 0u);
  for (int at = 0; at < 30; ++at) index->insert(all.block(at, 1, kFirst + at));
  expect_holds(*index, all, 30);
  index.reset();
  EXPECT_EQ(pool_->pool->used_pages(), 0u);
}

TEST_P(IndexContract, PicksLiveTokensWithinTheBudget) {
  const Tokens all = tokens(420);
  const std::unique_ptr<SemanticIndex> index = made(all, 300);
  index->truncate(kFirst + 400);
  for (const int budget : {0, 1, 7, 8, 50, 160}) {
    const Answer answer = ask(*index, queries(), budget);
    const Selection& selection = answer.selection;
    EXPECT_LE(selection.tokens, budget);
    if (std::string(GetParam().select) == "token" || budget >= kPageSize) {
      EXPECT_GE(selection.tokens, std::min(budget, budget - kPageSize + 1));
    }
    int slots = 0, previous = -1;
    for (const PagePick& pick : selection.picks) {
      EXPECT_GT(pick.local_page, previous);
      previous = pick.local_page;
      EXPECT_NE(pick.slots, 0u);
      slots += std::popcount(pick.slots);
      pool_->pool->verify(pick.page, pick.epoch, 2, 3);
    }
    EXPECT_EQ(slots, selection.tokens);
    std::vector<std::int32_t> positions;
    index->selected_positions(selection, positions);
    EXPECT_EQ(static_cast<int>(positions.size()), selection.tokens);
    EXPECT_EQ(std::set<std::int32_t>(positions.begin(), positions.end()).size(), positions.size());
    for (const std::int32_t position : positions) {
      EXPECT_GE(position, kFirst);
      EXPECT_LT(position, kFirst + 400);
    }
  }
}

TEST_P(IndexContract, TheWholeIndexIsFullAttention) {
  const Tokens all = tokens(150);
  const std::unique_ptr<SemanticIndex> index = made(all, 100);
  const std::vector<float> q = queries();
  const Answer answer = ask(*index, q, 150);
  ASSERT_EQ(answer.selection.tokens, 150);
  for (int g = 0; g < kGroup; ++g) {
    std::vector<double> logits(150), out(kDim, 0.0);
    double sum = 0.0;
    for (int i = 0; i < 150; ++i) {
      for (int j = 0; j < kDim; ++j) {
        logits[i] += static_cast<double>(q[g * kDim + j]) * all.keys[i * kDim + j];
      }
      sum += std::exp(logits[i]);
      for (int j = 0; j < kDim; ++j) out[j] += std::exp(logits[i]) * all.values[i * kDim + j];
    }
    EXPECT_NEAR(answer.lse[g], std::log(sum), 1e-4);
    for (int j = 0; j < kDim; ++j) EXPECT_NEAR(answer.out[g * kDim + j], out[j] / sum, 1e-4);
  }
}

// Tokens that are not picked count by the mean of their values in each node, with what the node
// weighs; that is near what they weigh.
TEST_P(IndexContract, TheRestIsSeenThroughItsNodes) {
  const Tokens all = tokens(420);
  const std::unique_ptr<SemanticIndex> index = made(all, 300);
  index->truncate(kFirst + 400);
  const double rounding = GetParam().dtype == DType::kFloat32    ? 0.0
                          : GetParam().dtype == DType::kBFloat16 ? 0x1p-8
                                                                 : 0x1p-11;
  for (const int budget : {0, 50, 160, 330}) {
    const std::vector<float> q = queries(budget);
    const Answer answer = ask(*index, q, budget);
    std::vector<FarNodeInfo> nodes;
    index->far_nodes(answer.selection, nodes);
    ASSERT_EQ(nodes.empty(), GetParam().tail == std::string("off"));
    std::vector<std::int32_t> picked;
    index->selected_positions(answer.selection, picked);
    std::vector<std::vector<int>> left(nodes.size());
    std::vector<int> members(nodes.size(), 0);
    for (const PageInfo& page : index->pages()) {
      for (const std::int32_t position : page.positions) {
        if (nodes.empty()) continue;
        ++members[page.node];
        if (!std::binary_search(picked.begin(), picked.end(), position)) {
          left[page.node].push_back(position - kFirst);
        }
      }
    }
    for (int g = 0; g < kGroup; ++g) {
      const auto weight = [&](int token) {
        double logit = 0.0;
        for (int j = 0; j < kDim; ++j) {
          logit += double{q[g * kDim + j]} * all.keys[token * kDim + j];
        }
        return std::exp(logit);
      };
      double total = 0.0, rest = 0.0, exact_rest = 0.0;
      std::vector<double> out(kDim, 0.0), slack(kDim, 0.0);
      for (const std::int32_t position : picked) {
        const double w = weight(position - kFirst);
        total += w;
        for (int j = 0; j < kDim; ++j) out[j] += w * all.values[(position - kFirst) * kDim + j];
      }
      for (std::size_t c = 0; c < nodes.size(); ++c) {
        EXPECT_EQ(nodes[c].tokens, members[c]);
        const double w = std::exp(double{nodes[c].weight[g]}), n = left[c].size();
        if (left[c].empty()) {
          EXPECT_EQ(nodes[c].weight[g], -INFINITY) << "node " << c;
          continue;
        }
        rest += w;
        for (const int token : left[c]) {
          exact_rest += weight(token);
          for (int j = 0; j < kDim; ++j) out[j] += w / n * all.values[token * kDim + j];
        }
        // The mean over all members is rounded, then what is picked is taken out of it.
        for (int j = 0; j < kDim; ++j) slack[j] += w * rounding * members[c] / n;
      }
      total += rest;
      if (total == 0.0) continue;  // nothing picked, no far field
      EXPECT_NEAR(answer.lse[g], std::log(total), 1e-4) << budget;
      for (int j = 0; j < kDim; ++j) {
        EXPECT_NEAR(answer.out[g * kDim + j], out[j] / total, 1e-4 + slack[j] / total) << budget;
      }
      if (exact_rest > 0.0) {
        EXPECT_NEAR(answer.selection.rest_lse[g], std::log(rest), 1e-4) << budget;
        // Sketches of 4 bits; measured: at most 0.19 nats.
        EXPECT_NEAR(std::log(rest), std::log(exact_rest), 0.35) << budget;
      }
    }
  }
}

TEST_P(IndexContract, TheSameCallsGiveBitwiseTheSame) {
  const Tokens all = tokens(420);
  const std::unique_ptr<SemanticIndex> a = made(all, 300), b = made(all, 300);
  for (unsigned seed = 0; seed < 4; ++seed) {
    EXPECT_TRUE(ask(*a, queries(seed), 60) == ask(*b, queries(seed), 60));
  }
}

TEST_P(IndexContract, ForksAreIndependentAndAnswerAlike) {
  const Tokens all = tokens(420);
  Tokens other = tokens(420, 2);
  const std::unique_ptr<SemanticIndex> index = make_index(pool_->context);
  index->build(all.block(0, 300, kFirst), moments(all));
  const std::size_t pages = pool_->pool->used_pages();
  const std::unique_ptr<SemanticIndex> fork = index->fork();
  EXPECT_EQ(pool_->pool->used_pages(), pages) << "a fork takes no pages before a write";
  EXPECT_TRUE(ask(*index, queries(), 60) == ask(*fork, queries(), 60));
  for (int at = 300; at < 420; ++at) {
    index->insert(all.block(at, 1, kFirst + at));
    fork->insert(other.block(at, 1, kFirst + at));
  }
  expect_holds(*index, all, 420);
  std::copy_n(all.raw_keys.data(), 300 * kDim * size_of(all.dtype), other.raw_keys.data());
  std::copy_n(all.raw_values.data(), 300 * kDim * size_of(all.dtype), other.raw_values.data());
  expect_holds(*fork, other, 420);
  index->truncate(kFirst + 10);
  expect_holds(*fork, other, 420);
}

TEST_P(IndexContract, TakesAnyFiniteKeys) {
  const float huge = GetParam().dtype == DType::kFloat16 ? 6e4f : 1e18f;
  for (const float size : {0.0f, 1.0f, huge}) {
    for (const bool equal : {true, false}) {
      Tokens all = tokens(200);
      for (std::size_t i = 0; i < all.keys.size(); ++i) {
        all.keys[i] = equal ? size : size * (i / kDim % 3 == 0 ? 1.0f : -0.5f);
      }
      all.encode();
      const std::unique_ptr<SemanticIndex> index = made(all, 120);
      expect_holds(*index, all, 200);
      const Answer answer = ask(*index, queries(), 60);
      EXPECT_LE(answer.selection.tokens, 60);
      for (const float x : answer.out) EXPECT_TRUE(std::isfinite(x)) << size;
    }
  }
}

TEST_P(IndexContract, RunningOutOfPagesLosesNothing) {
  use_pages(20);
  const Tokens all = tokens(400);
  std::unique_ptr<SemanticIndex> index = make_index(pool_->context);
  EXPECT_THROW(index->build(all.block(0, 400, kFirst), moments(all)), OutOfPages);
  EXPECT_EQ(index->size(), 0);
  EXPECT_EQ(pool_->pool->used_pages(), 0u);

  index = make_index(pool_->context);
  index->build(all.block(0, 40, kFirst), moments(all));
  EXPECT_THROW(index->insert(all.block(40, 360, kFirst + 40)), OutOfPages);
  const int held = index->size();
  EXPECT_GT(held, 40);
  expect_holds(*index, all, held);
  EXPECT_THROW(index->insert(all.block(held, 100, kFirst + held)), OutOfPages);
  EXPECT_LE(ask(*index, queries(), 24).selection.tokens, 24);
  index->truncate(kFirst + 20);
  for (int at = 20; at < 30; ++at) index->insert(all.block(at, 1, kFirst + at));
  expect_holds(*index, all, 30);
}

INSTANTIATE_TEST_SUITE_P(All, IndexContract, ::testing::ValuesIn(variants()), variant_name);

}  // namespace
}  // namespace icecache

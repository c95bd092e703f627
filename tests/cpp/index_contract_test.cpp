// What every SemanticIndex promises (icecache/semantic_index.h), for every index, unit of picking,
// far field and dtype.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <set>

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
    moments.reset(kDim);
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
      return out == other.out && lse == other.lse &&
             selection.rest_lse == other.selection.rest_lse &&
             selection.tokens == other.selection.tokens &&
             std::equal(selection.picks.begin(), selection.picks.end(),
                        other.selection.picks.begin(), other.selection.picks.end(),
                        [](const PagePick& a, const PagePick& b) {
                          return a.local_page == b.local_page && a.slots == b.slots;
                        });
    }
  };

  Answer ask(const SemanticIndex& index, const std::vector<float>& queries, int budget) {
    const std::vector<float> near(kGroup, -INFINITY);
    SelectRequest request;
    request.queries = queries.data();
    request.group = kGroup;
    request.near_lse = near.data();
    request.budget = request.max_budget = budget;
    Answer answer;
    index.select(request, answer.selection);
    answer.out.resize(kGroup * kDim);
    std::vector<float> max(kGroup), sum(kGroup);
    const AttentionState state{answer.out.data(), max.data(), sum.data(), kGroup, kDim};
    state.clear();
    for (const PagePick& pick : answer.selection.picks) {
      const std::byte* page = pool_->pool->data(pick.page);
      simd::kernels().attend_page(
          {queries.data(), page, page + kPageSize * kDim * size_of(GetParam().dtype),
           GetParam().dtype, kGroup, kDim, kPageSize, pick.slots},
          state);
    }
    index.far_field(request, answer.selection, state, nullptr);
    for (int g = 0; g < kGroup; ++g) answer.lse.push_back(state.lse(g));
    finish(state, answer.out.data());
    return answer;
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

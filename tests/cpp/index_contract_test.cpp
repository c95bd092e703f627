// What every index promises of its tokens: none is lost, forks are apart, the same calls
// give the same. What it answers is in index_selection_test.cpp.
#include "index_contract.h"

#include "icecache/error.h"

namespace icecache::testing::index_contract_test {
namespace {

TEST_P(IndexContract, EveryTokenIsHeldOnceThroughBuildInsertAndTruncate) {
  const Tokens all = tokens(420);
  std::unique_ptr<Held> index = made(all, 300);
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

TEST_P(IndexContract, TheSameCallsGiveBitwiseTheSame) {
  const Tokens all = tokens(420);
  const std::unique_ptr<Held> a = made(all, 300), b = made(all, 300);
  for (unsigned seed = 0; seed < 4; ++seed) {
    EXPECT_TRUE(ask(*a, queries(seed), 60) == ask(*b, queries(seed), 60));
  }
}

TEST_P(IndexContract, ForksAreIndependentAndAnswerAlike) {
  const Tokens all = tokens(420);
  Tokens other = tokens(420, 2);
  const std::unique_ptr<Held> index = std::make_unique<Held>(pool_->context);
  index->build(all.block(0, 300, kFirst), moments(all));
  const std::size_t pages = pool_->pool->used_pages();
  const std::unique_ptr<Held> fork = std::make_unique<Held>(*index);
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
      const std::unique_ptr<Held> index = made(all, 120);
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
  std::unique_ptr<Held> index = std::make_unique<Held>(pool_->context);
  EXPECT_THROW(index->build(all.block(0, 400, kFirst), moments(all)), OutOfPages);
  EXPECT_EQ(index->size(), 0);
  EXPECT_EQ(pool_->pool->used_pages(), 0u);

  index = std::make_unique<Held>(pool_->context);
  index->build(all.block(0, 40, kFirst), moments(all));
  EXPECT_THROW(index->insert(all.block(40, 360, kFirst + 40)), OutOfPages);
  const int held = index->size();
  EXPECT_GE(held, 40);
  expect_holds(*index, all, held);
  EXPECT_THROW(index->insert(all.block(held, 200, kFirst + held)), OutOfPages);
  EXPECT_LE(ask(*index, queries(), 24).selection.tokens, 24);
  index->truncate(kFirst + 20);
  for (int at = 20; at < 30; ++at) index->insert(all.block(at, 1, kFirst + at));
  expect_holds(*index, all, 30);
}

INSTANTIATE_TEST_SUITE_P(All, IndexContract, ::testing::ValuesIn(variants()), variant_name);

}  // namespace
}  // namespace icecache::testing::index_contract_test

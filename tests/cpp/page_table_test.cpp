#include "pages/page_table.h"

#include <gtest/gtest.h>

#include <cstring>

#include "icecache/error.h"
#include "pool_fixture.h"

namespace icecache::page_table_test {
namespace {

using testing::clustered_tokens;
using testing::PoolFixture;
using testing::Tokens;

constexpr int kDim = 16, kPageSize = 8;

class PageTableTest : public ::testing::Test {
 protected:
  // The rows of a token as they were given.
  void expect_token(const PageTable& table, int page, int slot, int token) {
    EXPECT_EQ(table.position(page, slot), 10 + token);
    EXPECT_EQ(std::memcmp(table.key(page, slot), tokens_.keys.data() + token * kDim, kDim * 4), 0);
    EXPECT_EQ(std::memcmp(table.value(page, slot), tokens_.values.data() + token * kDim, kDim * 4),
              0);
  }
  int open(PageTable& table, int token) {
    const TokenBlock block = tokens_.block(token, 1, 10 + token);
    return table.open(block.keys, block.values, block.first_position);
  }
  int append(PageTable& table, int page, int token) {
    const TokenBlock block = tokens_.block(token, 1, 10 + token);
    return table.append(page, block.keys, block.values, block.first_position);
  }

  Tokens tokens_ = clustered_tokens(64, kDim, DType::kFloat32, 1);
  PoolFixture pool_{6, kPageSize, kDim};
};

TEST_F(PageTableTest, PagesTakeTheRowsOfAnArrangement) {
  PageTable table(pool_.context);
  const std::vector<std::int32_t> order{3, 1, 0, 2, 4}, bounds{0, 2, 5};
  table.add_pages(tokens_.block(0, 5, 10), order, bounds);
  ASSERT_EQ(table.page_count(), 2);
  EXPECT_EQ(table.size(), 5);
  EXPECT_EQ(table.mask(0), 0b11u);
  EXPECT_EQ(table.mask(1), 0b111u);
  expect_token(table, 0, 0, 3);
  expect_token(table, 0, 1, 1);
  expect_token(table, 1, 2, 4);
  table.check_integrity();
}

TEST_F(PageTableTest, AnArrangementThatDoesNotFitChangesNothing) {
  PageTable table(pool_.context);
  const std::vector<std::int32_t> order{0, 1, 2, 3, 4, 5, 6}, bounds{0, 1, 2, 3, 4, 5, 6, 7};
  EXPECT_THROW(table.add_pages(tokens_.block(0, 7, 10), order, bounds), OutOfPages);
  EXPECT_EQ(table.page_count(), 0);
  EXPECT_EQ(pool_.pool->used_pages(), 0u);
}

TEST_F(PageTableTest, AppendFillsTheFirstFreeSlot) {
  PageTable table(pool_.context);
  const int page = open(table, 0);
  for (int token = 1; token < kPageSize; ++token) EXPECT_EQ(append(table, page, token), token);
  EXPECT_TRUE(table.full(page));
  table.remove(page, 0b0010'0100u);
  EXPECT_EQ(append(table, page, 20), 2);
  EXPECT_EQ(append(table, page, 21), 5);
  expect_token(table, page, 5, 21);
  expect_token(table, page, 7, 7);
  table.check_integrity();
}

TEST_F(PageTableTest, SplitMovesTheMaskAndLeavesTheOthersInPlace) {
  PageTable table(pool_.context);
  const int page = open(table, 0);
  for (int token = 1; token < kPageSize; ++token) append(table, page, token);
  const int other = table.split(page, 0b1010'0001u);
  EXPECT_EQ(table.mask(page), 0b0101'1110u);
  EXPECT_EQ(table.mask(other), 0b111u);
  expect_token(table, page, 6, 6);
  expect_token(table, other, 0, 0);
  expect_token(table, other, 1, 5);
  expect_token(table, other, 2, 7);
  EXPECT_EQ(table.size(), kPageSize);
  table.check_integrity();
}

TEST_F(PageTableTest, AnEmptyPageIsDroppedAndItsNumberUsedAgain) {
  PageTable table(pool_.context);
  const int first = open(table, 0), second = open(table, 1);
  table.remove(first, 1u);
  EXPECT_FALSE(table.in_use(first));
  EXPECT_EQ(pool_.pool->used_pages(), 1u);
  EXPECT_EQ(open(table, 2), first);
  expect_token(table, second, 0, 1);
  table.check_integrity();
}

TEST_F(PageTableTest, CopiesSharePagesUntilOneSideWrites) {
  PageTable table(pool_.context);
  const int page = open(table, 0);
  append(table, page, 1);
  PageTable copy(table);
  EXPECT_EQ(pool_.pool->used_pages(), 1u);
  table.remove(page, 1u);  // clears a bit of its own mask, not of the shared page
  EXPECT_EQ(pool_.pool->used_pages(), 1u);
  expect_token(copy, page, 0, 0);
  append(table, page, 2);
  EXPECT_EQ(pool_.pool->used_pages(), 2u);
  expect_token(table, page, 0, 2);
  expect_token(copy, page, 0, 0);
  copy.check_integrity();
}

TEST_F(PageTableTest, WritesWithoutARoomOfTheirOwnChangeNothing) {
  PageTable table(pool_.context);
  for (int token = 0; token < 6; ++token) open(table, token);
  EXPECT_THROW(open(table, 6), OutOfPages);
  const PageTable copy(table);
  EXPECT_THROW(append(table, 0, 7), OutOfPages) << "the shared page cannot be copied";
  EXPECT_EQ(table.size(), 6);
  expect_token(table, 0, 0, 0);
  table.check_integrity();
  for (int token = 6; token < 13; ++token) {
    EXPECT_THROW(append(table, 0, token), OutOfPages);
  }
}

TEST_F(PageTableTest, GatherIsInOrderOfPosition) {
  PageTable table(pool_.context);
  const std::vector<std::int32_t> order{4, 0, 2, 1, 3}, bounds{0, 3, 5};
  table.add_pages(tokens_.block(0, 5, 10), order, bounds);
  std::vector<float> keys(5 * kDim), values(5 * kDim);
  table.gather(reinterpret_cast<std::byte*>(keys.data()),
               reinterpret_cast<std::byte*>(values.data()));
  EXPECT_TRUE(std::equal(keys.begin(), keys.end(), tokens_.keys.begin()));
  EXPECT_TRUE(std::equal(values.begin(), values.end(), tokens_.values.begin()));
}

TEST_F(PageTableTest, PicksCarryTheEpochOfTheContent) {
  PageTable table(pool_.context);
  const int page = open(table, 0);
  const PagePick before = table.pick(page, 1u);
  pool_.pool->verify(before.page, before.epoch, 2, 3);
  append(table, page, 1);
  EXPECT_THROW(pool_.pool->verify(before.page, before.epoch, 2, 3), IntegrityError);
  const PagePick after = table.pick(page, 3u);
  pool_.pool->verify(after.page, after.epoch, 2, 3);
}

}  // namespace
}  // namespace icecache::page_table_test

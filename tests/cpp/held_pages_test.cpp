#include "pages/held_pages.h"

#include <gtest/gtest.h>

#include "pool_fixture.h"

namespace icecache::held_pages_test {
namespace {

struct Named {
  PageId id = kNoPage;
  int name = 0;
};

class HeldPagesTest : public ::testing::Test {
 protected:
  // A list of `count` pages named from 0.
  HeldPages<Named> pages(int count) {
    HeldPages<Named> list(*pool_.pool);
    list.reserve(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) list.add({pool_.pool->allocate({}), i});
    return list;
  }
  std::size_t used() const { return pool_.pool->used_pages(); }

  testing::PoolFixture pool_{8, 8, 8};
};

TEST_F(HeldPagesTest, GivesItsPagesBackInTheEnd) {
  {
    const HeldPages<Named> list = pages(3);
    EXPECT_EQ(list.size(), 3u);
    EXPECT_EQ(used(), 3u);
  }
  EXPECT_EQ(used(), 0u);
}

TEST_F(HeldPagesTest, CopiesShareAndMovesDoNot) {
  HeldPages<Named> list = pages(2);
  HeldPages<Named> copy = list;
  EXPECT_EQ(used(), 2u);
  EXPECT_FALSE(pool_.pool->unique(list[0].id));
  const HeldPages<Named> moved = std::move(copy);
  list = HeldPages<Named>();
  EXPECT_EQ(used(), 2u);
  EXPECT_TRUE(pool_.pool->unique(moved[0].id));
  EXPECT_EQ(moved.back().name, 1);
}

TEST_F(HeldPagesTest, LetsGoOfWhatIsReplacedAndTakenOff) {
  HeldPages<Named> list = pages(4);
  list.replace(1, {});
  EXPECT_EQ(used(), 3u);
  list.pop_front(2);  // of which one is no page
  EXPECT_EQ(used(), 2u);
  EXPECT_EQ(list[0].name, 2);
  list.pop_back();
  EXPECT_EQ(used(), 1u);
  list.replace(0, {pool_.pool->allocate({}), 9});
  EXPECT_EQ(used(), 1u);
  EXPECT_EQ(list[0].name, 9);
}

TEST_F(HeldPagesTest, TakesOverAndSharesPagesOfAnother) {
  HeldPages<Named> list = pages(1), other = pages(2);
  list.reserve(4);
  list.share(other[1]);
  EXPECT_EQ(used(), 3u);
  list.append(std::move(other));
  other = HeldPages<Named>();
  EXPECT_EQ(list.size(), 4u);
  EXPECT_EQ(used(), 3u);
}

}  // namespace
}  // namespace icecache::held_pages_test

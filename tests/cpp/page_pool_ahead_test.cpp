// PagePool::take_ahead(): memory that is there before it is needed.
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "pages/page_pool.h"

namespace icecache::page_pool_ahead_test {
namespace {

constexpr PageOwner kOwner{7, 3, 1};

TEST(PagePool, MemoryIsTakenAheadUpToTheCapacity) {
  PagePool::Options options;
  options.poison_freed = true;
  options.page_bytes = 1 << 20;  // eight of them in a slab
  options.capacity_bytes = 20 * options.page_bytes;
  PagePool pool(options);
  EXPECT_FALSE(pool.take_ahead(0));
  EXPECT_EQ(pool.allocated_bytes(), 0u);
  EXPECT_TRUE(pool.take_ahead(1));
  EXPECT_FALSE(pool.take_ahead(8));
  const PageId page = pool.allocate(kOwner);
  EXPECT_EQ(pool.allocated_bytes(), 8 * options.page_bytes);
  EXPECT_TRUE(pool.take_ahead(8));
  EXPECT_TRUE(pool.take_ahead(100));
  EXPECT_FALSE(pool.take_ahead(100));  // all 20 are there
  EXPECT_EQ(pool.allocated_bytes(), options.capacity_bytes);
  EXPECT_EQ(pool.used_pages(), 1u);
  pool.release(page);
  pool.check_integrity();
}

TEST(PagePool, MemoryIsTakenAheadBesideThoseWhoNeedIt) {
  PagePool::Options options;
  options.poison_freed = true;
  options.page_bytes = 64 << 10;
  options.capacity_bytes = 1000 * options.page_bytes;
  PagePool pool(options);
  std::vector<std::thread> threads;
  std::vector<std::vector<PageId>> pages(3);
  for (std::vector<PageId>& mine : pages) {
    threads.emplace_back([&] {
      for (int i = 0; i < 30; ++i) pool.allocate(11, kOwner, mine);
      while (pool.take_ahead(600)) {
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.used_pages(), 3u * 30 * 11);
  pool.check_integrity();
  for (const std::vector<PageId>& mine : pages) {
    for (const PageId page : mine) pool.release(page);
  }
  pool.check_integrity();
}

}  // namespace
}  // namespace icecache::page_pool_ahead_test

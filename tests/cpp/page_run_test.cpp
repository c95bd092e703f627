#include "pages/page_run.h"

#include <gtest/gtest.h>

#include <memory>
#include <numeric>

#include "icecache/error.h"
#include "pool_fixture.h"

namespace icecache::page_run_test {
namespace {

constexpr int kDim = 8, kPage = 8;

// Tokens whose rows hold their own number: key n, value n + 0.5.
class PageRunTest : public ::testing::Test {
 protected:
  explicit PageRunTest(std::size_t pages = 12) : pool_(pages, kPage, kDim) {}

  void append(PageRun& run, int first, int count) {
    std::vector<float> keys(count * kDim), values(count * kDim);
    for (int i = 0; i < count * kDim; ++i) {
      keys[i] = static_cast<float>(first + i / kDim);
      values[i] = keys[i] + 0.5f;
    }
    const auto view = [&](std::vector<float>& rows) {
      return TensorView{rows.data(), DType::kFloat32, 1, count, kDim, count * kDim, kDim};
    };
    run.append(view(keys), view(values), 0, 0, count);
  }

  void expect_tokens(const PageRun& run, int first, int count) {
    ASSERT_EQ(run.first_position(), first);
    ASSERT_EQ(run.count(), count);
    ASSERT_EQ(run.end_position(), first + count);
    run.check_integrity();
    std::vector<float> keys(count * kDim), values(count * kDim);
    run.gather(count, reinterpret_cast<std::byte*>(keys.data()),
               reinterpret_cast<std::byte*>(values.data()));
    for (int i = 0; i < count * kDim; ++i) {
      ASSERT_EQ(keys[i], static_cast<float>(first + i / kDim));
      ASSERT_EQ(values[i], keys[i] + 0.5f);
    }
    std::vector<PagePick> picks;
    run.picks(0, run.end_position(), picks);
    int picked = 0;
    for (const PagePick& pick : picks) {
      const auto* page = reinterpret_cast<const float*>(pool_.pool->data(pick.page));
      for (int s = 0; s < kPage; ++s) {
        if ((pick.slots >> s & 1u) == 0) continue;
        ASSERT_EQ(page[s * kDim], static_cast<float>(run.page_position(pick.local_page) + s));
        ++picked;
      }
    }
    ASSERT_EQ(picked, count);
  }

  testing::PoolFixture pool_;
};

TEST_F(PageRunTest, AppendsAcrossPages) {
  PageRun run(pool_.context, 5);
  expect_tokens(run, 5, 0);
  int next = 5;
  for (int count : {1, 7, 8, 9, 3, 0}) {
    EXPECT_GE(run.pages_for(count) + run.page_count(),
              static_cast<std::size_t>((run.count() + count + kPage - 1) / kPage));
    append(run, next, count);
    next += count;
    expect_tokens(run, 5, next - 5);
  }
  EXPECT_EQ(pool_.pool->used_pages(), 4u);
}

TEST_F(PageRunTest, DropsFromTheFrontAndGivesPagesBack) {
  PageRun run(pool_.context, 0);
  append(run, 0, 20);
  run.pop_front(3);
  expect_tokens(run, 3, 17);
  EXPECT_EQ(pool_.pool->used_pages(), 3u);
  run.pop_front(6);  // position 9: the first page is empty
  expect_tokens(run, 9, 11);
  EXPECT_EQ(pool_.pool->used_pages(), 2u);
  append(run, 20, 5);
  expect_tokens(run, 9, 16);
  run.pop_front(100);
  expect_tokens(run, 25, 0);
  EXPECT_EQ(pool_.pool->used_pages(), 0u);
  append(run, 25, 2);
  expect_tokens(run, 25, 2);
}

TEST_F(PageRunTest, TruncatesAndRestarts) {
  PageRun run(pool_.context, 4);
  append(run, 4, 20);
  run.pop_front(2);
  run.truncate(30);
  expect_tokens(run, 6, 18);
  run.truncate(17);
  expect_tokens(run, 6, 11);
  append(run, 17, 4);
  expect_tokens(run, 6, 15);
  run.truncate(2);  // in front of the run
  expect_tokens(run, 2, 0);
  EXPECT_EQ(pool_.pool->used_pages(), 0u);
}

TEST_F(PageRunTest, CopiesShareUntilOneSideWrites) {
  PageRun run(pool_.context, 0);
  append(run, 0, 12);
  PageRun copy(run);
  EXPECT_EQ(pool_.pool->used_pages(), 2u);
  append(copy, 12, 2);  // the half-full page is copied, the full one stays shared
  EXPECT_EQ(pool_.pool->used_pages(), 3u);
  run.truncate(10);
  append(run, 10, 6);
  expect_tokens(run, 0, 16);
  expect_tokens(copy, 0, 14);
  copy = run;
  expect_tokens(copy, 0, 16);
  EXPECT_EQ(pool_.pool->used_pages(), 2u);
}

TEST_F(PageRunTest, RunningOutOfPagesChangesNothing) {
  PageRun run(pool_.context, 0);
  append(run, 0, 90);
  EXPECT_THROW(append(run, 90, 8), OutOfPages);
  expect_tokens(run, 0, 90);
  PageRun copy(run);
  EXPECT_EQ(pool_.pool->free_pages(), 0u);
  EXPECT_THROW(append(copy, 90, 1), OutOfPages);  // would have to copy the shared page
  expect_tokens(copy, 0, 90);
  expect_tokens(run, 0, 90);
  copy.truncate(0);
  append(run, 90, 6);
  expect_tokens(run, 0, 96);
}

}  // namespace
}  // namespace icecache::page_run_test

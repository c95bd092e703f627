// Loops on threads that the host program lends.
#include "icecache/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "threads/thread_pool.h"

namespace icecache::parallel_test {
namespace {

std::atomic<int> lent{0};  // most bodies that one loop asked for

void on_threads(std::int64_t count, void (*body)(std::int64_t, void*), void* context) {
  lent = std::max(lent.load(), static_cast<int>(count));
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < count; ++i) threads.emplace_back(body, i, context);
  for (std::thread& thread : threads) thread.join();
}
void one_after_the_other(std::int64_t count, void (*body)(std::int64_t, void*), void* context) {
  for (std::int64_t i = 0; i < count; ++i) body(i, context);
}
void not_at_all(std::int64_t, void (*)(std::int64_t, void*), void*) {
  throw std::runtime_error("no threads today");
}

class LentThreads : public ::testing::TestWithParam<icecache::ParallelFor> {
 protected:
  void SetUp() override { use_parallel_for(GetParam()); }
  void TearDown() override { use_parallel_for(nullptr); }
};
INSTANTIATE_TEST_SUITE_P(Hosts, LentThreads,
                         ::testing::Values(on_threads, one_after_the_other, not_at_all));

TEST_P(LentThreads, EveryItemRunsOnce) {
  ThreadPool pool(3, 0);
  for (const int count : {0, 1, 2, 5, 100}) {
    std::vector<std::atomic<int>> runs(count);
    pool.parallel_for(count, [&](std::int64_t i, int thread) {
      EXPECT_GE(thread, 0);
      EXPECT_LT(thread, 3);
      ++runs[i];
    });
    for (const std::atomic<int>& n : runs) EXPECT_EQ(n, 1);
  }
}

TEST_P(LentThreads, TheLowestItemThatThrewIsRethrownAfterAllRan) {
  ThreadPool pool(4, 0);
  std::atomic<int> runs{0};
  try {
    pool.parallel_for(50, [&](std::int64_t i, int) {
      ++runs;
      if (i % 10 == 7) throw std::runtime_error(std::to_string(i));
    });
    FAIL() << "nothing was thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "7");
  }
  EXPECT_EQ(runs, 50);
}

TEST_P(LentThreads, NestedLoopsRunOnTheThreadOfTheirBody) {
  ThreadPool pool(2, 0);
  std::atomic<int> runs{0};
  pool.parallel_for(4, [&](std::int64_t, int) {
    const std::thread::id here = std::this_thread::get_id();
    pool.parallel_for(3, [&](std::int64_t, int) {
      EXPECT_EQ(std::this_thread::get_id(), here);
      ++runs;
    });
  });
  EXPECT_EQ(runs, 12);
}

TEST(LentThreadsBound, NumThreadsBoundsWhatIsAskedFor) {
  use_parallel_for(on_threads);
  lent = 0;
  ThreadPool(3, 0).parallel_for(100, [](std::int64_t, int) {});
  EXPECT_EQ(lent, 3);
  lent = 0;
  ThreadPool(1, 0).parallel_for(100, [](std::int64_t, int) {});
  EXPECT_EQ(lent, 0) << "one thread needs no help";
  use_parallel_for(nullptr);
}

}  // namespace
}  // namespace icecache::parallel_test

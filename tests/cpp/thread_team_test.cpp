#include "threads/thread_team.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "threads/thread_pool.h"

namespace icecache::thread_team_test {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Loops of a ThreadPool, which its team runs.

class ParallelFor : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, ParallelFor, ::testing::Values(1, 2, 3, 8));

TEST_P(ParallelFor, RunsEveryItemOnceForAnyCount) {
  ThreadPool pool(GetParam(), 0);
  EXPECT_EQ(pool.num_threads(), GetParam());
  for (const int count : {0, 1, 2, 3, 7, 10, 100, 1000}) {
    std::vector<std::atomic<int>> runs(count);
    pool.parallel_for(count, [&](std::int64_t i, int) { ++runs[i]; });
    for (const auto& n : runs) ASSERT_EQ(n, 1);
  }
}

TEST_P(ParallelFor, WritesOfTheItemsAreSeenByTheCaller) {
  ThreadPool pool(GetParam(), 0);
  std::vector<int> plain(16);
  for (int round = 1; round <= 2000; ++round) {
    pool.parallel_for(16, [&](std::int64_t i, int) { plain[i] += static_cast<int>(i); });
    ASSERT_EQ(plain[15], 15 * round);
  }
}

TEST_P(ParallelFor, OneThreadAtATimeUsesAnIndex) {
  ThreadPool pool(GetParam(), 0);
  std::vector<int> busy(GetParam());  // not atomic: TSan would tell of two threads
  for (int round = 0; round < 200; ++round) {
    pool.parallel_for(20, [&](std::int64_t, int thread) {
      ASSERT_GE(thread, 0);
      ASSERT_LT(thread, pool.num_threads());
      ASSERT_EQ(busy[thread]++, 0);
      --busy[thread];
    });
  }
}

TEST_P(ParallelFor, NegativeCountsRunNothing) {
  ThreadPool pool(GetParam(), 0);
  pool.parallel_for(-1, [](std::int64_t, int) { FAIL(); });
}

TEST_P(ParallelFor, RunsAllItemsAndRethrowsTheLowestThatThrew) {
  ThreadPool pool(GetParam(), 0);
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> runs{0};
    try {
      pool.parallel_for(30, [&](std::int64_t i, int) {
        ++runs;
        if (i % 7 == 5) throw std::runtime_error(std::to_string(i));
      });
      FAIL();
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "5");
    }
    EXPECT_EQ(runs, 30);
    pool.parallel_for(3, [](std::int64_t, int) {});  // the pool goes on
  }
}

TEST_P(ParallelFor, NestedLoopsRunOnTheThreadOfTheirBody) {
  ThreadPool pool(GetParam(), 0);
  std::atomic<int> runs{0};
  pool.parallel_for(8, [&](std::int64_t, int outer) {
    pool.parallel_for(5, [&](std::int64_t, int inner) {
      EXPECT_EQ(inner, outer);
      ++runs;
    });
  });
  EXPECT_EQ(runs, 40);
}

TEST_P(ParallelFor, LoopsOfManyCallersFollowOneAnother) {
  ThreadPool pool(GetParam(), 0);
  std::int64_t total = 0;  // not atomic: guarded by the loops' order
  std::atomic<int> inside{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 300; ++round) {
        pool.parallel_for(4, [&](std::int64_t i, int) {
          if (i == 0) {
            EXPECT_EQ(inside.fetch_add(1), 0);
            ++total;
            inside.fetch_sub(1);
          }
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 900);
}

TEST(ParallelForHelpers, TakePartAfterTheyHaveSlept) {
  ThreadPool pool(4, 0);
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(milliseconds(5));
    std::mutex mutex;
    std::set<int> threads;
    std::condition_variable changed;
    pool.parallel_for(4, [&](std::int64_t, int thread) {
      std::unique_lock lock(mutex);
      threads.insert(thread);
      changed.notify_all();
      EXPECT_TRUE(
          changed.wait_for(lock, std::chrono::seconds(20), [&] { return threads.size() == 4; }));
    });
  }
}

TEST(ParallelForHelpers, CostLessThanTenMicrosecondsForTenSmallItems) {
  ThreadPool pool(2, 1);
  std::atomic<std::int64_t> sum{0};
  auto best = std::chrono::nanoseconds::max();
  for (int batch = 0; batch < 100; ++batch) {
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < 20; ++round) {
      pool.parallel_for(10, [&](std::int64_t i, int) { sum += i; });
    }
    best = std::min<std::chrono::nanoseconds>(best, std::chrono::steady_clock::now() - start);
  }
  EXPECT_EQ(sum, 100 * 20 * 45);
  EXPECT_LT(best / 20, microseconds(10)) << "the best of 100 batches, so that load does not count";
}

}  // namespace
}  // namespace icecache::thread_team_test

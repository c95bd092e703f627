#include "threads/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "icecache/error.h"

namespace icecache::thread_pool_test {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// A door that threads wait at until it is opened.
class Gate {
 public:
  void open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  // False where it stays closed for 20 seconds: a test fails in place of hanging.
  bool pass() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

TEST(ThreadPool, RefusesImpossibleThreadCounts) {
  EXPECT_THROW(ThreadPool(0, 0), InvalidArgument);
  EXPECT_THROW(ThreadPool(1, -1), InvalidArgument);
}

// ---- parallel_for

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

// ---- Background jobs

class Background : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Workers, Background, ::testing::Values(0, 1, 4));

TEST_P(Background, WaitReturnsWhenAllJobsOfTheGroupAreDone) {
  ThreadPool pool(1, GetParam());
  JobGroup group;
  EXPECT_TRUE(group.done());
  std::vector<int> plain(50);
  for (int i = 0; i < 50; ++i) pool.submit(group, [&plain, i] { plain[i] = i; });
  const JobGroup copy = group;
  pool.wait(group);
  EXPECT_TRUE(copy.done());
  EXPECT_TRUE(group.done());
  for (int i = 0; i < 50; ++i) EXPECT_EQ(plain[i], i);
  pool.wait(group);  // an empty group
}

TEST_P(Background, GroupsAreWaitedForApart) {
  ThreadPool pool(1, GetParam());
  Gate gate;
  JobGroup slow, quick;
  std::atomic<bool> passed{false};
  if (GetParam() > 1) pool.submit(slow, [&] { passed = gate.pass(); });
  pool.submit(quick, [] {});
  pool.wait(quick);
  gate.open();
  pool.wait(slow);
  EXPECT_EQ(passed, GetParam() > 1);
}

TEST_P(Background, FirstExceptionIsRethrownOnceByWait) {
  ThreadPool pool(1, GetParam());
  for (int round = 0; round < 20; ++round) {
    JobGroup group;
    std::atomic<int> runs{0};
    for (int i = 0; i < 10; ++i) {
      pool.submit(group, [&runs, i] {
        ++runs;
        if (i >= 4) throw std::runtime_error(std::to_string(i));
      });
    }
    try {
      pool.wait(group);
      FAIL();
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "4");
    }
    EXPECT_EQ(runs, 10);
    EXPECT_NO_THROW(pool.wait(group));
  }
}

TEST_P(Background, DestructionDropsJobsThatHaveNotStarted) {
  std::atomic<int> started{0}, ended{0};
  const auto captured = std::make_shared<int>(1);
  JobGroup group;
  {
    ThreadPool pool(1, GetParam());
    for (int i = 0; i < 20; ++i) {
      pool.submit(group, [&, captured] {
        ++started;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        ++ended;
      });
    }
  }
  EXPECT_LT(started, 20);
  EXPECT_EQ(ended, started);  // those that ran were waited for
  EXPECT_EQ(captured.use_count(), 1);
}

TEST_P(Background, WhatAJobCapturedIsGoneWhenItIsDone) {
  ThreadPool pool(1, GetParam());
  for (int round = 0; round < 50; ++round) {
    auto captured = std::make_shared<int>(1);
    JobGroup group;
    pool.submit(group, [captured] {});
    pool.wait(group);
    ASSERT_EQ(captured.use_count(), 1);
  }
}

TEST_P(Background, JobsMaySubmitToTheirOwnGroup) {
  ThreadPool pool(1, GetParam());
  std::atomic<int> runs{0};
  JobGroup group;
  pool.submit(group, [&] { ++runs; });
  JobGroup own = group;
  pool.submit(group, [&] {
    ++runs;
    pool.submit(own, [&] { ++runs; });
  });
  pool.wait(group);
  EXPECT_EQ(runs, 3);
}

TEST(BackgroundOrder, JobsStartInTheOrderOfSubmission) {
  ThreadPool pool(1, 1);
  std::vector<int> order;
  JobGroup group;
  Gate gate;
  pool.submit(group, [&] { gate.pass(); });
  std::vector<JobGroup> groups(10);
  for (int i = 0; i < 10; ++i) pool.submit(groups[i], [&order, i] { order.push_back(i); });
  gate.open();
  pool.wait(group);
  while (!groups[9].done()) std::this_thread::yield();
  for (int i = 0; i < 10; ++i) EXPECT_EQ(order[i], i);
}

TEST(BackgroundOrder, WaitRunsJobsThatHaveNotStarted) {
  ThreadPool pool(1, 1);
  Gate gate;
  JobGroup blocking, own;
  pool.submit(blocking, [&] { EXPECT_TRUE(gate.pass()); });
  std::thread::id ran_on;
  pool.submit(own, [&] { ran_on = std::this_thread::get_id(); });
  pool.wait(own);
  EXPECT_EQ(ran_on, std::this_thread::get_id());
  gate.open();
  pool.wait(blocking);
}

TEST(BackgroundOrder, LoopsDoNotWaitForBackgroundJobs) {
  ThreadPool pool(2, 1);
  Gate gate;
  JobGroup group;
  for (int i = 0; i < 5; ++i) pool.submit(group, [&] { EXPECT_TRUE(gate.pass()); });
  std::atomic<int> runs{0};
  pool.parallel_for(10, [&](std::int64_t, int) { ++runs; });
  EXPECT_EQ(runs, 10);
  EXPECT_FALSE(group.done());
  gate.open();
  pool.wait(group);
}

TEST(BackgroundOrder, ManyThreadsSubmitAndWait) {
  ThreadPool pool(2, 2);
  std::vector<std::thread> threads;
  std::atomic<int> runs{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < 100; ++round) {
        JobGroup group;
        int mine = 0;
        pool.submit(group, [&mine] { ++mine; });
        pool.submit(group, [&runs] { ++runs; });
        pool.parallel_for(3, [&](std::int64_t, int) { ++runs; });
        pool.wait(group);
        EXPECT_EQ(mine, 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(runs, 4 * 100 * 4);
}

TEST(ThreadPool, DestructionDropsWhatHasNotStartedAndWaitsForTheRest) {
  Gate started, gate;
  std::atomic<int> ended{0};
  auto pool = std::make_unique<ThreadPool>(1, 1);
  JobGroup group;
  pool->submit(group, [&] {
    started.open();
    EXPECT_TRUE(gate.pass());
    ++ended;
  });
  for (int i = 0; i < 100; ++i) pool->submit(group, [&] { ended += 1000; });
  ASSERT_TRUE(started.pass());
  std::thread opener([&] {
    std::this_thread::sleep_for(milliseconds(20));  // the destructor has dropped the others
    gate.open();
  });
  pool.reset();
  EXPECT_EQ(ended, 1);
  opener.join();
}

// ---- fork()

// The exit status of `child` run in a forked process; -1 where it did not exit by itself in time.
template <typename Child>
int status_of_fork(const Child& child) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    _exit(child());
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(ThreadPoolFork, TheChildRunsEverythingOnItsOwnThread) {
  ThreadPool pool(3, 2);
  pool.parallel_for(10, [](std::int64_t, int) {});
  const int status = status_of_fork([&] {
    int runs = 0;
    pool.parallel_for(10, [&](std::int64_t, int thread) { runs += thread == 0; });
    JobGroup group;
    pool.submit(group, [&] { ++runs; });
    pool.wait(group);
    return runs;
  });
  EXPECT_EQ(status, 11);
  int runs = 0;
  JobGroup group;
  pool.submit(group, [&] { ++runs; });
  pool.wait(group);
  EXPECT_EQ(runs, 1) << "the parent goes on";
}

TEST(ThreadPoolFork, TheChildMayDestroyThePool) {
  auto pool = std::make_unique<ThreadPool>(3, 2);
  std::this_thread::sleep_for(milliseconds(5));  // the helpers sleep on their condition
  const int status = status_of_fork([&] {
    pool.reset();
    return 7;
  });
  EXPECT_EQ(status, 7);
}

TEST(ThreadPoolFork, JobsThatRanAtTheForkFailInTheChildAndEndInTheParent) {
  ThreadPool pool(1, 1);
  Gate started, gate;
  JobGroup running, waiting;
  pool.submit(running, [&] {
    started.open();
    EXPECT_TRUE(gate.pass());
  });
  int waited = 0;
  pool.submit(waiting, [&] { ++waited; });
  ASSERT_TRUE(started.pass());
  const int status = status_of_fork([&] {
    pool.wait(waiting);
    try {
      pool.wait(running);
    } catch (const Error& error) {
      return waited + 1;
    }
    return 0;
  });
  EXPECT_EQ(status, 2);
  gate.open();
  EXPECT_NO_THROW(pool.wait(running));
  pool.wait(waiting);
  EXPECT_EQ(waited, 1);
}

TEST(ThreadPoolFork, ForksWhileOtherThreadsUseThePool) {
  ThreadPool pool(2, 1);
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) {
      JobGroup group;
      pool.submit(group, [] {});
      pool.parallel_for(4, [](std::int64_t, int) {});
      pool.wait(group);
    }
  });
  for (int round = 0; round < 20; ++round) {
    const int status = status_of_fork([&] {
      int runs = 0;
      pool.parallel_for(5, [&](std::int64_t, int) { ++runs; });
      return runs;
    });
    EXPECT_EQ(status, 5);
  }
  stop = true;
  other.join();
}

}  // namespace
}  // namespace icecache::thread_pool_test

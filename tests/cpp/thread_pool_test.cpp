#include "threads/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "gate.h"
#include "icecache/error.h"

namespace icecache::thread_pool_test {
namespace {

using std::chrono::milliseconds;
using testing::Gate;

TEST(ThreadPool, RefusesImpossibleThreadCounts) {
  EXPECT_THROW(ThreadPool(0, 0), InvalidArgument);
  EXPECT_THROW(ThreadPool(1, -1), InvalidArgument);
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

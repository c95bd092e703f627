#include "threads/job_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "gate.h"
#include "threads/thread_pool.h"

namespace icecache::job_queue_test {
namespace {

using testing::Gate;

// Jobs of a ThreadPool, which its queue runs.

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

}  // namespace
}  // namespace icecache::job_queue_test

// ThreadPool: the engine's own threads. Foreground work (attend) goes before background work
// (index).
//
// Invariants
//  1. parallel_for runs on the caller and on idle workers; it never waits for a background job that
//     has not been started, and returns when all its items are done.
//  2. Background jobs start in the order they were submitted, each on one worker.
//  3. With zero workers background jobs run inside wait(); nothing ever deadlocks.
//  4. A forked child process sees a pool without workers (threads do not survive fork).
//
// Threads: all methods from any thread; parallel_for must not be called from a background job.
// Exceptions: the first one of a parallel_for is rethrown to its caller after all items have ended;
// those of a background job are kept in its JobGroup.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>

#include "threads/job_queue.h"

namespace icecache {

class ThreadPool;

// Background jobs that are waited for together. Copyable handle to shared state; empty when
// default.
class JobGroup {
 public:
  JobGroup() = default;
  bool done() const;

 private:
  friend class ThreadPool;
  friend class PreparedJobs;
  std::shared_ptr<JobQueue::Group> state_;
};

// Jobs that hold all the memory that they need to be submitted.
class PreparedJobs {
 public:
  // Adds a job of `group`, which belongs to it from submit() on.
  void add(JobGroup& group, std::function<void()> job);

 private:
  friend class ThreadPool;
  JobQueue::Jobs jobs_;
};

class ThreadPool {
 public:
  // `foreground` threads take part in parallel_for, the caller included; `background` run jobs.
  ThreadPool(int foreground, int background);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // body(i, thread) for i in [0, count); thread in [0, num_threads()), each index used by one
  // thread at a time (for scratch memory). Items are handed out one by one, in order.
  void parallel_for(std::int64_t count, const std::function<void(std::int64_t, int)>& body);
  int num_threads() const;

  // Adds a job to `group` (made if empty). Where it throws, there is no job.
  void submit(JobGroup& group, std::function<void()> job);
  void submit(PreparedJobs jobs) noexcept;
  // Returns when all jobs of the group are done, helping to run the group's own jobs that have not
  // started. What they threw stays in the group.
  void finish(JobGroup& group) noexcept;
  // finish(), then clears the group and rethrows the first exception.
  void wait(JobGroup& group);
  // In a child process: true where jobs ran when it was forked, whose effects are half done.
  bool has_lost_jobs() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache

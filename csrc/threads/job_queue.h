// JobQueue: background jobs in the order of their submission, and groups of them to wait for.
//
// Threads: all methods from any thread; one mutex guards the queue and the groups. Jobs run outside
// it. The threads yield to the program's other threads: they run at a lower scheduling priority.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <list>
#include <memory>
#include <mutex>

#include "threads/worker_threads.h"

namespace icecache {

class JobQueue {
 public:
  struct Group {
    std::atomic<std::int64_t> pending{0};  // jobs not ended; 0 is stored after all their effects
    std::exception_ptr error;              // of the earliest job that threw
    std::uint64_t error_number = std::numeric_limits<std::uint64_t>::max();
  };

  struct Job {
    std::shared_ptr<Group> group;
    std::function<void()> run;
    std::uint64_t number = 0;
  };
  // Jobs move from list to list and are never copied: from its submission on, a job needs no memory
  // but its own.
  using Jobs = std::list<Job>;

  explicit JobQueue(int threads);  // 0: jobs run in finish()
  ~JobQueue();  // waits for the jobs that run; those that have not started are dropped

  void submit(Jobs jobs) noexcept;
  // See ThreadPool::finish.
  void finish(const std::shared_ptr<Group>& group) noexcept;

  // See ForkGuard. In the child, jobs that had not started can be waited for; those that ran in the
  // parent at that moment have failed.
  void before_fork();
  void after_fork_in_parent();
  void after_fork_in_child();
  bool has_lost_jobs() const { return has_lost_jobs_; }

 private:
  void worker();
  void run(std::unique_lock<std::mutex>& lock, Jobs::iterator queued) noexcept;
  void end_locked(Group& group, std::uint64_t number, const std::exception_ptr& error) noexcept;
  void stop();

  const std::exception_ptr lost_in_fork_;
  std::mutex mutex_;
  std::condition_variable submitted_, ended_;
  Jobs queue_, running_;
  std::uint64_t next_number_ = 0;
  bool stopping_ = false;
  bool has_lost_jobs_ = false;              // set in the child of a fork only, by its one thread
  std::unique_ptr<WorkerThreads> workers_;  // last: its threads use all of the above
};

}  // namespace icecache

// ThreadTeam: the caller and its helpers work through the items of one loop together.
//
// A loop is too short to wait for threads that sleep: helpers spin for a moment after each loop
// before they sleep, and the caller waits only for helpers that have joined in, never for one that
// is still waking up.
//
// With use_parallel_for() the host's threads take the helpers' place, which then sleep.
//
// Threads: run() from any thread; loops of different threads follow one another. A loop started by
// the body of another one runs on that body's thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "icecache/parallel.h"
#include "threads/worker_threads.h"

namespace icecache {

class ThreadTeam {
 public:
  using Body = std::function<void(std::int64_t, int)>;

  explicit ThreadTeam(int threads);  // the caller included
  ~ThreadTeam();

  // body(i, thread) for i in [0, count), in order of i; all items are run, then the exception of
  // the lowest item that threw is rethrown.
  void run(std::int64_t count, const Body& body);
  int size() const { return size_; }

  // See ForkGuard.
  void before_fork();
  void after_fork_in_parent();
  void after_fork_in_child();

 private:
  // One loop at a time; written by its caller while no helper has joined.
  struct Loop {
    const Body* body = nullptr;
    std::int64_t count = 0;
    std::atomic<std::int64_t> next{0};
    std::mutex error_mutex;  // guards the two below
    std::exception_ptr error;
    std::int64_t error_item = 0;

    void reset(std::int64_t items, const Body& body);
    void work(int thread);
  };

  void run_on_host(ParallelFor parallel_for, std::int64_t count);
  void helper(int thread);
  bool join_loop(std::uint64_t& seen);
  void leave_loop();
  bool loop_is_new(std::uint64_t seen) const;
  void wake(int helpers);
  void wait_for_helpers();
  void stop();

  const int size_;
  const bool may_spin_;
  std::mutex turn_;  // held by the caller whose loop runs; guards loop_ outside of joined helpers
  Loop loop_;

  // [generation : 31][open : 1][joined helpers : 32]. Helpers join an open loop they have not seen.
  std::atomic<std::uint64_t> state_{0};

  std::mutex sleep_mutex_;  // guards going to sleep: no wake-up is lost
  std::condition_variable loop_opened_, helpers_left_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};
  std::unique_ptr<WorkerThreads> helpers_;  // last: its threads use all of the above
};

}  // namespace icecache

// CallMutex: serialises the calls of an object that has background jobs, and survives fork().
//
// A child process has no thread but the one that forked. A call that another thread was in is never
// finished there, and neither is a background job that was running: what they were changing stays
// half changed. The object is lost in the child then; lock() says so instead of waiting for ever.
//
// Threads: all methods from any thread.
#pragma once

#include <mutex>

#include "threads/fork_guard.h"
#include "threads/thread_pool.h"

namespace icecache {

class CallMutex final : ForkGuard {
 public:
  explicit CallMutex(const ThreadPool& jobs) : jobs_(jobs) { enroll(); }
  ~CallMutex() { withdraw(); }
  CallMutex(const CallMutex&) = delete;
  CallMutex& operator=(const CallMutex&) = delete;

  void lock();  // throws Error where the object is lost
  void unlock() { mutex_.unlock(); }
  bool is_lost() const;

 private:
  void before_fork() override;
  void after_fork_in_parent() override;
  void after_fork_in_child() override;

  const ThreadPool& jobs_;
  std::mutex mutex_;
  bool is_held_by_fork_ = false;  // from before_fork() on
  bool is_lost_ = false;          // set in the child only, by its one thread
};

}  // namespace icecache

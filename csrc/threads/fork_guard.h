// ForkGuard: lets an object that owns threads and mutexes survive fork().
//
// A child process has the memory of its parent but only the thread that forked: mutexes that other
// threads held stay locked for ever, and waiting for those threads never ends. Around each fork()
// of the process, every enrolled object is asked to lock its mutexes (so that what they guard is in
// a consistent state in the child) and, on the other side, to unlock them or to start afresh.
//
// Threads: enroll() and withdraw() from any thread, but not from the three callbacks.
#pragma once

namespace icecache {

class ForkGuard {
 public:
  virtual void before_fork() = 0;           // in the parent; locks
  virtual void after_fork_in_parent() = 0;  // unlocks
  virtual void after_fork_in_child() = 0;   // unlocks; the object's threads do not exist here

 protected:
  ~ForkGuard() = default;
  // Called when the object is complete, and before it is taken apart.
  void enroll();
  void withdraw();
};

}  // namespace icecache

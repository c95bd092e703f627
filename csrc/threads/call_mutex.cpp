#include "threads/call_mutex.h"

#include <new>

#include "icecache/error.h"

namespace icecache {

bool CallMutex::is_lost() const {
  return is_lost_ || jobs_.has_lost_jobs();
}

void CallMutex::lock() {
  if (is_lost()) {
    throw Error(
        "this engine was at work in another thread when the process was forked, and cannot be used "
        "in the child: make a new one, or fork before the engine is made");
  }
  mutex_.lock();
}

// Does not wait for a call that holds the mutex: that may take seconds.
void CallMutex::before_fork() {
  is_held_by_fork_ = mutex_.try_lock();
}

void CallMutex::after_fork_in_parent() {
  if (is_held_by_fork_) mutex_.unlock();
}

void CallMutex::after_fork_in_child() {
  if (is_held_by_fork_) {
    mutex_.unlock();
  } else {
    new (&mutex_) std::mutex;  // its owner does not exist here
    is_lost_ = true;
  }
}

}  // namespace icecache

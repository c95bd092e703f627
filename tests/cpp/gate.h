// A door that threads of a test wait at until it is opened.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace icecache::testing {

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

}  // namespace icecache::testing

// WorkerThreads: threads that run one loop each until they are joined.
//
// Signals are blocked in them: they go to the threads of the program that embeds the library
// (Python handles Ctrl-C in its main thread only).
#pragma once

#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace icecache {

class WorkerThreads {
 public:
  // loop(i) runs on thread i; it lets no exception out. Throws Error when the operating system
  // refuses a thread, std::bad_alloc without memory; `stop` has then been called and the threads
  // that had started have ended.
  WorkerThreads(int count, const std::function<void(int)>& loop, const std::function<void()>& stop);
  WorkerThreads(const WorkerThreads&) = delete;
  WorkerThreads& operator=(const WorkerThreads&) = delete;

  int count() const { return threads_ ? static_cast<int>(threads_->size()) : 0; }
  // Waits until every loop has returned. Before destruction.
  void join();
  // In the child of a fork: the threads do not exist there, and can be neither joined nor detached.
  void abandon();

 private:
  std::unique_ptr<std::vector<std::thread>> threads_;  // null: abandoned
};

}  // namespace icecache

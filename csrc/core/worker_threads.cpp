#include "core/worker_threads.h"

#include <signal.h>

#include <system_error>

#include "icecache/error.h"

namespace icecache {

WorkerThreads::WorkerThreads(int count, const std::function<void(int)>& loop,
                             const std::function<void()>& stop)
    : threads_(std::make_unique<std::vector<std::thread>>()) {
  threads_->reserve(static_cast<std::size_t>(count));
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int refused = 0;
  try {
    for (int i = 0; i < count; ++i) threads_->emplace_back(loop, i);
  } catch (const std::system_error& error) {
    refused = error.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (refused == 0) return;
  const std::size_t started = threads_->size();
  stop();
  join();
  throw Error(message("the operating system started ", started, " of ", count,
                      " threads: ", std::generic_category().message(refused)));
}

void WorkerThreads::join() {
  for (std::thread& thread : *threads_) thread.join();
  threads_->clear();
}

void WorkerThreads::abandon() {
  // The std::thread objects are leaked on purpose: their destructor would end the process.
  [[maybe_unused]] const auto* leaked = threads_.release();
  threads_ = std::make_unique<std::vector<std::thread>>();
}

}  // namespace icecache

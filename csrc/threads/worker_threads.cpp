#include "threads/worker_threads.h"

#include <signal.h>

#include <exception>
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
  std::exception_ptr error;
  int refused = 0;
  try {
    for (int i = 0; i < count; ++i) threads_->emplace_back(loop, i);
  } catch (const std::system_error& system) {
    refused = system.code().value();
  } catch (...) {
    error = std::current_exception();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (refused == 0 && !error) return;
  const std::size_t started = threads_->size();
  stop();
  join();
  if (error) std::rethrow_exception(error);
  throw Error(message("the operating system started ", started, " of ", count,
                      " threads: ", std::generic_category().message(refused)));
}

void WorkerThreads::join() {
  if (threads_ == nullptr) return;
  for (std::thread& thread : *threads_) thread.join();
  threads_->clear();
}

void WorkerThreads::abandon() {
  // The std::thread objects are leaked on purpose: their destructor would end the process.
  [[maybe_unused]] const auto* leaked = threads_.release();
}

}  // namespace icecache

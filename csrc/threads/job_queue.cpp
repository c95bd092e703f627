#include "threads/job_queue.h"

#include <unistd.h>

#include <algorithm>
#include <new>
#include <utility>

#include "icecache/error.h"

namespace icecache {
namespace {

// About a third of the CPU time of a thread of normal priority that wants the same core.
constexpr int kNice = 5;

}  // namespace

JobQueue::JobQueue(int threads)
    : lost_in_fork_(std::make_exception_ptr(Error(
          "a background job was running when this process was forked; its result is lost here"))) {
  workers_ = std::make_unique<WorkerThreads>(
      threads, [this](int) { worker(); }, [this] { stop(); });
}

JobQueue::~JobQueue() {
  Jobs dropped;
  {
    std::lock_guard lock(mutex_);
    dropped.swap(queue_);
  }
  stop();
  workers_->join();
}

void JobQueue::stop() {
  std::lock_guard lock(mutex_);
  stopping_ = true;
  submitted_.notify_all();
}

void JobQueue::submit(Jobs jobs) noexcept {
  std::lock_guard lock(mutex_);
  for (Job& job : jobs) {
    job.number = next_number_++;
    job.group->pending.fetch_add(1);
    submitted_.notify_one();
  }
  queue_.splice(queue_.end(), jobs);
}

void JobQueue::worker() {
  // On Linux this is the priority of the calling thread alone. Where it is refused, jobs run as
  // others.
  [[maybe_unused]] const int priority = nice(kNice);
  std::unique_lock lock(mutex_);
  for (;;) {
    submitted_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    run(lock, queue_.begin());
  }
}

// Called and left with the mutex locked.
void JobQueue::run(std::unique_lock<std::mutex>& lock, Jobs::iterator queued) noexcept {
  running_.splice(running_.end(), queue_, queued);
  lock.unlock();
  std::exception_ptr error;
  try {
    queued->run();
  } catch (...) {
    error = std::current_exception();
  }
  // What the job captured is gone before anyone is told that it has ended.
  queued->run = nullptr;
  lock.lock();
  end_locked(*queued->group, queued->number, error);
  running_.erase(queued);
}

void JobQueue::end_locked(Group& group, std::uint64_t number,
                          const std::exception_ptr& error) noexcept {
  if (error && number < group.error_number) {
    group.error = error;
    group.error_number = number;
  }
  if (group.pending.fetch_sub(1) == 1) ended_.notify_all();
}

void JobQueue::finish(const std::shared_ptr<Group>& group) noexcept {
  std::unique_lock lock(mutex_);
  while (group->pending.load() > 0) {
    const auto own = std::find_if(queue_.begin(), queue_.end(),
                                  [&](const Job& job) { return job.group == group; });
    if (own == queue_.end()) {
      ended_.wait(lock);
    } else {
      run(lock, own);
    }
  }
}

void JobQueue::before_fork() {
  mutex_.lock();
}

void JobQueue::after_fork_in_parent() {
  mutex_.unlock();
}

void JobQueue::after_fork_in_child() {
  workers_->abandon();
  // Threads that are gone may wait on the conditions; destroying those would wait for them.
  new (&submitted_) std::condition_variable;
  new (&ended_) std::condition_variable;
  has_lost_jobs_ = has_lost_jobs_ || !running_.empty();
  for (const Job& lost : running_) end_locked(*lost.group, lost.number, lost_in_fork_);
  // What the lost jobs captured belongs to threads that are gone: it is leaked.
  new (&running_) Jobs;
  mutex_.unlock();
}

}  // namespace icecache

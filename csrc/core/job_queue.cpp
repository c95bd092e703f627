#include "core/job_queue.h"

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

JobQueue::JobQueue(int threads) {
  workers_ = std::make_unique<WorkerThreads>(
      threads, [this](int) { worker(); }, [this] { stop(); });
}

JobQueue::~JobQueue() {
  stop();
  workers_->join();
  std::unique_lock lock(mutex_);
  while (!queue_.empty()) {
    Job job = std::move(queue_.front());
    queue_.pop_front();
    run(lock, std::move(job));
  }
}

void JobQueue::stop() {
  std::lock_guard lock(mutex_);
  stopping_ = true;
  submitted_.notify_all();
}

void JobQueue::submit(std::shared_ptr<Group> group, std::function<void()> job) {
  std::lock_guard lock(mutex_);
  Group& counted = *group;
  queue_.push_back({std::move(group), std::move(job), next_number_++});
  counted.pending.fetch_add(1);
  submitted_.notify_one();
}

void JobQueue::worker() {
  // On Linux this is the priority of the calling thread alone. Where it is refused, jobs run as
  // others.
  [[maybe_unused]] const int priority = nice(kNice);
  std::unique_lock lock(mutex_);
  for (;;) {
    submitted_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Job job = std::move(queue_.front());
    queue_.pop_front();
    run(lock, std::move(job));
  }
}

// Called and left with the mutex locked.
void JobQueue::run(std::unique_lock<std::mutex>& lock, Job job) {
  running_.push_back({job.group.get(), job.number});
  lock.unlock();
  std::exception_ptr error;
  try {
    job.run();
  } catch (...) {
    error = std::current_exception();
  }
  // What the job captured is gone before anyone is told that it has ended.
  job.run = nullptr;
  lock.lock();
  std::erase_if(running_, [&](const Running& entry) { return entry.number == job.number; });
  end_locked(*job.group, job.number, error);
}

void JobQueue::end_locked(Group& group, std::uint64_t number, const std::exception_ptr& error) {
  if (error && number < group.error_number) {
    group.error = error;
    group.error_number = number;
  }
  if (group.pending.fetch_sub(1) == 1) ended_.notify_all();
}

void JobQueue::wait(const std::shared_ptr<Group>& group) {
  std::unique_lock lock(mutex_);
  while (group->pending.load() > 0) {
    const auto own = std::find_if(queue_.begin(), queue_.end(),
                                  [&](const Job& job) { return job.group == group; });
    if (own == queue_.end()) {
      ended_.wait(lock);
      continue;
    }
    Job job = std::move(*own);
    queue_.erase(own);
    run(lock, std::move(job));
  }
  if (group->error) std::rethrow_exception(group->error);
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
  const auto error = std::make_exception_ptr(
      Error("a background job was running when this process was forked; its result is lost here"));
  for (const Running& lost : std::exchange(running_, {})) {
    end_locked(*lost.group, lost.number, error);
  }
  mutex_.unlock();
}

}  // namespace icecache

#include "threads/thread_pool.h"

#include <utility>

#include "icecache/error.h"
#include "threads/fork_guard.h"
#include "threads/thread_team.h"

namespace icecache {

bool JobGroup::done() const {
  return state_ == nullptr || state_->pending.load() == 0;
}

struct ThreadPool::Impl final : ForkGuard {
  Impl(int foreground, int background) : team(foreground), jobs(background) { enroll(); }
  ~Impl() { withdraw(); }

  void before_fork() override {
    team.before_fork();
    jobs.before_fork();
  }
  void after_fork_in_parent() override {
    jobs.after_fork_in_parent();
    team.after_fork_in_parent();
  }
  void after_fork_in_child() override {
    jobs.after_fork_in_child();
    team.after_fork_in_child();
  }

  ThreadTeam team;
  JobQueue jobs;
};

ThreadPool::ThreadPool(int foreground, int background) {
  if (foreground < 1) {
    throw InvalidArgument(message("foreground threads must be at least 1, got ", foreground));
  }
  if (background < 0) {
    throw InvalidArgument(message("background threads must be at least 0, got ", background));
  }
  impl_ = std::make_unique<Impl>(foreground, background);
}

ThreadPool::~ThreadPool() = default;

void ThreadPool::parallel_for(std::int64_t count,
                              const std::function<void(std::int64_t, int)>& body) {
  impl_->team.run(count, body);
}

int ThreadPool::num_threads() const {
  return impl_->team.size();
}

void PreparedJobs::add(JobGroup& group, std::function<void()> job) {
  if (group.state_ == nullptr) group.state_ = std::make_shared<JobQueue::Group>();
  jobs_.push_back({group.state_, std::move(job)});
}

void ThreadPool::submit(JobGroup& group, std::function<void()> job) {
  PreparedJobs prepared;
  prepared.add(group, std::move(job));
  submit(std::move(prepared));
}

void ThreadPool::submit(PreparedJobs jobs) noexcept {
  impl_->jobs.submit(std::move(jobs.jobs_));
}

void ThreadPool::finish(JobGroup& group) noexcept {
  if (group.state_ != nullptr) impl_->jobs.finish(group.state_);
}

void ThreadPool::wait(JobGroup& group) {
  finish(group);
  const std::shared_ptr<JobQueue::Group> state = std::exchange(group.state_, nullptr);
  if (state != nullptr && state->error) std::rethrow_exception(state->error);
}

bool ThreadPool::has_lost_jobs() const {
  return impl_->jobs.has_lost_jobs();
}

}  // namespace icecache

#include "threads/fork_guard.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace icecache {
namespace {

struct Registry {
  std::mutex mutex;  // guards `guards`; held from before fork() until after it
  std::vector<ForkGuard*> guards;
};

// Never destroyed: a process may fork while static objects are being destroyed.
Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

void prepare() {
  registry().mutex.lock();
  for (ForkGuard* guard : registry().guards) guard->before_fork();
}

void in_parent() {
  for (ForkGuard* guard : registry().guards) guard->after_fork_in_parent();
  registry().mutex.unlock();
}

void in_child() {
  for (ForkGuard* guard : registry().guards) guard->after_fork_in_child();
  registry().mutex.unlock();
}

}  // namespace

void ForkGuard::enroll() {
  static std::once_flag installed;
  std::call_once(installed, [] {
    if (pthread_atfork(prepare, in_parent, in_child) != 0) throw std::bad_alloc();
  });
  std::lock_guard lock(registry().mutex);
  registry().guards.push_back(this);
}

void ForkGuard::withdraw() {
  std::lock_guard lock(registry().mutex);
  std::erase(registry().guards, this);
}

}  // namespace icecache

#include "threads/thread_team.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <thread>
#include <utility>

#include "config/machine.h"

namespace icecache {
namespace {

constexpr std::uint64_t kOpen = std::uint64_t{1} << 32;
constexpr std::uint64_t kJoined = kOpen - 1;       // mask of the helper count
constexpr std::uint64_t kGeneration = kOpen << 1;  // one generation

// The gap between two loops of one attend call is shorter; the gap between two layers is longer.
constexpr auto kSpin = std::chrono::microseconds(20);

// Each thread that wakes up wakes this many more, so that no thread pays for waking all.
constexpr int kFanOut = 2;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

template <typename Condition>
bool spin_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return condition();
}

std::atomic<ParallelFor> host_parallel_for{nullptr};

// The loop that the current thread is in the body of. What a nested loop asks of its own thread, and
// no caller could hand down: between the two loops there is code that knows of neither.
struct Place {
  const ThreadTeam* team = nullptr;
  int thread = 0;
};
thread_local Place place;

class PlaceScope {
 public:
  PlaceScope(const ThreadTeam* team, int thread) : outer_(place) { place = {team, thread}; }
  ~PlaceScope() { place = outer_; }

 private:
  Place outer_;
};

}  // namespace

void use_parallel_for(ParallelFor parallel_for) {
  host_parallel_for.store(parallel_for);
}

void ThreadTeam::Loop::reset(std::int64_t items, const Body& loop_body) {
  body = &loop_body;
  count = items;
  next.store(0, std::memory_order_relaxed);
  error = nullptr;
  error_item = items;
}

void ThreadTeam::Loop::work(int thread) {
  for (;;) {
    const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
    if (item >= count) return;
    try {
      (*body)(item, thread);
    } catch (...) {
      std::lock_guard lock(error_mutex);
      if (item < error_item) {
        error_item = item;
        error = std::current_exception();
      }
    }
  }
}

ThreadTeam::ThreadTeam(int threads) : size_(threads), may_spin_(threads <= usable_cores()) {
  helpers_ = std::make_unique<WorkerThreads>(
      threads - 1, [this](int i) { helper(i + 1); }, [this] { stop(); });
}

ThreadTeam::~ThreadTeam() {
  stop();
  helpers_->join();
}

void ThreadTeam::stop() {
  std::lock_guard lock(sleep_mutex_);
  stopping_.store(true);
  loop_opened_.notify_all();
}

void ThreadTeam::run(std::int64_t count, const Body& body) {
  if (count <= 0) return;
  if (place.team == this) {
    Loop nested;
    nested.reset(count, body);
    nested.work(place.thread);
    if (nested.error) std::rethrow_exception(nested.error);
    return;
  }
  std::lock_guard turn(turn_);
  const PlaceScope scope(this, 0);
  loop_.reset(count, body);
  const bool alone = count == 1 || helpers_->count() == 0;
  if (const ParallelFor host = host_parallel_for.load(); host != nullptr && !alone) {
    run_on_host(host, count);
  } else if (!alone) {
    // Sequentially consistent, as is the helpers' sleepers_: either this thread sees a sleeper, or
    // the sleeper sees the open loop before it sleeps.
    state_.store(((state_.load() & ~kJoined) + kGeneration) | kOpen);
    wake(count > 2 ? kFanOut : 1);
    loop_.work(0);
    state_.fetch_and(~kOpen);
    wait_for_helpers();
  } else {
    loop_.work(0);
  }
  if (loop_.error) std::rethrow_exception(std::exchange(loop_.error, nullptr));
}

// Each of the host's calls takes items until none is left, as a helper would.
void ThreadTeam::run_on_host(ParallelFor parallel_for, std::int64_t count) {
  const auto work = [](std::int64_t i, void* context) {
    auto* team = static_cast<ThreadTeam*>(context);
    const PlaceScope scope(team, static_cast<int>(i));
    team->loop_.work(static_cast<int>(i));
  };
  try {
    parallel_for(std::min<std::int64_t>(size_, count), work, this);
  } catch (...) {
    // The host could not lend its threads: what is left is done here.
  }
  loop_.work(0);
}

void ThreadTeam::wake(int helpers) {
  if (sleepers_.load() == 0) return;
  // The mutex is free only when no sleeper stands between its last look and its sleep.
  { std::lock_guard lock(sleep_mutex_); }
  for (int i = 0; i < helpers; ++i) loop_opened_.notify_one();
}

void ThreadTeam::wait_for_helpers() {
  const auto left = [this] { return (state_.load() & kJoined) == 0; };
  if (left() || (may_spin_ && spin_until(left))) return;
  std::unique_lock lock(sleep_mutex_);
  caller_sleeps_.store(true);
  helpers_left_.wait(lock, left);
  caller_sleeps_.store(false);
}

bool ThreadTeam::loop_is_new(std::uint64_t seen) const {
  const std::uint64_t state = state_.load();
  return (state & kOpen) != 0 && (state & ~kJoined) != seen;
}

bool ThreadTeam::join_loop(std::uint64_t& seen) {
  std::uint64_t state = state_.load();
  do {
    if ((state & kOpen) == 0 || (state & ~kJoined) == seen) return false;
  } while (!state_.compare_exchange_weak(state, state + 1));
  seen = state & ~kJoined;
  return true;
}

void ThreadTeam::leave_loop() {
  const std::uint64_t before = state_.fetch_sub(1);
  if ((before & kJoined) != 1 || !caller_sleeps_.load()) return;
  std::lock_guard lock(sleep_mutex_);
  helpers_left_.notify_one();
}

void ThreadTeam::helper(int thread) {
  const PlaceScope scope(this, thread);
  std::uint64_t seen = 0;
  const auto has_work = [&] { return loop_is_new(seen) || stopping_.load(); };
  for (;;) {
    bool slept = false;
    if (!may_spin_ || !spin_until(has_work)) {
      std::unique_lock lock(sleep_mutex_);
      sleepers_.fetch_add(1);
      loop_opened_.wait(lock, has_work);
      sleepers_.fetch_sub(1);
      slept = true;
    }
    if (stopping_.load()) return;
    if (join_loop(seen)) {
      if (slept && loop_.next.load(std::memory_order_relaxed) < loop_.count) wake(kFanOut);
      loop_.work(thread);
      leave_loop();
    }
  }
}

void ThreadTeam::before_fork() {
  sleep_mutex_.lock();
}

void ThreadTeam::after_fork_in_parent() {
  sleep_mutex_.unlock();
}

void ThreadTeam::after_fork_in_child() {
  helpers_->abandon();
  host_parallel_for.store(nullptr);  // the host's threads are gone, too: OpenMP would wait for them
  // Threads that are gone may hold the turn or wait on the conditions; destroying those would wait
  // for them, so that they are made anew in place.
  new (&turn_) std::mutex;
  new (&loop_.error_mutex) std::mutex;
  new (&loop_opened_) std::condition_variable;
  new (&helpers_left_) std::condition_variable;
  state_.store(0);
  sleepers_.store(0);
  caller_sleeps_.store(false);
  sleep_mutex_.unlock();
}

}  // namespace icecache

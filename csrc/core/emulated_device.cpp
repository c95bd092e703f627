#include "core/emulated_device.h"

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>

#include "core/worker_threads.h"
#include "icecache/error.h"

namespace icecache {
namespace {

class EmulatedDevice final : public DeviceMemory {
 public:
  EmulatedDevice()
      : copier_(
            1, [this](int) { run(); }, [this] { stop(); }) {}
  ~EmulatedDevice() override {
    stop();
    copier_.join();
  }

  std::byte* allocate(std::size_t bytes) override {
    auto* memory = new (std::nothrow) std::byte[bytes];
    if (memory == nullptr)
      throw OutOfPages(message("the emulated device has no ", bytes, " bytes of memory left"));
    std::memset(memory, 0xff, bytes);
    return memory;
  }
  void free(std::byte* memory) noexcept override {
    wait(record());  // a copy into it may be on its way
    delete[] memory;
  }
  void copy_async(std::byte* target, const std::byte* source, std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    copies_.push_back({target, source, bytes, last_ + 1});
    ++last_;
  }
  Event record() override {
    const std::lock_guard lock(mutex_);
    return last_;
  }
  bool reached(Event event) override {
    const std::lock_guard lock(mutex_);
    return done_ >= event;
  }
  void wait(Event event) override {
    std::unique_lock lock(mutex_);
    if (event > wanted_) {
      wanted_ = event;
      changed_.notify_all();
    }
    changed_.wait(lock, [&] { return done_ >= event; });
  }
  bool host_readable() const override { return true; }
  std::string description() const override { return "emulated device (host memory)"; }

 private:
  struct Copy {
    std::byte* target;
    const std::byte* source;
    std::size_t bytes;
    Event number;
  };

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
  }

  // Carries out the copies up to the last one that somebody waits for, and none before.
  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || done_ < wanted_; });
      if (stopping_) return;
      const Copy copy = copies_.front();
      copies_.pop_front();
      lock.unlock();
      std::memcpy(copy.target, copy.source, copy.bytes);
      lock.lock();
      done_ = copy.number;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  std::deque<Copy> copies_;
  Event last_ = 0, wanted_ = 0, done_ = 0;
  bool stopping_ = false;
  WorkerThreads copier_;  // last: it uses all of the above
};

}  // namespace

std::unique_ptr<DeviceMemory> make_emulated_device() {
  return std::make_unique<EmulatedDevice>();
}

}  // namespace icecache

#include "fault/injector.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "host/head_cache.h"
#include "host/segment_build.h"
#include "icecache/error.h"
#include "index/growing_index.h"
#include "pages/page_pool.h"

namespace icecache::fault {
namespace {

std::atomic<int> armed_kind{-1};
std::atomic<std::int64_t> wanted{0}, counted{0}, live{0};
std::atomic<bool> has_fired{false};
std::atomic<const char*> fired_at{nullptr};
thread_local bool is_exempt = false;
thread_local const char* place_now = nullptr;

// FAISS lets no exception out of its parallel loops: the process would end in OpenMP's code.
bool in_parallel_loop() {
  using Level = int (*)();
  static const auto level = reinterpret_cast<Level>(dlsym(RTLD_DEFAULT, "omp_get_level"));
  return level != nullptr && level() > 0;
}

bool fails(Kind kind) {
  if (armed_kind.load(std::memory_order_relaxed) != static_cast<int>(kind) || is_exempt) {
    return false;
  }
  if (in_parallel_loop()) return false;
  if (counted.fetch_add(1) + 1 != wanted.load()) return false;
  fired_at.store(place_now);
  has_fired.store(true);
  if (std::getenv("ICECACHE_FAULT_TRACE") != nullptr) {
    void* frames[40];
    std::fprintf(stderr, "allocation %lld fails at:\n", static_cast<long long>(wanted.load()));
    backtrace_symbols_fd(frames, backtrace(frames, 40), 2);
  }
  return true;
}

class Place {
 public:
  explicit Place(const char* name) : outer_(std::exchange(place_now, name)) {}
  ~Place() { place_now = outer_; }

 private:
  const char* outer_;
};

// The engine's own function of this name, behind the one of this executable.
template <typename Function>
Function original(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (found == nullptr) {
    std::fprintf(stderr, "the engine has no %s\n", name);
    std::abort();
  }
  return reinterpret_cast<Function>(found);
}

}  // namespace

void arm(Kind kind, std::int64_t nth) {
  in_parallel_loop();
  counted.store(0);
  has_fired.store(false);
  fired_at.store(nullptr);
  wanted.store(nth);
  armed_kind.store(static_cast<int>(kind));
}

std::int64_t count() {
  return counted.load();
}
bool fired() {
  return has_fired.load();
}
const char* place() {
  return fired_at.load();
}
std::int64_t live_blocks() {
  return live.load();
}
void exempt_this_thread() {
  is_exempt = true;
}

Counted::Counted() {
  is_exempt = false;
}
Counted::~Counted() {
  is_exempt = true;
}

namespace {

void* allocate(std::size_t bytes, std::size_t alignment) noexcept {
  if (fails(Kind::kMemory)) return nullptr;
  void* memory = nullptr;
  if (alignment <= alignof(std::max_align_t)) {
    memory = std::malloc(bytes == 0 ? 1 : bytes);
  } else {
    memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  }
  if (memory != nullptr) live.fetch_add(1, std::memory_order_relaxed);
  return memory;
}

void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* memory = allocate(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void release(void* memory) noexcept {
  if (memory != nullptr) live.fetch_sub(1, std::memory_order_relaxed);
  std::free(memory);
}

}  // namespace
}  // namespace icecache::fault

namespace fault = icecache::fault;
using fault::Kind;
using fault::Place;

// ---- operator new

void* operator new(std::size_t bytes) {
  return fault::allocate_or_throw(bytes, 1);
}
void* operator new[](std::size_t bytes) {
  return fault::allocate_or_throw(bytes, 1);
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return fault::allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return fault::allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return fault::allocate(bytes, 1);
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return fault::allocate(bytes, 1);
}
void operator delete(void* memory) noexcept {
  fault::release(memory);
}
void operator delete[](void* memory) noexcept {
  fault::release(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  fault::release(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  fault::release(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  fault::release(memory);
}
void operator delete[](void* memory, std::align_val_t) noexcept {
  fault::release(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  fault::release(memory);
}
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  fault::release(memory);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept {
  fault::release(memory);
}
void operator delete[](void* memory, const std::nothrow_t&) noexcept {
  fault::release(memory);
}

// ---- pages, threads, and the places that a fault is told from

namespace icecache {

PageId PagePool::allocate(const PageOwner& owner) {
  static const auto real = fault::original<PageId (*)(PagePool*, const PageOwner&)>(
      "_ZN8icecache8PagePool8allocateERKNS_9PageOwnerE");
  if (fault::fails(Kind::kPages)) throw OutOfPages("no page, by order of the test");
  return real(this, owner);
}

void PagePool::allocate(std::size_t count, const PageOwner& owner, std::vector<PageId>& out) {
  static const auto real =
      fault::original<void (*)(PagePool*, std::size_t, const PageOwner&, std::vector<PageId>&)>(
          "_ZN8icecache8PagePool8allocateEmRKNS_9PageOwnerERSt6vectorIjSaIjEE");
  if (count > 0 && fault::fails(Kind::kPages)) throw OutOfPages("no pages, by order of the test");
  real(this, count, owner, out);
}

void GrowingIndex::insert(const TokenBlock& tokens) {
  static const auto real = fault::original<void (*)(GrowingIndex*, const TokenBlock&)>(
      "_ZN8icecache12GrowingIndex6insertERKNS_10TokenBlockE");
  const Place place("insert");
  real(this, tokens);
}

void SegmentBuild::run() {
  static const auto real =
      fault::original<void (*)(SegmentBuild*)>("_ZN8icecache12SegmentBuild3runEv");
  const Place place("build");
  real(this);
}

void HeadCache::update_index(bool packs, HeadStats& stats) {
  static const auto real = fault::original<void (*)(HeadCache*, bool, HeadStats&)>(
      "_ZN8icecache9HeadCache12update_indexEbRNS_9HeadStatsE");
  const Place place("update");
  real(this, packs, stats);
}

}  // namespace icecache

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*start)(void*), void* argument) noexcept {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real = fault::original<Create>("pthread_create");
  if (fault::fails(Kind::kThreads)) return EAGAIN;
  return real(thread, attributes, start, argument);
}

// Residency: which pages are on the device.
//
// A page is absent, loading or resident; a pinned page is not evicted. There are more slots than
// one step selects, so that adjacent steps, which share about two thirds of their pages, find them
// there.
//
// Invariants
//  1. A slot holds at most one (page, epoch); a page that was written since (new epoch) is a miss.
//  2. Pinned slots are never evicted; unpinned resident slots are evicted least recently used
//  first.
//  3. Every pointer handed out is valid until its lease is released.
//
// Threads: all methods from any thread, one mutex (guards every field). Waiting for copies happens
// outside the mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/device_memory.h"
#include "icecache/index_types.h"
#include "icecache/page_pool.h"

namespace icecache {

struct ResidencyStats {
  std::int64_t hits = 0, misses = 0, evictions = 0, bytes_moved = 0;
  std::int64_t slots = 0, resident = 0, pinned = 0;
};

class Residency {
 public:
  // In place: `device` is null; pages are read where they are, hits and misses stay 0.
  Residency(PagePool& pool, std::unique_ptr<DeviceMemory> device, std::size_t slots);
  ~Residency();
  Residency(const Residency&) = delete;
  Residency& operator=(const Residency&) = delete;

  // Pages pinned for one attention. Releases on destruction.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept;
    Lease& operator=(Lease&& other) noexcept;
    ~Lease();
    // Pointer of the i-th page asked for; [2][S][D] as in the pool.
    const std::byte* page(std::size_t i) const { return pages_[i]; }
    std::int64_t hits = 0, misses = 0, bytes_moved = 0;

   private:
    friend class Residency;
    void release() noexcept;
    Residency* owner_ = nullptr;
    std::vector<const std::byte*> pages_;
    std::vector<std::int32_t> slots_;
  };

  // Pins the picked pages, starts the copies that are missing and waits for them; before that, for
  // other leases to free the slots it needs. So a thread holds one lease at a time. Throws
  // OutOfPages for more pages than capacity() (naming both numbers); nothing is pinned then.
  Lease acquire(std::span<const PagePick> picks);
  // Starts copies without waiting or pinning; stops early rather than evict a pinned page. The
  // pages must not be written until they were acquired or forgotten.
  void prefetch(std::span<const PagePick> picks);
  // Forgets a page that was freed. Not needed for written pages: their epoch tells.
  void forget(PageId page);

  bool in_place() const;
  // Pages that one lease can hold; unbounded in place.
  std::size_t capacity() const;
  ResidencyStats stats() const;
  void check_integrity() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache

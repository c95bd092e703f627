#include "core/residency.h"

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "icecache/error.h"

namespace icecache {
namespace {

// In a lease under way: the page has no slot yet.
constexpr std::int32_t kMissing = -1;

}  // namespace

struct Residency::Impl {
  struct Slot {
    PageId page = kNoPage;    // kNoPage: absent, the slot is free
    std::uint64_t epoch = 0;  // of the content that was asked for
    Event loaded = 0;         // 0: resident; else loading until this event
    int pins = 0;
    std::list<std::int32_t>::iterator place;  // in idle where pins == 0, else in busy
  };

  Impl(PagePool& page_pool, std::unique_ptr<DeviceMemory> memory, std::size_t count)
      : pool(page_pool), device(std::move(memory)) {
    if (!device) return;
    slots.resize(count);
    for (std::size_t s = 0; s < count; ++s) {
      slots[s].place = idle.insert(idle.end(), static_cast<std::int32_t>(s));
    }
    slot_of.reserve(count);
    base = device->allocate(count * pool.page_bytes());  // last: the destructor alone frees it
  }
  ~Impl() {
    if (base != nullptr) device->free(base);
  }

  std::byte* memory_of(std::int32_t slot) const {
    return base + static_cast<std::size_t>(slot) * pool.page_bytes();
  }
  // The slot that holds exactly this content, -1 where none does.
  std::int32_t find(const PagePick& pick) const {
    const auto found = slot_of.find(pick.page);
    return found != slot_of.end() && slots[found->second].epoch == pick.epoch ? found->second : -1;
  }
  void pin(std::int32_t slot) {
    if (slots[slot].pins++ == 0) busy.splice(busy.end(), idle, slots[slot].place);
  }
  void unpin(std::int32_t slot) {
    if (--slots[slot].pins == 0) idle.splice(idle.end(), busy, slots[slot].place);
  }
  // Empties a slot; a pinned one only loses its name, so that its content outlives the lease.
  void vacate(std::int32_t slot) {
    slot_of.erase(slots[slot].page);
    slots[slot].page = kNoPage;
  }
  // Starts the copy of a page into the least recently used idle slot. REQUIRES: one is idle. Where
  // it throws, the slot is free.
  std::int32_t load(const PagePick& pick) {
    // An older content of the page may still be here, even pinned.
    if (const auto old = slot_of.find(pick.page); old != slot_of.end()) {
      const std::int32_t stale = old->second;
      vacate(stale);
      if (slots[stale].pins == 0) idle.splice(idle.begin(), idle, slots[stale].place);
    }
    const std::int32_t slot = idle.front();
    if (slots[slot].page != kNoPage) {
      vacate(slot);
      ++stats.evictions;
    }
    const auto named = slot_of.emplace(pick.page, slot).first;
    try {
      device->copy_async(memory_of(slot), pool.data(pick.page), pool.page_bytes());
    } catch (...) {
      slot_of.erase(named);
      throw;
    }
    slots[slot].loaded = device->record();
    slots[slot].page = pick.page;
    slots[slot].epoch = pick.epoch;
    ++stats.misses;
    stats.bytes_moved += static_cast<std::int64_t>(pool.page_bytes());
    return slot;
  }

  PagePool& pool;
  std::unique_ptr<DeviceMemory> device;  // null: in place
  std::byte* base = nullptr;
  mutable std::mutex mutex;
  std::condition_variable released;
  std::vector<Slot> slots;
  std::unordered_map<PageId, std::int32_t> slot_of;
  std::list<std::int32_t> idle, busy;  // idle: least recently used first
  ResidencyStats stats;
};

Residency::Lease::Lease(Lease&& other) noexcept {
  *this = std::move(other);
}

Residency::Lease& Residency::Lease::operator=(Lease&& other) noexcept {
  if (this == &other) return *this;
  release();
  hits = other.hits;
  misses = other.misses;
  bytes_moved = other.bytes_moved;
  owner_ = std::exchange(other.owner_, nullptr);
  pages_ = std::move(other.pages_);
  slots_ = std::move(other.slots_);
  return *this;
}

Residency::Lease::~Lease() {
  release();
}

void Residency::Lease::release() noexcept {
  if (owner_ == nullptr) return;
  Impl& impl = *owner_->impl_;
  {
    const std::lock_guard lock(impl.mutex);
    for (const std::int32_t slot : slots_) {
      if (slot != kMissing) impl.unpin(slot);
    }
  }
  impl.released.notify_all();
  owner_ = nullptr;
}

Residency::Residency(PagePool& pool, std::unique_ptr<DeviceMemory> device, std::size_t slots)
    : impl_(std::make_unique<Impl>(pool, std::move(device), slots)) {}
Residency::~Residency() = default;

bool Residency::in_place() const {
  return impl_->device == nullptr;
}

std::size_t Residency::capacity() const {
  return in_place() ? std::numeric_limits<std::size_t>::max() : impl_->slots.size();
}

Residency::Lease Residency::acquire(std::span<const PagePick> picks) {
  Impl& impl = *impl_;
  Lease lease;
  lease.pages_.reserve(picks.size());
  if (in_place()) {
    for (const PagePick& pick : picks) lease.pages_.push_back(impl.pool.data(pick.page));
    return lease;
  }
  if (picks.size() > impl.slots.size()) {
    throw OutOfPages(message("device_pages must be at least the pages of one attention, ",
                             picks.size(), ", got ", impl.slots.size()));
  }
  lease.slots_.reserve(picks.size());
  std::unique_lock lock(impl.mutex);
  // All or nothing: a caller that waits holds no pins, so that none waits for another for ever.
  const auto fits = [&] {
    std::size_t missing = 0, idle_hits = 0;
    for (const PagePick& pick : picks) {
      const std::int32_t slot = impl.find(pick);
      if (slot < 0) {
        ++missing;
      } else if (impl.slots[slot].pins == 0) {
        ++idle_hits;
      }
    }
    return missing + idle_hits <= impl.idle.size();
  };
  impl.released.wait(lock, fits);

  // Hits are pinned first: a miss must not evict them.
  for (const PagePick& pick : picks) {
    const std::int32_t slot = impl.find(pick);
    lease.slots_.push_back(slot >= 0 ? slot : kMissing);
    if (slot < 0) continue;
    impl.pin(slot);
    ++lease.hits;
  }
  lease.owner_ = this;
  for (std::size_t i = 0; i < picks.size(); ++i) {
    if (lease.slots_[i] != kMissing) continue;
    const std::int32_t twin = impl.find(picks[i]);  // the same page twice in one call
    lease.slots_[i] = twin >= 0 ? twin : impl.load(picks[i]);
    impl.pin(lease.slots_[i]);
    if (twin >= 0) continue;
    ++lease.misses;
    lease.bytes_moved += static_cast<std::int64_t>(impl.pool.page_bytes());
  }
  impl.stats.hits += lease.hits;
  Event last = 0;
  for (const std::int32_t slot : lease.slots_) {
    last = std::max(last, impl.slots[slot].loaded);
    lease.pages_.push_back(impl.memory_of(slot));
  }
  if (last == 0) return lease;
  lock.unlock();
  impl.device->wait(last);
  lock.lock();
  for (const std::int32_t slot : lease.slots_) {
    if (impl.slots[slot].loaded <= last) impl.slots[slot].loaded = 0;
  }
  return lease;
}

void Residency::prefetch(std::span<const PagePick> picks) {
  if (in_place()) return;
  Impl& impl = *impl_;
  const std::lock_guard lock(impl.mutex);
  std::size_t loading = 0;
  for (const PagePick& pick : picks) {
    const std::int32_t held = impl.find(pick);
    if (held >= 0) {
      if (impl.slots[held].pins == 0)
        impl.idle.splice(impl.idle.end(), impl.idle, impl.slots[held].place);
      continue;
    }
    // Not more than there are idle slots, or the first of these copies would be evicted by the
    // last.
    if (loading >= impl.idle.size()) break;
    const std::int32_t slot = impl.load(pick);
    impl.idle.splice(impl.idle.end(), impl.idle, impl.slots[slot].place);
    ++loading;
  }
}

void Residency::forget(PageId page) {
  if (in_place()) return;
  Impl& impl = *impl_;
  Event loading = 0;
  {
    const std::lock_guard lock(impl.mutex);
    const auto found = impl.slot_of.find(page);
    if (found == impl.slot_of.end()) return;
    const std::int32_t slot = found->second;
    loading = impl.slots[slot].loaded;
    impl.vacate(slot);
    if (impl.slots[slot].pins == 0)
      impl.idle.splice(impl.idle.begin(), impl.idle, impl.slots[slot].place);
  }
  // Its memory may be written as soon as this returns.
  if (loading != 0) impl.device->wait(loading);
}

ResidencyStats Residency::stats() const {
  const std::lock_guard lock(impl_->mutex);
  ResidencyStats stats = impl_->stats;
  stats.slots = static_cast<std::int64_t>(impl_->slots.size());
  stats.resident = static_cast<std::int64_t>(impl_->slot_of.size());
  stats.pinned = static_cast<std::int64_t>(impl_->busy.size());
  return stats;
}

void Residency::check_integrity() const {
  const std::lock_guard lock(impl_->mutex);
  const auto& slots = impl_->slots;
  if (impl_->idle.size() + impl_->busy.size() != slots.size())
    throw IntegrityError(message("of ", slots.size(), " device slots ", impl_->idle.size(),
                                 " are idle and ", impl_->busy.size(), " busy"));
  std::size_t named = 0;
  for (std::size_t s = 0; s < slots.size(); ++s) {
    if (slots[s].pins < 0 || *slots[s].place != static_cast<std::int32_t>(s))
      throw IntegrityError(message("device slot ", s, " has ", slots[s].pins, " pins"));
    if (slots[s].page == kNoPage) continue;
    ++named;
    const auto found = impl_->slot_of.find(slots[s].page);
    if (found == impl_->slot_of.end() || found->second != static_cast<std::int32_t>(s))
      throw IntegrityError(message("page ", slots[s].page, " in device slot ", s, " is not found"));
  }
  if (named != impl_->slot_of.size())
    throw IntegrityError(
        message(impl_->slot_of.size(), " pages are listed, ", named, " device slots hold one"));
  for (const std::int32_t slot : impl_->busy) {
    if (slots[slot].pins == 0)
      throw IntegrityError(message("device slot ", slot, " is busy without a pin"));
  }
}

}  // namespace icecache

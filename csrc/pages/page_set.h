// PageSet: pages of a pool that go back to it when the last set that shares them lets go.
//
// Threads: none of its own; the pool's rules hold.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "pages/page_pool.h"

namespace icecache {

class PageSet {
 public:
  PageSet() = default;
  // `count` pages; page i belongs to head i % heads. In memory the pages of one head lie next to
  // each other: a device reads one head at a time, and its TLB then covers what it reads.
  PageSet(PagePool& pool, std::size_t count, std::size_t heads, const PageOwner& owner)
      : pool_(&pool) {
    std::vector<PageId> fresh;
    ids_.reserve(count);
    pool.allocate(count, owner, fresh);
    for (std::size_t i = 0; i < count; ++i) {
      ids_.push_back(fresh[i % heads * (count / heads) + i / heads]);
    }
  }
  // The first `shared` pages of another set, and new ones in place of those behind them.
  PageSet(const PageSet& other, std::size_t shared, const PageOwner& owner) : pool_(other.pool_) {
    std::vector<PageId> fresh;
    ids_.reserve(other.size());  // nothing throws once there are pages
    pool_->allocate(other.size() - shared, owner, fresh);
    for (std::size_t i = 0; i < shared; ++i) pool_->retain(other.ids_[i]);
    ids_.assign(other.ids_.begin(), other.ids_.begin() + static_cast<std::ptrdiff_t>(shared));
    ids_.insert(ids_.end(), fresh.begin(), fresh.end());
  }
  PageSet(PageSet&& other) noexcept { swap(other); }
  PageSet& operator=(PageSet&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PageSet() {
    for (const PageId id : ids_) pool_->release(id);
  }
  // Lets the set grow to `count` pages without an allocation of its own.
  void reserve(std::size_t count) { ids_.reserve(count); }
  // Takes over the pages of another set, behind its own. REQUIRES: reserve() for all of them.
  void append(PageSet&& other) noexcept {
    for (const PageId id : other.ids_) ids_.push_back(id);  // a range: GCC 13 warns of nothing
    other.ids_.clear();
  }
  std::byte* data(std::size_t i) const { return pool_->data(ids_[i]); }
  // Addresses of the pages, beginning with page `first`.
  std::vector<std::byte*> table(std::size_t first = 0) const {
    std::vector<std::byte*> addresses;
    for (std::size_t i = first; i < ids_.size(); ++i) addresses.push_back(pool_->data(ids_[i]));
    return addresses;
  }
  std::size_t size() const { return ids_.size(); }
  // Whether another set shares one of the pages, beginning with page `first`.
  bool is_shared(std::size_t first = 0) const {
    for (std::size_t i = first; i < ids_.size(); ++i) {
      if (!pool_->unique(ids_[i])) return true;
    }
    return false;
  }

 private:
  void swap(PageSet& other) noexcept {
    std::swap(pool_, other.pool_);
    ids_.swap(other.ids_);
  }
  PagePool* pool_ = nullptr;
  std::vector<PageId> ids_;
};

}  // namespace icecache

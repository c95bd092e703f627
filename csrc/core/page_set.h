// PageSet: pages of a pool that go back to it when the last set that shares them lets go.
//
// Threads: none of its own; the pool's rules hold.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "icecache/page_pool.h"

namespace icecache {

class PageSet {
 public:
  PageSet() = default;
  PageSet(PagePool& pool, std::size_t count, const PageOwner& owner) : pool_(&pool) {
    pool.allocate(count, owner, ids_);
  }
  // The first `shared` pages of each `stride` of another set, and new ones behind them.
  PageSet(const PageSet& other, std::size_t shared, std::size_t stride, const PageOwner& owner)
      : pool_(other.pool_), ids_(other.ids_) {
    std::vector<PageId> fresh;
    const std::size_t runs = ids_.size() / stride;
    ids_.clear();
    pool_->allocate(runs * (stride - shared), owner, fresh);
    for (std::size_t i = 0, next = 0; i < runs * stride; ++i) {
      ids_.push_back(i % stride < shared ? other.ids_[i] : fresh[next++]);
      if (i % stride < shared) pool_->retain(other.ids_[i]);
    }
  }
  PageSet(PageSet&& other) noexcept { swap(other); }
  PageSet& operator=(PageSet&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PageSet() {
    for (const PageId id : ids_) pool_->release(id);
  }
  std::byte* data(std::size_t i) const { return pool_->data(ids_[i]); }
  std::vector<std::byte*> table() const {
    std::vector<std::byte*> addresses;
    for (const PageId id : ids_) addresses.push_back(pool_->data(id));
    return addresses;
  }
  std::size_t size() const { return ids_.size(); }
  // Whether a fork has pages of this set, or it has pages of another, leaving out the first `kept`
  // of each `stride`.
  bool is_shared(std::size_t kept = 0, std::size_t stride = 1) const {
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      if (i % stride >= kept && !pool_->unique(ids_[i])) return true;
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

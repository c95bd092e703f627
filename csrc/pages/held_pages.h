// HeldPages: a list of pages of a pool that holds a reference to each: copies share the pages, and
// a page goes back to the pool when the last list lets go of it.
//
// `Page` is what the list's owner knows of a page: a struct whose `id` names it, kNoPage for none.
//
// Threads: none of its own; the pool's rules hold.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "pages/page_pool.h"

namespace icecache {

template <typename Page>
class HeldPages {
 public:
  HeldPages() = default;  // stays empty
  explicit HeldPages(PagePool& pool) : pool_(&pool) {}
  HeldPages(const HeldPages& other) : pool_(other.pool_), pages_(other.pages_) {
    for (const Page& page : pages_) retain(page);
  }
  HeldPages(HeldPages&& other) noexcept : pool_(other.pool_) { pages_.swap(other.pages_); }
  HeldPages& operator=(HeldPages other) noexcept {
    std::swap(pool_, other.pool_);
    pages_.swap(other.pages_);
    return *this;
  }
  ~HeldPages() {
    for (const Page& page : pages_) release(page);
  }

  PagePool& pool() const { return *pool_; }
  std::size_t size() const { return pages_.size(); }
  std::size_t capacity() const { return pages_.capacity(); }
  const Page& operator[](std::size_t i) const { return pages_[i]; }
  Page& operator[](std::size_t i) { return pages_[i]; }
  const Page& back() const { return pages_.back(); }
  Page& back() { return pages_.back(); }
  auto begin() const { return pages_.begin(); }
  auto end() const { return pages_.end(); }

  void reserve(std::size_t count) { pages_.reserve(count); }
  // Takes the caller's reference over. REQUIRES: reserve() for it.
  void add(const Page& page) noexcept { pages_.push_back(page); }
  // Shares a page of another list. REQUIRES: reserve() for it.
  void share(const Page& page) noexcept {
    retain(page);
    add(page);
  }
  // Lets go of a page; takes over the caller's reference to the one in its place.
  void replace(std::size_t i, const Page& page) noexcept {
    release(std::exchange(pages_[i], page));
  }
  void pop_back() noexcept {
    release(pages_.back());
    pages_.pop_back();
  }
  void pop_front(std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) release(pages_[i]);
    pages_.erase(pages_.begin(), pages_.begin() + static_cast<std::ptrdiff_t>(count));
  }
  // All pages of another list, behind its own. REQUIRES: reserve() for them.
  void append(HeldPages&& other) noexcept {
    for (const Page& page : std::exchange(other.pages_, {})) add(page);
  }

 private:
  void retain(const Page& page) const {
    if (page.id != kNoPage) pool_->retain(page.id);
  }
  void release(const Page& page) const noexcept {
    if (page.id != kNoPage) pool_->release(page.id);
  }

  PagePool* pool_ = nullptr;
  std::vector<Page> pages_;
};

}  // namespace icecache

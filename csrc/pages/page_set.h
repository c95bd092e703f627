// PageSet: pages of a pool that go back to it when the last set that shares them lets go.
//
// Threads: none of its own; the pool's rules hold.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "pages/held_pages.h"
#include "pages/page_pool.h"

namespace icecache {

class PageSet {
 public:
  PageSet() = default;
  // `count` pages; page i belongs to head i % heads. In memory the pages of one head lie next to
  // each other: a device reads one head at a time, and its TLB then covers what it reads.
  PageSet(PagePool& pool, std::size_t count, std::size_t heads, const PageOwner& owner)
      : pages_(pool) {
    std::vector<PageId> fresh;
    pages_.reserve(count);
    pool.allocate(count, owner, fresh);
    for (std::size_t i = 0; i < count; ++i) {
      pages_.add({fresh[i % heads * (count / heads) + i / heads]});
    }
  }
  // The first `shared` pages of another set, and new ones in place of those behind them.
  PageSet(const PageSet& other, std::size_t shared, const PageOwner& owner)
      : pages_(other.pages_.pool()) {
    std::vector<PageId> fresh;
    pages_.reserve(other.size());  // nothing throws once there are pages
    pages_.pool().allocate(other.size() - shared, owner, fresh);
    for (std::size_t i = 0; i < shared; ++i) pages_.share(other.pages_[i]);
    for (const PageId id : fresh) pages_.add({id});
  }
  // Lets the set grow to `count` pages without an allocation of its own.
  void reserve(std::size_t count) { pages_.reserve(count); }
  // Takes over the pages of another set, behind its own. REQUIRES: reserve() for all of them.
  void append(PageSet&& other) noexcept { pages_.append(std::move(other.pages_)); }
  std::byte* data(std::size_t i) const { return pages_.pool().data(pages_[i].id); }
  // Addresses of the pages, beginning with page `first`.
  std::vector<std::byte*> table(std::size_t first = 0) const {
    std::vector<std::byte*> addresses;
    for (std::size_t i = first; i < pages_.size(); ++i)
      addresses.push_back(pages_.pool().data(pages_[i].id));
    return addresses;
  }
  std::size_t size() const { return pages_.size(); }
  // Whether another set shares one of the pages, beginning with page `first`.
  bool is_shared(std::size_t first = 0) const {
    for (std::size_t i = first; i < pages_.size(); ++i) {
      if (!pages_.pool().unique(pages_[i].id)) return true;
    }
    return false;
  }

 private:
  struct Page {
    PageId id;
  };
  HeldPages<Page> pages_;
};

}  // namespace icecache

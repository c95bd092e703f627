// PageRun: consecutive tokens of one (sequence, layer, KV head) in order of position, in the model's
// type: the sink, and the tail of tokens that are not in the index (the window and what is on its
// way from it).
//
// Copying shares the pages by reference count; a write to a shared page copies it first.
// Threads: none of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "pages/head_context.h"
#include "pages/held_pages.h"
#include "pages/page_pool.h"
#include "pages/tokens.h"

namespace icecache {

class PageRun {
 public:
  PageRun(const HeadContext& context, std::int32_t first_position);

  std::int32_t first_position() const { return first_; }
  std::int32_t count() const { return count_; }
  std::int32_t end_position() const { return first_ + count_; }

  // Pages that append(n) takes from the pool at most.
  std::size_t pages_for(std::int64_t n) const;
  // Rows [0, n) of a head. All or nothing: throws OutOfPages before any write.
  void append(const TensorView& keys, const TensorView& values, std::int64_t head,
              std::int64_t first_row, std::int64_t n);
  // Drops the n oldest tokens.
  void pop_front(std::int32_t n) noexcept;
  // Keeps positions below `position`; an empty run restarts there.
  void truncate(std::int32_t position) noexcept;

  // Appends its tokens at positions from `begin` to below `end`, one pick per page. local_page
  // counts from 0.
  void picks(std::int32_t begin, std::int32_t end, std::vector<PagePick>& out) const;
  // Position of slot 0 of the i-th page.
  std::int32_t page_position(std::size_t i) const {
    return first_ - offset_ + static_cast<std::int32_t>(i) * page_size_;
  }
  // Copies the first n tokens into rows [n, D] of the model's type.
  void gather(std::int32_t n, std::byte* keys, std::byte* values) const;
  std::size_t page_count() const { return pages_.size(); }
  // Sets the entries of its pages.
  void mark_pages(std::vector<bool>& held) const {
    for (const Page& page : pages_) held[page.id] = true;
  }
  void check_integrity() const;

 private:
  struct Page {
    PageId id;
    std::uint64_t epoch;
  };
  // True where the next append has to copy the last page first.
  bool writes_shared_page() const;
  // Pages that n more tokens need beside the ones that are there.
  std::size_t fresh_pages(std::int64_t n) const;

  PageOwner owner_;
  std::int32_t page_size_;
  std::size_t row_bytes_;
  std::int32_t first_;
  std::int32_t count_ = 0;
  std::int32_t offset_ = 0;  // slot of the first token in the first page
  HeldPages<Page> pages_;
};

}  // namespace icecache

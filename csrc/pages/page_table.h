// PageTable: the pages of one index and the token in each slot.
//
// Pages have local numbers 0..page_count()-1 that stay valid until the page is dropped; a dropped
// number is used again. A mask tells which slots of a page hold a token; removing tokens and
// splitting clear bits and leave the bytes, so neither writes to a page that is shared. A slot id
// is local_page * S + slot.
//
// Copying a PageTable shares its pages by reference count; the first write to a shared page copies
// it. Every write method either completes or throws OutOfPages or std::bad_alloc and changes
// nothing.
//
// Threads: none of its own; one caller at a time (const methods: any number).
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "icecache/step_trace.h"
#include "pages/head_context.h"
#include "pages/held_pages.h"
#include "pages/page_pool.h"
#include "pages/tokens.h"

namespace icecache {

class PageTable {
 public:
  struct Page {
    PageId id = kNoPage;  // kNoPage: the number is not in use
    int next_free = -1;   // of such a number: the next one, -1: none
    std::uint64_t epoch = 0;
    std::byte* memory = nullptr;
  };

  explicit PageTable(const HeadContext& context);

  int page_count() const { return static_cast<int>(pages_.size()); }
  int used_pages() const { return page_count() - free_numbers_; }
  int page_size() const { return page_size_; }
  int head_dim() const { return head_dim_; }
  // What its rows mean. With kv_dtype = "int8" that is fitted to the tokens of add_pages().
  const RowFormat& format() const { return format_; }
  std::size_t row_bytes() const { return row_bytes_; }
  std::int32_t size() const { return tokens_; }

  const Page& page(int local) const { return pages_[local]; }
  bool in_use(int local) const { return pages_[local].id != kNoPage; }
  std::uint32_t mask(int local) const { return masks_[local]; }
  int count(int local) const { return std::popcount(masks_[local]); }
  bool full(int local) const { return count(local) == page_size_; }
  // [page_count()]; bit s: slot s holds a token.
  std::span<const std::uint32_t> masks() const { return masks_; }
  std::int32_t position(int local, int slot) const { return positions_[local * page_size_ + slot]; }
  // [S] of a page.
  std::span<const std::int32_t> positions_of(int local) const {
    return std::span(positions_).subspan(static_cast<std::size_t>(local) * page_size_, page_size_);
  }
  // Of a slot id, which counts the slots of all pages: its page, and its place there.
  int page_of(std::int32_t slot) const {
    return slot >> std::countr_zero(static_cast<std::uint32_t>(page_size_));
  }
  int place_of(std::int32_t slot) const { return slot & (page_size_ - 1); }
  // positions of all slots, [page_count() * S]; -1 for slots not in use.
  const std::vector<std::int32_t>& positions() const { return positions_; }
  // Rows as they are stored: row_bytes() each.
  const std::byte* keys(int local) const { return pages_[local].memory; }
  const std::byte* values(int local) const { return keys(local) + page_size_ * row_bytes_; }
  const std::byte* key(int local, int slot) const { return keys(local) + slot * row_bytes_; }
  const std::byte* value(int local, int slot) const { return values(local) + slot * row_bytes_; }
  // The key or value as fp32, [D].
  void key(int local, int slot, float* out) const;
  void value(int local, int slot, float* out) const;
  PagePick pick(int local, std::uint32_t slots) const;

  // For an empty table: new pages numbered page_count().. in order: page p takes the rows
  // order[bounds[p]..bounds[p+1]) of the block, whose format is the table's from now on. All or
  // nothing.
  void add_pages(const TokenBlock& tokens, std::span<const std::int32_t> order,
                 std::span<const std::int32_t> bounds);
  // A new page with one token, given by rows of format(), in slot 0; returns its number.
  int open(const std::byte* key, const std::byte* value, std::int32_t position);
  // Adds one token to a page with room, in its first free slot; returns the slot.
  int append(int local, const std::byte* key, const std::byte* value, std::int32_t position);
  // Moves the tokens of a mask to the first slots of a new page, in slot order; the others stay in
  // their slots. Returns the number of the new page.
  int split(int local, std::uint32_t moved);
  // Removes the tokens of a mask. A page left empty is dropped.
  void remove(int local, std::uint32_t slots) noexcept;

  // K and V of all tokens in order of position, rows as they are stored.
  void gather(std::byte* keys, std::byte* values) const;
  std::size_t memory_bytes() const;
  // Sets the entries of its pages.
  void mark_pages(std::vector<bool>& held) const {
    for (const Page& page : pages_) {
      if (page.id != kNoPage) held[page.id] = true;
    }
  }
  // Throws IntegrityError when counts, positions or pages disagree.
  void check_integrity() const;

 private:
  // Makes the page writable: itself where unique, else a copy.
  void own(int local);
  // Makes room for one more number; take_number() needs no memory then.
  void reserve_number();
  int take_number() noexcept;
  void drop(int local) noexcept;

  PageOwner owner_;
  int page_size_;
  int head_dim_;
  std::size_t row_bytes_;
  RowFormat format_;
  std::int32_t tokens_ = 0;
  HeldPages<Page> pages_;
  std::vector<std::uint32_t> masks_;
  std::vector<std::int32_t> positions_;
  int first_free_ = -1, free_numbers_ = 0;  // numbers of pages that were dropped, last first
};

}  // namespace icecache

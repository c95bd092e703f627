#include "pages/page_run.h"

#include <algorithm>
#include <cstring>

#include "icecache/error.h"

namespace icecache {

PageRun::PageRun(const HeadContext& context, std::int32_t first_position)
    : owner_(context.owner),
      page_size_(context.run_page_size()),
      row_bytes_(context.row_bytes()),
      first_(first_position),
      pages_(*context.pool) {}

bool PageRun::writes_shared_page() const {
  const std::int64_t used = offset_ + count_;
  return used < static_cast<std::int64_t>(pages_.size()) * page_size_ &&
         !pages_.pool().unique(pages_.back().id);
}

std::size_t PageRun::fresh_pages(std::int64_t n) const {
  const std::int64_t used = offset_ + count_;
  const std::int64_t room = static_cast<std::int64_t>(pages_.size()) * page_size_ - used;
  return static_cast<std::size_t>((std::max<std::int64_t>(0, n - room) + page_size_ - 1) /
                                  page_size_);
}

std::size_t PageRun::pages_for(std::int64_t n) const {
  return n <= 0 ? 0 : fresh_pages(n) + (writes_shared_page() ? 1 : 0);
}

void PageRun::append(const TensorView& keys, const TensorView& values, std::int64_t head,
                     std::int64_t first_row, std::int64_t n) {
  if (n <= 0) return;
  // Asked once: a fork that is appended to at the same time may give up its share in between.
  const bool copies = writes_shared_page();
  PagePool& pool = pages_.pool();
  std::vector<PageId> fresh;
  const std::size_t wanted = fresh_pages(n) + (copies ? 1 : 0);
  fresh.reserve(wanted);
  pages_.reserve(pages_.size() + wanted);
  pool.allocate(wanted, owner_, fresh);
  std::size_t next = 0;
  std::int64_t slot = offset_ + count_;
  if (copies) {
    std::memcpy(pool.data(fresh[next]), pool.data(pages_.back().id), pool.page_bytes());
    pages_.replace(pages_.size() - 1, {fresh[next++], 0});
  }
  for (std::int64_t row = 0; row < n; ++row, ++slot) {
    if (slot == static_cast<std::int64_t>(pages_.size()) * page_size_) {
      std::memset(pool.data(fresh[next]), 0, pool.page_bytes());
      pages_.add({fresh[next++], 0});
    }
    std::byte* target = pool.data(pages_.back().id) + (slot % page_size_) * row_bytes_;
    std::memcpy(target, keys.at(head, first_row + row), row_bytes_);
    std::memcpy(target + page_size_ * row_bytes_, values.at(head, first_row + row), row_bytes_);
    if (slot % page_size_ == page_size_ - 1 || row + 1 == n) {
      pages_.back().epoch = pool.seal(pages_.back().id);
    }
  }
  count_ += static_cast<std::int32_t>(n);
}

void PageRun::pop_front(std::int32_t n) noexcept {
  n = std::min(n, count_);
  first_ += n;
  count_ -= n;
  offset_ += n;
  const std::size_t emptied =
      count_ == 0 ? pages_.size() : static_cast<std::size_t>(offset_ / page_size_);
  pages_.pop_front(emptied);
  offset_ = count_ == 0 ? 0 : offset_ % page_size_;
}

void PageRun::truncate(std::int32_t position) noexcept {
  if (position >= end_position()) return;
  count_ = std::max(0, position - first_);
  if (count_ == 0) {
    first_ = position;
    offset_ = 0;
  }
  const std::size_t kept =
      count_ == 0 ? 0 : static_cast<std::size_t>((offset_ + count_ + page_size_ - 1) / page_size_);
  while (pages_.size() > kept) pages_.pop_back();
}

void PageRun::picks(std::int32_t begin, std::int32_t end, std::vector<PagePick>& out) const {
  begin = std::max(begin, first_);
  end = std::min(end, end_position());
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    const std::int32_t base = page_position(i);
    std::uint32_t slots = 0;
    for (std::int32_t s = std::max(0, begin - base); s < page_size_ && base + s < end; ++s) {
      slots |= 1u << s;
    }
    if (slots != 0) out.push_back({pages_[i].id, pages_[i].epoch, slots, static_cast<int>(i)});
  }
}

void PageRun::gather(std::int32_t n, std::byte* keys, std::byte* values) const {
  for (std::int32_t i = 0; i < n; ++i) {
    const std::int32_t slot = offset_ + i;
    const std::byte* row =
        pages_.pool().data(pages_[slot / page_size_].id) + (slot % page_size_) * row_bytes_;
    std::memcpy(keys + i * row_bytes_, row, row_bytes_);
    std::memcpy(values + i * row_bytes_, row + page_size_ * row_bytes_, row_bytes_);
  }
}

void PageRun::check_integrity() const {
  const std::int32_t slots = offset_ + count_;
  if (offset_ < 0 || offset_ >= page_size_ ||
      static_cast<std::size_t>((slots + page_size_ - 1) / page_size_) != pages_.size())
    throw IntegrityError(message("run at ", first_, " with ", count_, " tokens at offset ", offset_,
                                 " has ", pages_.size(), " pages"));
  for (const Page& page : pages_) {
    pages_.pool().verify(page.id, page.epoch, owner_.layer, owner_.head);
  }
}

}  // namespace icecache

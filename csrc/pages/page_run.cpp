#include "pages/page_run.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "icecache/error.h"

namespace icecache {

PageRun::PageRun(const HeadContext& context, std::int32_t first_position)
    : pool_(context.pool),
      owner_(context.owner),
      page_size_(static_cast<std::int32_t>(context.config->page_size)),
      row_bytes_(static_cast<std::size_t>(context.head_dim) * size_of(context.dtype)),
      first_(first_position) {}

PageRun::PageRun(const PageRun& other)
    : pool_(other.pool_),
      owner_(other.owner_),
      page_size_(other.page_size_),
      row_bytes_(other.row_bytes_),
      first_(other.first_),
      count_(other.count_),
      offset_(other.offset_),
      pages_(other.pages_) {
  for (const Page& page : pages_) pool_->retain(page.id);
}

PageRun::PageRun(PageRun&& other) noexcept
    : pool_(other.pool_),
      owner_(other.owner_),
      page_size_(other.page_size_),
      row_bytes_(other.row_bytes_),
      first_(other.first_) {
  swap(other);
}

PageRun& PageRun::operator=(PageRun other) noexcept {
  swap(other);
  return *this;
}

PageRun::~PageRun() {
  for (const Page& page : pages_) pool_->release(page.id);
}

void PageRun::swap(PageRun& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(owner_, other.owner_);
  std::swap(page_size_, other.page_size_);
  std::swap(row_bytes_, other.row_bytes_);
  std::swap(first_, other.first_);
  std::swap(count_, other.count_);
  std::swap(offset_, other.offset_);
  std::swap(pages_, other.pages_);
}

bool PageRun::writes_shared_page() const {
  const std::int64_t used = offset_ + count_;
  return used < static_cast<std::int64_t>(pages_.size()) * page_size_ &&
         !pool_->unique(pages_.back().id);
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
  std::vector<PageId> fresh;
  const std::size_t wanted = fresh_pages(n) + (copies ? 1 : 0);
  fresh.reserve(wanted);
  pages_.reserve(pages_.size() + wanted);
  pool_->allocate(wanted, owner_, fresh);
  std::size_t next = 0;
  std::int64_t slot = offset_ + count_;
  if (copies) {
    std::memcpy(pool_->data(fresh[next]), pool_->data(pages_.back().id), pool_->page_bytes());
    pool_->release(pages_.back().id);
    pages_.back().id = fresh[next++];
  }
  for (std::int64_t row = 0; row < n; ++row, ++slot) {
    if (slot == static_cast<std::int64_t>(pages_.size()) * page_size_) {
      std::memset(pool_->data(fresh[next]), 0, pool_->page_bytes());
      pages_.push_back({fresh[next++], 0});
    }
    std::byte* target = pool_->data(pages_.back().id) + (slot % page_size_) * row_bytes_;
    std::memcpy(target, keys.at(head, first_row + row), row_bytes_);
    std::memcpy(target + page_size_ * row_bytes_, values.at(head, first_row + row), row_bytes_);
    if (slot % page_size_ == page_size_ - 1 || row + 1 == n) {
      pages_.back().epoch = pool_->seal(pages_.back().id);
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
  for (std::size_t i = 0; i < emptied; ++i) pool_->release(pages_[i].id);
  pages_.erase(pages_.begin(), pages_.begin() + static_cast<std::ptrdiff_t>(emptied));
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
  while (pages_.size() > kept) {
    pool_->release(pages_.back().id);
    pages_.pop_back();
  }
}

void PageRun::picks(std::int32_t end, std::vector<PagePick>& out) const {
  end = std::min(end, end_position());
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    const std::int32_t base = page_position(i);
    std::uint32_t slots = 0;
    for (std::int32_t s = std::max(0, first_ - base); s < page_size_ && base + s < end; ++s) {
      slots |= 1u << s;
    }
    if (slots != 0) out.push_back({pages_[i].id, pages_[i].epoch, slots, static_cast<int>(i)});
  }
}

void PageRun::gather(std::int32_t n, std::byte* keys, std::byte* values) const {
  for (std::int32_t i = 0; i < n; ++i) {
    const std::int32_t slot = offset_ + i;
    const std::byte* row =
        pool_->data(pages_[slot / page_size_].id) + (slot % page_size_) * row_bytes_;
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
    pool_->verify(page.id, page.epoch, owner_.layer, owner_.head);
  }
}

}  // namespace icecache

#include "pages/page_table.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <numeric>
#include <utility>

#include "icecache/error.h"

namespace icecache {
namespace {

// The mask of slots 0..count-1.
std::uint32_t slot_mask(int count) {
  return count == 32 ? 0xffffffffu : (1u << count) - 1;
}

}  // namespace

PageTable::PageTable(const HeadContext& context)
    : owner_(context.owner),
      page_size_(static_cast<int>(context.config->page_size)),
      head_dim_(context.head_dim),
      row_bytes_(context.stored_row_bytes()),
      format_(context.dtype, context.head_dim),
      pages_(*context.pool) {}

void PageTable::key(int local, int slot, float* out) const {
  format_.decode_key(key(local, slot), out);
}

void PageTable::value(int local, int slot, float* out) const {
  format_.decode_value(value(local, slot), out);
}

PagePick PageTable::pick(int local, std::uint32_t slots) const {
  return {pages_[local].id, pages_[local].epoch, slots, local};
}

void PageTable::add_pages(const TokenBlock& tokens, std::span<const std::int32_t> order,
                          std::span<const std::int32_t> bounds) {
  const std::size_t added = bounds.empty() ? 0 : bounds.size() - 1;
  if (tokens.format != nullptr) format_ = *tokens.format;
  assert(format_.row_bytes() == row_bytes_);
  std::vector<PageId> ids;
  ids.reserve(added);
  pages_.reserve(pages_.size() + added);
  masks_.reserve(masks_.size() + added);
  positions_.reserve(positions_.size() + added * page_size_);
  pages_.pool().allocate(added, owner_, ids);
  for (std::size_t p = 0; p < added; ++p) {
    const std::int32_t count = bounds[p + 1] - bounds[p];
    std::byte* keys = pages_.pool().data(ids[p]);
    std::byte* values = keys + page_size_ * row_bytes_;
    for (std::int32_t s = 0; s < count; ++s) {
      const std::size_t row = static_cast<std::size_t>(order[bounds[p] + s]);
      std::memcpy(keys + s * row_bytes_, tokens.keys + row * row_bytes_, row_bytes_);
      std::memcpy(values + s * row_bytes_, tokens.values + row * row_bytes_, row_bytes_);
      positions_.push_back(tokens.first_position + order[bounds[p] + s]);
    }
    positions_.resize(positions_.size() + (page_size_ - count), -1);
    // Slots without a token stay readable: kernels may load a whole page.
    std::memset(keys + count * row_bytes_, 0, (page_size_ - count) * row_bytes_);
    std::memset(values + count * row_bytes_, 0, (page_size_ - count) * row_bytes_);
    pages_.add({.id = ids[p], .epoch = pages_.pool().seal(ids[p]), .memory = keys});
    masks_.push_back(slot_mask(count));
    tokens_ += count;
  }
}

void PageTable::own(int local) {
  PagePool& pool = pages_.pool();
  if (pool.unique(pages_[local].id)) return;
  const PageId copy = pool.allocate(owner_);
  std::byte* memory = pool.data(copy);
  std::memcpy(memory, pages_[local].memory, pool.page_bytes());
  pages_.replace(local, {.id = copy, .epoch = pool.seal(copy), .memory = memory});
}

void PageTable::reserve_number() {
  if (first_free_ >= 0) return;
  const auto grown = [](std::size_t size, std::size_t capacity, std::size_t added) {
    return size + added <= capacity ? capacity : 2 * size + added;
  };
  const std::size_t slots = static_cast<std::size_t>(page_size_);
  pages_.reserve(grown(pages_.size(), pages_.capacity(), 1));
  masks_.reserve(grown(masks_.size(), masks_.capacity(), 1));
  positions_.reserve(grown(positions_.size(), positions_.capacity(), slots));
}

int PageTable::take_number() noexcept {
  if (first_free_ >= 0) {
    const int local = std::exchange(first_free_, pages_[first_free_].next_free);
    --free_numbers_;
    return local;
  }
  pages_.add({});
  masks_.push_back(0);
  positions_.resize(positions_.size() + page_size_, -1);
  return page_count() - 1;
}

void PageTable::drop(int local) noexcept {
  pages_.replace(local, {.next_free = std::exchange(first_free_, local)});
  ++free_numbers_;
}

int PageTable::open(const std::byte* key, const std::byte* value, std::int32_t position) {
  reserve_number();
  const PageId fresh = pages_.pool().allocate(owner_);
  const int local = take_number();
  std::byte* memory = pages_.pool().data(fresh);
  std::memset(memory, 0, pages_.pool().page_bytes());
  pages_[local] = {.id = fresh, .memory = memory};
  masks_[local] = 0;
  append(local, key, value, position);
  return local;
}

int PageTable::append(int local, const std::byte* key, const std::byte* value,
                      std::int32_t position) {
  own(local);
  Page& page = pages_[local];
  const int slot = std::countr_one(masks_[local]);
  std::byte* target = page.memory + slot * row_bytes_;
  std::memcpy(target, key, row_bytes_);
  std::memcpy(target + page_size_ * row_bytes_, value, row_bytes_);
  masks_[local] |= 1u << slot;
  positions_[local * page_size_ + slot] = position;
  ++tokens_;
  page.epoch = pages_.pool().seal(page.id);
  return slot;
}

int PageTable::split(int local, std::uint32_t moved) {
  reserve_number();
  const PageId fresh = pages_.pool().allocate(owner_);
  const int other = take_number();
  const Page& page = pages_[local];
  std::int32_t* from = positions_.data() + local * page_size_;
  std::int32_t* to = positions_.data() + other * page_size_;
  const std::byte* source = page.memory;
  std::byte* target = pages_.pool().data(fresh);
  const std::size_t values = page_size_ * row_bytes_;
  std::memset(target, 0, pages_.pool().page_bytes());
  int taken = 0;
  for (int s = 0; s < page_size_; ++s) {
    if ((moved & masks_[local]) >> s & 1u) {
      std::memcpy(target + taken * row_bytes_, source + s * row_bytes_, row_bytes_);
      std::memcpy(target + values + taken * row_bytes_, source + values + s * row_bytes_,
                  row_bytes_);
      to[taken++] = std::exchange(from[s], -1);
    }
  }
  masks_[local] &= ~moved;
  pages_[other] = {.id = fresh, .epoch = pages_.pool().seal(fresh), .memory = target};
  masks_[other] = slot_mask(taken);
  return other;
}

void PageTable::remove(int local, std::uint32_t slots) noexcept {
  slots &= masks_[local];
  for (int s = 0; s < page_size_; ++s) {
    if (slots >> s & 1u) positions_[local * page_size_ + s] = -1;
  }
  tokens_ -= std::popcount(slots);
  masks_[local] &= ~slots;
  if (masks_[local] == 0) drop(local);
}

void PageTable::gather(std::byte* keys, std::byte* values) const {
  std::vector<std::int32_t> slots;
  slots.reserve(tokens_);
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(positions_.size()); ++i) {
    if (positions_[i] >= 0) slots.push_back(i);
  }
  std::sort(slots.begin(), slots.end(),
            [&](std::int32_t a, std::int32_t b) { return positions_[a] < positions_[b]; });
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const int local = slots[i] / page_size_, slot = slots[i] % page_size_;
    std::memcpy(keys + i * row_bytes_, key(local, slot), row_bytes_);
    std::memcpy(values + i * row_bytes_, value(local, slot), row_bytes_);
  }
}

std::size_t PageTable::memory_bytes() const {
  return pages_.capacity() * sizeof(Page) + masks_.capacity() * sizeof(std::uint32_t) +
         positions_.capacity() * sizeof(std::int32_t) + format_.memory_bytes();
}

void PageTable::check_integrity() const {
  std::int32_t tokens = 0;
  std::vector<std::int32_t> seen;
  for (int p = 0; p < page_count(); ++p) {
    const Page& page = pages_[p];
    if (page.id == kNoPage) {
      if (mask(p) != 0) throw IntegrityError(message("page ", p, " is free but not empty"));
      continue;
    }
    pages_.pool().verify(page.id, page.epoch, owner_.layer, owner_.head);
    if (mask(p) == 0 || (mask(p) & ~slot_mask(page_size_)) != 0)
      throw IntegrityError(message("page ", p, " has slot mask ", mask(p)));
    std::uint32_t held = 0;
    for (int s = 0; s < page_size_; ++s) {
      const std::int32_t position = positions_[p * page_size_ + s];
      if (position < 0) continue;
      held |= 1u << s;
      seen.push_back(position);
    }
    if (held != mask(p))
      throw IntegrityError(
          message("page ", p, " has positions in slots ", held, ", slot mask ", mask(p)));
    tokens += count(p);
  }
  if (tokens != tokens_)
    throw IntegrityError(message("pages hold ", tokens, " tokens, the table says ", tokens_));
  std::sort(seen.begin(), seen.end());
  const auto twice = std::adjacent_find(seen.begin(), seen.end());
  if (twice != seen.end()) throw IntegrityError(message("position ", *twice, " is in two slots"));
}

}  // namespace icecache

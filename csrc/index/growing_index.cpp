#include "index/growing_index.h"

#include <algorithm>
#include <bit>

#include "icecache/error.h"

namespace icecache {
namespace {

constexpr std::size_t kMostRowBytes = row_bytes_of(DType::kFloat32, kMaxHeadDim);

}  // namespace

void GrowingIndex::built() {
  pages_of_node_ = pages_by_node();
}

void GrowingIndex::attach(int page, int node) {
  if (static_cast<int>(node_of_page_.size()) <= page) node_of_page_.resize(page + 1, -1);
  node_of_page_[page] = node;
  pages_of_node_[node].push_back(page);
}

// Its list has room for all the pages that it gets until it is split.
int GrowingIndex::add_node() {
  std::vector<int> pages;
  pages.reserve(2 * static_cast<std::size_t>(node_pages()) + 1);
  if (has_far_field()) far_.reserve(node_count_ + 1);
  pages_of_node_.push_back(std::move(pages));
  if (has_far_field()) far_.add_node();
  return node_count_++;
}

void GrowingIndex::insert(const TokenBlock& tokens) {
  const std::size_t row = context_.row_bytes();
  for (std::int32_t t = 0; t < tokens.count; ++t) {
    if (size() == 0) first_position_ = end_position_ = tokens.first_position + t;
    add_token(tokens.keys + t * row, tokens.values + t * row, tokens.first_position + t);
  }
}

int GrowingIndex::split_page(int page) {
  const std::uint32_t moved = splitter()->upper_half(page);
  const int other = table_.split(page, moved);
  whole_ = false;
  attach(other, node_of_page_[page]);
  if (has_sketches()) {
    sketch_.resize(table_.page_count());
    int to = 0;
    for (std::uint32_t slots = moved; slots != 0; slots &= slots - 1) {
      sketch_.copy(other, to++, page, std::countr_zero(slots));
    }
  }
  splitter()->page_split(page, other);
  shrink_node(node_of_page_[page]);
  whole_ = true;
  return other;
}

int GrowingIndex::open_page(const std::byte* key, const std::byte* value, std::int32_t position) {
  // Room first: where nothing else needs memory, the index is whole whatever fails.
  const auto number = static_cast<std::size_t>(table_.page_count()) + 1;
  if (node_of_page_.capacity() < number) node_of_page_.reserve(2 * number);
  if (has_sketches()) sketch_.resize(static_cast<int>(number));
  if (pages_of_node_.empty() || static_cast<int>(pages_of_node_.back().size()) >= node_pages()) {
    add_node();
  }
  pages_of_node_.back().reserve(pages_of_node_.back().size() + 1);
  const int page = table_.open(key, value, position);
  whole_ = false;
  end_position_ = position + 1;
  attach(page, node_count_ - 1);
  page_opened(page);
  return page;
}

void GrowingIndex::add_token(const std::byte* raw_key, const std::byte* raw_value,
                             std::int32_t position) {
  std::byte key_row[kMostRowBytes], value_row[kMostRowBytes];
  table_.format().encode_key(raw_key, key_row);
  table_.format().encode_value(raw_value, value_row);
  float key[kMaxHeadDim], value[kMaxHeadDim], place[2 * kMaxHeadDim];
  table_.format().decode_key(key_row, key);
  table_.format().decode_value(value_row, value);
  if (has_sketches()) space_.coordinates(key, value, DType::kFloat32, 1, place);
  int page = choose_page(key);
  if (page >= 0 && table_.full(page)) {
    const int other = split_page(page);
    page = choose_page(key);
    if (table_.full(page)) page = table_.full(other) ? -1 : other;
  }
  int slot = 0;
  if (page >= 0) {
    slot = table_.append(page, key_row, value_row, position);
    whole_ = false;
    end_position_ = position + 1;
  } else {
    page = open_page(key_row, value_row, position);
  }
  if (has_far_field()) far_.add(node_of_page_[page], value);
  if (has_sketches()) sketch_.write(page, slot, place);
  token_added(page);
  whole_ = true;
}

// The later half of its pages goes to a new node.
void GrowingIndex::shrink_node(int node) {
  if (static_cast<int>(pages_of_node_[node].size()) <= 2 * node_pages()) return;
  const int other = add_node();
  std::vector<int>& pages = pages_of_node_[node];
  const auto half = pages.begin() + static_cast<std::ptrdiff_t>(pages.size() / 2);
  for (auto page = half; page != pages.end(); ++page) attach(*page, other);
  pages.erase(half, pages.end());
  if (!has_far_field()) return;
  far_.assign(node, table_, pages_of_node_[node]);
  far_.assign(other, table_, pages_of_node_[other]);
}

void GrowingIndex::truncate(std::int32_t position) noexcept {
  if (position >= end_position_) return;
  const int s = table_.page_size();
  for (int page = 0; page < table_.page_count(); ++page) {
    if (!table_.in_use(page)) continue;
    std::uint32_t gone = 0;
    for (int slot = 0; slot < s; ++slot) {
      if (table_.position(page, slot) >= position) gone |= 1u << slot;
    }
    if (gone == 0) continue;
    table_.remove(page, gone);
    if (!whole_) continue;
    const int node = node_of_page_[page];
    if (!table_.in_use(page)) {
      std::erase(pages_of_node_[node], page);
      node_of_page_[page] = -1;
    }
    tokens_removed(page);
  }
  for (int node = 0; whole_ && has_far_field() && node < node_count_; ++node) {
    std::int32_t left = 0;
    for (const int page : pages_of_node_[node]) left += table_.count(page);
    if (left != far_.tokens(node)) far_.assign(node, table_, pages_of_node_[node]);
  }
  end_position_ = std::max(first_position_, position);
}

std::size_t GrowingIndex::memory_bytes() const {
  std::size_t bytes = SemanticIndex::memory_bytes();
  for (const auto& pages : pages_of_node_) bytes += pages.capacity() * sizeof(int);
  return bytes;
}

void GrowingIndex::check_integrity() const {
  if (!whole_) return table_.check_integrity();
  SemanticIndex::check_integrity();
  const std::vector<std::vector<int>> expected = pages_by_node();
  for (int node = 0; node < node_count_; ++node) {
    std::vector<int> pages = pages_of_node_[node];
    std::sort(pages.begin(), pages.end());
    if (pages != expected[node])
      throw IntegrityError(message("node ", node, " lists other pages than are in it"));
  }
}

}  // namespace icecache

#include "compared/page_cells.h"

#include <algorithm>
#include <numeric>

#include "icecache/error.h"

namespace icecache {

void PageCells::resize(int cells) {
  pages_of_cell_.resize(std::max(pages_of_cell_.size(), static_cast<std::size_t>(cells)));
}

void PageCells::append(int cell, int page, float start) {
  if (static_cast<int>(cell_of_page_.size()) <= page) {
    cell_of_page_.resize(page + 1, -1);
    starts_.resize(page + 1, 0.0f);
  }
  pages_of_cell_[cell].push_back(page);
  cell_of_page_[page] = cell;
  starts_[page] = start;
}

void PageCells::split(int page, int other, float start) {
  const int cell = cell_of_page_[page];
  std::vector<int>& pages = pages_of_cell_[cell];
  const auto behind = std::find(pages.begin(), pages.end(), page) - pages.begin() + 1;
  append(cell, other, start);
  std::rotate(pages.begin() + behind, pages.end() - 1, pages.end());
}

void PageCells::remove(int page) {
  std::erase(pages_of_cell_[cell_of_page_[page]], page);
  cell_of_page_[page] = -1;
}

int PageCells::choose(int cell, float coordinate) const {
  const std::vector<int>& pages = pages_of_cell_[cell];
  if (pages.empty()) return -1;
  const auto above = std::upper_bound(pages.begin() + 1, pages.end(), coordinate,
                                      [&](float x, int page) { return x < starts_[page]; });
  return *(above - 1);
}

int PageCells::cell_of(int page) const {
  return page < static_cast<int>(cell_of_page_.size()) ? cell_of_page_[page] : -1;
}

std::size_t PageCells::memory_bytes() const {
  std::size_t bytes = cell_of_page_.capacity() * sizeof(int) + starts_.capacity() * sizeof(float);
  for (const auto& pages : pages_of_cell_) bytes += pages.capacity() * sizeof(int);
  return bytes;
}

void PageCells::check_integrity(const PageTable& table) const {
  std::vector<int> seen(table.page_count(), 0);
  for (int cell = 0; cell < cell_count(); ++cell) {
    const std::vector<int>& pages = pages_of_cell_[cell];
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (pages[i] >= table.page_count() || !table.in_use(pages[i]) || cell_of(pages[i]) != cell)
        throw IntegrityError(message("cell ", cell, " lists page ", pages[i], " of another"));
      ++seen[pages[i]];
      // The first page's start means nothing: it takes everything below the second.
      if (i > 1 && starts_[pages[i]] < starts_[pages[i - 1]])
        throw IntegrityError(message("cell ", cell, " has its pages out of order at ", i));
    }
  }
  for (int page = 0; page < table.page_count(); ++page) {
    if (seen[page] != (table.in_use(page) ? 1 : 0))
      throw IntegrityError(message("page ", page, " is in ", seen[page], " cells"));
  }
}

std::uint32_t upper_half_of(const float* coordinates, int page_size, float& start) {
  int order[kMaxPageSize];
  std::iota(order, order + page_size, 0);
  std::sort(order, order + page_size, [&](int a, int b) {
    return coordinates[a] != coordinates[b] ? coordinates[a] < coordinates[b] : a < b;
  });
  std::uint32_t mask = 0;
  for (int i = page_size / 2; i < page_size; ++i) mask |= 1u << order[i];
  start = coordinates[order[page_size / 2]];
  return mask;
}

}  // namespace icecache

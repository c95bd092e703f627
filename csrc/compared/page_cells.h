// PageCells: tokens in cells, each cell cut into pages along one direction like the leaves of a
// B-tree.
//
// Page i of a cell takes the coordinates from its start up to the start of page i + 1; the first
// page takes everything below too. Removing tokens leaves the starts as they are. What a coordinate
// is, and which cell a token belongs to, is the caller's concern.
//
// Threads: none of its own.
#pragma once

#include <cstddef>
#include <vector>

#include "pages/page_table.h"

namespace icecache {

class PageCells {
 public:
  // Makes room for cells 0..cells-1, new ones without pages.
  void resize(int cells);
  int cell_count() const { return static_cast<int>(pages_of_cell_.size()); }

  // Adds a page behind all others of the cell; `start` is not below theirs.
  void append(int cell, int page, float start);
  // `other` takes over the coordinates of `page` from `start` on.
  void split(int page, int other, float start);
  // Drops the page; its coordinates fall to the page before, or behind where it was the first.
  void remove(int page);

  // The page of a cell that a coordinate falls into, the last one of equal starts; -1 where the
  // cell has no page.
  int choose(int cell, float coordinate) const;
  // -1 for a page that is in no cell.
  int cell_of(int page) const;
  const std::vector<int>& pages_of(int cell) const { return pages_of_cell_[cell]; }

  std::size_t memory_bytes() const;
  // Throws IntegrityError when starts are out of order or a page in use is not in one cell.
  void check_integrity(const PageTable& table) const;

 private:
  std::vector<std::vector<int>> pages_of_cell_;  // in order of start
  std::vector<int> cell_of_page_;                // [P]
  std::vector<float> starts_;                    // [P]
};

// The slots of a full page with the larger half of coordinates [S]; ties by slot. `start` becomes
// the smallest coordinate among them.
std::uint32_t upper_half_of(const float* coordinates, int page_size, float& start);

}  // namespace icecache

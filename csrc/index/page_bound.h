// How many pages an index takes for its tokens.
//
// Pages are full when a tree is built. A page that is full splits in halves when a token joins it,
// and new tokens may fill some halves alone: after long decoding a token would take twice its room.
// So with index = "tree" and "faiss" a token joins another page once most_pages() are in use. Cells
// of "faiss" and "dci" have pages of their own, and those of "dci" keep the order of their tokens,
// so that halves stay halves.
#pragma once

#include <cstdint>

#include "icecache/config.h"

namespace icecache {

// Slots of all pages a token where tokens may join other pages, once there are many.
constexpr double kMostRoom = 1.2;

// Where that many pages are in use, a tree of `tokens` takes no other.
constexpr std::int64_t most_pages(std::int64_t tokens, std::int64_t page_size) {
  return static_cast<std::int64_t>(kMostRoom * static_cast<double>(tokens) /
                                   static_cast<double>(page_size)) +
         2;
}

// Slots of all pages of an index of `tokens`, at most, as long as it only grows. `config` is
// resolved.
std::int64_t most_slots(const Config& config, std::int64_t tokens);

}  // namespace icecache

// How many pages an index takes for its tokens.
//
// The pages of a segment are full but for the last one. Cells of "faiss" and "dci" have pages of
// their own; those of "dci" keep the order of their tokens, so that halves of pages that split stay
// halves.
#pragma once

#include <cstdint>

#include "icecache/config.h"

namespace icecache {

// Slots of all pages of an index of `tokens`, at most, as long as it only grows and nothing is
// merged. `config` is resolved.
std::int64_t most_slots(const Config& config, std::int64_t tokens);

}  // namespace icecache

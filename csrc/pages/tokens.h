// Tokens of one head: those that join it, and those of a page that a query looks at.
#pragma once

#include <cstddef>
#include <cstdint>

#include "icecache/types.h"
#include "simd/row_format.h"

namespace icecache {

// n tokens at consecutive positions, contiguous rows [n, D]; not owning.
struct TokenBlock {
  const std::byte* keys = nullptr;
  const std::byte* values = nullptr;
  std::int32_t count = 0;
  std::int32_t first_position = 0;
  const RowFormat* format = nullptr;  // of the rows; null: the model's type
  // [n, D] what rows with codes stand for, before they were rounded where that is known. An index is
  // arranged by it: which tokens lie together does not depend on kv_dtype.
  const float* key_numbers = nullptr;
  const float* value_numbers = nullptr;
};

// Tokens of one page that were picked. Bit s of `slots` stands for slot s.
struct PagePick {
  PageId page = kNoPage;
  std::uint64_t epoch = 0;  // the content that was meant; see PagePool::verify
  std::uint32_t slots = 0;
  std::int32_t local_page = 0;  // its number among the pages of the segments, or of a run
};

}  // namespace icecache

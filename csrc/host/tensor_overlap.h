// Which memory the views of one call share.
#pragma once

#include <span>

#include "icecache/types.h"

namespace icecache {

// True if two of the rows that `written` name share an element: an expanded tensor, or one row
// given to two sequences.
bool rows_overlap(std::span<const TensorView> written);
// True if a row of `written` shares an element with a row of `read`.
bool rows_overlap(std::span<const TensorView> written, std::span<const TensorView> read);

}  // namespace icecache

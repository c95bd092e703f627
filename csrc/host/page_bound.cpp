#include "host/page_bound.h"

#include <algorithm>

#include "compared/dci_tree.h"

namespace icecache {

std::int64_t most_slots(const Config& config, std::int64_t tokens) {
  const std::int64_t s = std::max<std::int64_t>(1, config.page_size);
  if (config.index == "positional") return (tokens + s - 1) / s * s;
  if (config.index == "dci") {
    // A page for each cell, and as many as are half full.
    return 2 * tokens + (tokens / DciTree::every(config.dci_promotion) + 1) * s;
  }
  // The last page of each segment, of which there are fewer than a token's number has bits.
  constexpr std::int64_t kSegments = 32;
  const std::int64_t of_tree = tokens + kSegments * s;
  if (config.index != "faiss") return of_tree;
  // The last page of each cell of k-means.
  return of_tree + std::max<std::int64_t>(1, tokens / std::max(s, config.far_node_tokens)) * s;
}

}  // namespace icecache

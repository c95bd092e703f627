#include "index/page_bound.h"

#include <algorithm>

#include "index/dci_tree.h"

namespace icecache {

std::int64_t most_slots(const Config& config, std::int64_t tokens) {
  const std::int64_t s = std::max<std::int64_t>(1, config.page_size);
  if (config.index == "positional") return (tokens + s - 1) / s * s;
  if (config.index == "dci") {
    // A page for each cell, and as many as are half full.
    return 2 * tokens + (tokens / DciTree::every(config.dci_promotion) + 1) * s;
  }
  const std::int64_t of_tree = most_pages(tokens, s) * s;
  if (config.index != "faiss") return of_tree;
  // The last page of each cell of k-means.
  const std::int64_t cells =
      std::max<std::int64_t>(1, tokens / std::max(s, config.far_node_tokens));
  return std::max(of_tree, tokens + cells * s);
}

}  // namespace icecache

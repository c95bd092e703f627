#include <algorithm>

#include "icecache/error.h"
#include "icecache/semantic_index.h"
#include "index/dci_index.h"
#include "index/faiss_index.h"
#include "index/positional_index.h"
#include "index/tree_index.h"

namespace icecache {

std::unique_ptr<SemanticIndex> make_index(const IndexContext& context) {
  const std::string& name = context.config->index;
  if (name == "tree") return make_tree_index(context);
  if (name == "dci") return make_dci_index(context);
  if (name == "positional") return make_positional_index(context);
  if (name == "faiss") return make_faiss_index(context);
  throw InvalidArgument(
      message("index must be tree, dci, positional or faiss, got \"", name, "\""));
}

std::size_t most_build_pages(const Config& config, std::int32_t tokens) {
  const auto n = static_cast<std::size_t>(tokens), s = static_cast<std::size_t>(config.page_size);
  // The last page of each cell may be partly filled.
  std::size_t cells = 1;
  if (config.index == "dci") cells = dci_cells(config, tokens);
  if (config.index == "faiss")
    cells = std::max<std::size_t>(1, n / PagedIndex::node_tokens(config));
  return n / s + cells;
}

}  // namespace icecache

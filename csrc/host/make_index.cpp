#include "host/make_index.h"

#include <algorithm>

#include "compared/dci_index.h"
#include "compared/faiss_index.h"
#include "compared/positional_index.h"
#include "icecache/error.h"
#include "index/plain_index.h"
#include "index/tree_index.h"

namespace icecache {

bool grows(const Config& config) {
  return config.index == "dci" || config.index == "positional";
}

std::unique_ptr<SemanticIndex> make_index(const HeadContext& context) {
  if (context.attends_all) return std::make_unique<PlainIndex>(context);
  const std::string& name = context.config->index;
  if (name == "tree") return std::make_unique<TreeIndex>(context);
  if (name == "faiss") return make_faiss_index(context);
  throw Error(message("no index of segments is named ", name));
}

std::unique_ptr<GrowingIndex> make_growing_index(const HeadContext& context) {
  const std::string& name = context.config->index;
  if (name == "dci") return std::make_unique<DciIndex>(context);
  if (name == "positional") return std::make_unique<PositionalIndex>(context);
  throw Error(message("no index that grows is named ", name));
}

std::size_t most_build_pages(const Config& config, std::int32_t tokens) {
  const auto n = static_cast<std::size_t>(tokens), s = static_cast<std::size_t>(config.page_size);
  // The last page of each cell may be partly filled.
  std::size_t cells = 1;
  if (config.index == "dci") cells = dci_cells(config, tokens);
  if (config.index == "faiss")
    cells = std::max<std::size_t>(1, n / SemanticIndex::node_tokens(config));
  return n / s + cells;
}

}  // namespace icecache

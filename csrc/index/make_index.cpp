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

}  // namespace icecache

// FaissIndex (index = "faiss"): FAISS k-means cells as pages, candidates by our sketch or by an index
// of FAISS over the exact keys. Without FAISS in the build, making one throws Unavailable.
#pragma once

#include <memory>

#include "icecache/semantic_index.h"

namespace icecache {

std::unique_ptr<SemanticIndex> make_faiss_index(const IndexContext& context);

}  // namespace icecache

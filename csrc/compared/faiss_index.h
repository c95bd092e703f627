// FaissIndex (index = "faiss"): FAISS in the two places where it could stand in for ours. Pages
// come from its k-means cells of the keys, in place of bisection; with faiss_search = "flat", "ivf"
// or "hnsw" candidates come from its inner-product search over exact keys, in place of the sketch.
// Far field, picks and budget are the same.
//
// Without FAISS in the build, making one throws Unavailable.
#pragma once

#include <memory>

#include "index/semantic_index.h"

namespace icecache {

std::unique_ptr<SemanticIndex> make_faiss_index(const HeadContext& context);

}  // namespace icecache

// Which index a configuration names.
#pragma once

#include <memory>

#include "index/growing_index.h"
#include "index/semantic_index.h"

namespace icecache {

// Whether the index named by config.index takes all tokens by itself, however many follow
// (make_growing_index); else they are sealed into segments (make_index), which are merged.
bool grows(const Config& config);
// Throws Unavailable for "faiss" where FAISS was left out of the build. REQUIRES: !grows().
std::unique_ptr<SemanticIndex> make_index(const HeadContext& context);
// REQUIRES: grows().
std::unique_ptr<GrowingIndex> make_growing_index(const HeadContext& context);
// Pages that build() of `tokens` tokens takes at most, with config.index.
std::size_t most_build_pages(const Config& config, std::int32_t tokens);

}  // namespace icecache

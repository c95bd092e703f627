// LayerCache: the KV heads of one (sequence, layer) and the background work that is under way on
// them.
//
// Threads: `jobs` may touch the heads until settle() returns; after it the caller has them alone.
// `rebuilds` touch none of them.
#pragma once

#include <vector>

#include "core/head_cache.h"
#include "core/thread_pool.h"

namespace icecache {

struct LayerCache {
  std::vector<HeadCache> heads;      // [Hkv]
  std::vector<HeadStats> job_stats;  // [Hkv] written by jobs, collected by the engine
  JobGroup jobs;
  JobGroup rebuilds;

  LayerCache() = default;
  LayerCache(const LayerCache& other) : heads(other.heads), job_stats(other.heads.size()) {}
  LayerCache(LayerCache&&) noexcept = default;

  std::int32_t length() const { return heads.front().length(); }
};

// SequenceCache: all layers of one sequence.
struct SequenceCache {
  std::vector<LayerCache> layers;
};

}  // namespace icecache

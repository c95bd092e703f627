// LayerCache: the KV heads of one (sequence, layer) and the background work that is under way on
// them.
//
// Threads: `jobs` may touch the heads until settle() returns; after it the caller has them alone.
// `builds` touch none of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "host/head_cache.h"
#include "host/layer_update.h"
#include "threads/thread_pool.h"

namespace icecache {

struct LayerCache {
  std::vector<HeadCache> heads;         // [Hkv]
  std::vector<HeadStats> job_stats;     // [Hkv] written by jobs, collected by the engine
  std::shared_ptr<LayerUpdate> update;  // what `jobs` run; null: nothing
  std::exception_ptr error;             // of what was done again
  JobGroup jobs;
  JobGroup builds[2];  // by HeadCache::Work
  // Positions of decoded tokens that may yet be taken back: what they change in the index is done
  // when they stay. The last decode call's.
  struct Undecided {
    std::int32_t first = 0, end = 0;
  };
  Undecided undecided;

  LayerCache() = default;
  LayerCache(const LayerCache& other)
      : heads(other.heads), job_stats(other.heads.size()), undecided(other.undecided) {}
  LayerCache(LayerCache&&) noexcept = default;

  std::int32_t length() const { return heads.front().length(); }
  // True where all heads answer within the token budget.
  bool sparse() const {
    return std::all_of(heads.begin(), heads.end(), [](const auto& head) { return head.sparse(); });
  }
  // True where no head has an index, and none is due.
  bool is_short() const {
    return std::all_of(heads.begin(), heads.end(),
                       [](const auto& head) { return head.is_short(); });
  }
  JobGroup& group_of(HeadCache::Work work) { return builds[HeadCache::at(work)]; }
  // True where decoding would use the result of background work at `length` tokens.
  bool build_is_ready(HeadCache::Work work, std::int32_t length) const {
    return std::any_of(heads.begin(), heads.end(),
                       [&](const auto& head) { return head.build_is_ready(work, length); });
  }
  bool build_is_due(bool packs) const {
    return std::any_of(heads.begin(), heads.end(),
                       [&](const auto& head) { return head.build_is_due(packs); });
  }
};

// SequenceCache: all layers of one sequence.
struct SequenceCache {
  std::vector<LayerCache> layers;
  std::uint64_t retained = 0;  // when it was last used; 0: it is not retained
};

}  // namespace icecache

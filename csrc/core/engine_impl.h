// What Engine's translation units share; see include/icecache/engine.h for the contract.
#pragma once

#include <map>
#include <mutex>
#include <span>
#include <string_view>
#include <vector>

#include "core/layer_cache.h"
#include "core/residency.h"
#include "core/thread_pool.h"
#include "icecache/engine.h"

namespace icecache {

struct Engine::Impl {
  Impl(const CacheShape& shape, const Config& config);

  // Throw InvalidArgument for ids, layers and views that are not this engine's.
  SequenceCache& sequence(SeqId id);
  LayerCache& layer_of(SeqId id, int layer);  // settled
  void check_view(std::string_view name, const TensorView& view, std::int64_t heads) const;
  void check_call(std::span<const SeqId> ids, std::size_t views, std::string_view name) const;

  // Engine::append and Engine::attend, with the mutex held. REQUIRES of attend: check_attend().
  void append(std::span<const SeqId> ids, int layer, std::span<const TensorView> keys,
              std::span<const TensorView> values);
  void attend(std::span<const SeqId> ids, int layer, std::span<const TensorView> queries,
              std::span<const TensorView> outputs, std::span<const Phase> phases = {});
  void check_attend(std::span<const SeqId> ids, std::span<const TensorView> queries,
                    std::span<const TensorView> outputs) const;

  // Waits for the background work on a layer or a sequence and takes over its statistics.
  void settle(LayerCache& layer, int number);
  void settle(SequenceCache& sequence);
  void collect(int layer, int head, const HeadStats& add);

  // Settles a sequence, or all, and waits for rebuilds too: no other thread writes to their pages.
  void rest(SequenceCache& sequence);
  void rest();

  // Lets a sequence rest and gives up its rebuilds under way, and with them their pages.
  void drop_rebuilds(SequenceCache& sequence);

  // Hands the layer's new queries, and unless more of a prompt is to come the due tokens, to the
  // background.
  void schedule_update(LayerCache& layer, const TensorView& queries, Phase phase = Phase::kAuto);
  // After a decode step within the budget, whose tokens are in the index: what is to be built anew
  // goes to the background. Layers take their turns, so that few hold two indexes at a time.
  void schedule_rebuild(LayerCache& layer, int number);

  const CacheShape shape;
  const Config config;  // resolved
  std::mutex mutex;     // guards everything below but what jobs own
  PagePool pool;
  Residency residency;
  std::map<SeqId, SequenceCache> sequences;
  SeqId next_sequence = 0;
  std::vector<HeadStats> stats;  // [num_layers, Hkv]
  ThreadPool threads;  // last, so that it is the first to go: its jobs use the members above
};

}  // namespace icecache

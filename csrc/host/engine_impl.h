// What Engine's translation units share; see include/icecache/engine.h for the contract.
#pragma once

#include <atomic>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "host/layer_cache.h"
#include "icecache/engine.h"
#include "threads/call_mutex.h"
#include "threads/thread_pool.h"

namespace icecache {

struct Engine::Impl {
  Impl(const CacheShape& shape, const Config& config);

  // Throw InvalidArgument for ids, layers and views that are not this engine's.
  SequenceCache& sequence(SeqId id);
  SequenceCache& changeable(SeqId id);        // a sequence that is not retained
  LayerCache& layer_of(SeqId id, int layer);  // settled
  LayerCache& layer_to_change(SeqId id, int layer);
  void check_view(std::string_view name, const TensorView& view, std::int64_t heads) const;
  void check_call(std::span<const SeqId> ids, std::size_t views, std::string_view name) const;
  void check_phases(std::span<const SeqId> ids, std::span<const Phase> phases) const;
  void check_layer(int layer) const;
  void check_append(std::span<const SeqId> ids, std::span<const TensorView> keys,
                    std::span<const TensorView> values) const;
  // Throws where a row of `written` shares memory with another one, or with a row of the others.
  using Named = std::pair<const char*, std::span<const TensorView>>;
  static void check_written(const Named& written, std::initializer_list<Named> others);
  // What a call attends with, an entry for each sequence; `lse` and `phases` may be empty.
  struct AttendArgs {
    std::span<const TensorView> queries, outputs, lse;
    std::span<const Phase> phases;
  };

  // Engine::append and Engine::attend, with the mutex held. REQUIRES: check_append(),
  // check_attend().
  void append(std::span<const SeqId> ids, int layer, std::span<const TensorView> keys,
              std::span<const TensorView> values);
  void attend(std::span<const SeqId> ids, int layer, const AttendArgs& args);
  void check_attend(std::span<const SeqId> ids, const AttendArgs& args) const;

  // Keeps the first tokens of some layers: of all of them, or where it throws, of none.
  struct Kept {
    LayerCache* layer;
    std::int32_t length;
  };
  static void truncate(std::span<const Kept> layers);
  // The first `length` tokens of every layer.
  static void truncate(SequenceCache& sequence, std::int64_t length);
  // Throws InvalidArgument unless a layer of the sequence has so many tokens.
  static void check_length(SeqId id, const SequenceCache& sequence, std::int64_t length);
  SeqId fork(SeqId sequence, std::optional<std::int64_t> length);

  class AttendCall;

  // Waits for the background work on a layer, does again what of it had no memory, and takes over
  // its statistics. finish() keeps what it threw for settle(), which rethrows it once.
  void finish(LayerCache& layer, int number) noexcept;
  void settle(LayerCache& layer, int number);
  void settle(SequenceCache& sequence);
  void collect(int layer, int head, const HeadStats& add) noexcept;
  // Also of the tokens that might yet have been taken back.
  void collect_all(SequenceCache& sequence) noexcept;

  // finish() of all layers of a sequence, or of all; waits for builds, too: no other thread takes
  // pages or writes to them.
  void rest(SequenceCache& sequence) noexcept;
  void rest() noexcept;
  // Where that makes room for so many pages: gives up all builds under way, and with them their
  // pages. Else changes nothing. REQUIRES: rest().
  bool drop_builds_for(std::size_t pages);

  // True where so many pages are left beside those that background work may yet take. What depends
  // on the answer must not depend on timing: where it is false, that work is over.
  // Retained sequences end for it.
  bool has_pages(std::size_t pages);
  void count_retained(MemoryStats& memory) const;  // REQUIRES: nothing in the background
  // Ends the retained sequence that was used least recently; false where there is none.
  bool evict_one() noexcept;
  // Keeps pages for background work until the promise is destroyed.
  using Promise = std::shared_ptr<const void>;
  Promise promise(std::size_t pages);

  // Background work that has all it needs: start() cannot fail.
  struct FollowUp {
    LayerCache* layer = nullptr;
    int number = 0;  // of the layer
    std::shared_ptr<LayerUpdate> update;
    struct Build {
      HeadCache::Work work;
      std::size_t head;
      std::shared_ptr<SegmentBuild> build;
    };
    std::vector<Build> builds;
    std::vector<HeadCache::Work> postponed;  // for want of pages
    std::int32_t postponed_to = 0;           // length
    bool alone = false;                      // runs while the caller waits and nothing else does
    PreparedJobs jobs;
  };
  // Hands the layer's new queries, and unless more of a prompt is to come the due tokens, to the
  // background.
  FollowUp prepare_update(LayerCache& layer, int number, const TensorView& queries, Phase phase);
  // Decoded tokens below `position` stay. What each of them changes in the index is done now, at the
  // sequence's length with this token: it does not depend on how many tokens a call had, or on
  // those that were taken back. Where it throws, the same call goes on where this one ended.
  void decide(LayerCache& layer, int number, std::int32_t position);
  // Waits for builds that decoding uses at `length` tokens.
  void wait_for_builds(LayerCache& layer, std::int32_t length);
  // The segments that are due at `length` tokens are built in the background. While a layer builds
  // a segment, it holds the tokens of it twice; so layers take turns.
  FollowUp prepare_builds(LayerCache& layer, int number, std::int32_t length);
  bool has_turn(std::int32_t length, std::int32_t turn, int number) const;
  void start(FollowUp work) noexcept;

  const CacheShape shape;
  const Config config;  // resolved
  CallMutex mutex;      // guards everything below but what jobs own
  PagePool pool;
  std::map<SeqId, SequenceCache> sequences;
  SeqId next_sequence = 0;
  std::uint64_t retained_clock = 0;  // counts uses of retained sequences
  std::int64_t evicted = 0;
  std::vector<HeadStats> stats;                // [num_layers, Hkv]
  std::vector<AttendWorkspace> workspaces;     // of each thread of a call
  std::atomic<std::size_t> promised_pages{0};  // also changed by jobs that end
  ThreadPool threads;  // last, so that it is the first to go: its jobs use the members above
};

}  // namespace icecache

// IndexRebuild: a new index of a head's tokens, made on a background thread while decoding goes on
// with the old one.
//
// Decoding never waits for it and its results do not depend on timing: the new index takes over at
// a length that is fixed when the rebuild starts, which is so far away that the work is long done.
// Until then the old index takes every token; the rebuild is told of each and catches up, a few a
// step.
//
// Threads: run() on a background thread, once; afterwards (the caller has waited) the owner alone.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "icecache/semantic_index.h"

namespace icecache {

class IndexRebuild {
 public:
  // Of the tokens that `old` holds now; they stand at positions from first_position on. Takes over
  // when the sequence has `ready_at` tokens.
  IndexRebuild(const IndexContext& context, const SemanticIndex& old, const QueryMoments& queries,
               std::int32_t first_position, std::int32_t ready_at);

  // Builds. Without pages or memory there is no new index, and take() gives none.
  void run();

  // Makes room for tokens that follow: follow() of them needs no memory.
  void reserve(std::int32_t tokens);
  // Tokens that the old index took meanwhile, for which there is room.
  void follow(const TokenBlock& tokens) noexcept;
  // Takes back tokens at positions from `position` on. False where the build itself holds some.
  bool truncate(std::int32_t position) noexcept;
  // Tokens that catch_up() inserts: those up to a number that depends on the length, so that a step
  // that is done again does not go further.
  std::int32_t due(std::int32_t length) const;
  // Once the sequence has `length` tokens: inserts the due ones. True when none is left.
  bool catch_up(std::int32_t length);
  // Pages of the new index so far. REQUIRES: run() has ended.
  std::size_t held_pages() const;
  // The new index; null where pages or memory ran out.
  std::unique_ptr<SemanticIndex> take() { return std::move(fresh_); }
  std::int32_t ready_at() const { return ready_at_; }
  // Pages that run() takes at most.
  std::size_t most_pages() const { return most_build_pages(*context_.config, count_); }
  // Tokens of the build.
  std::int32_t built_tokens() const { return count_; }

 private:
  IndexContext context_;
  SemanticIndex::Snapshot snapshot_;
  QueryMoments queries_;
  std::size_t row_bytes_;
  std::int32_t first_position_, count_, ready_at_;
  std::unique_ptr<SemanticIndex> fresh_;
  std::vector<std::byte> late_keys_,
      late_values_;  // rows from position first_position_ + count_ on
  std::int32_t followed_ = 0, inserted_ = 0;
};

}  // namespace icecache

// PrefixTable: which of the sequences that an engine retains (Engine::retain) begins as a prompt
// does.
//
// It holds token ids and hashes; keys and values are in the engine. A prompt is looked up by the
// hashes of its blocks, longest first, and then token by token beyond the last whole block that
// agrees. A hash stands for all tokens up to the end of its block, and for whatever else keys and
// values depend on (a picture, say). Prompts of different spaces never share: of other users, or of
// other adapters of the model.
//
// Threads: none of its own; one caller at a time.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "icecache/types.h"

namespace icecache {

// Chained hashes (16 bytes each) of the whole blocks of a text, for callers that have none of their
// own. Throws InvalidArgument unless block_tokens is at least 1.
std::vector<std::string> hash_blocks(std::span<const std::int32_t> tokens,
                                     std::int64_t block_tokens);

class PrefixTable {
 public:
  // Tokens of a sequence and the hashes of its first whole blocks.
  struct Text {
    std::vector<std::int32_t> tokens;
    std::vector<std::string> hashes;
    std::string space = {};
    // False where token ids do not tell everything, as with pictures: it is then shared by whole
    // blocks alone.
    bool by_token = true;
  };
  struct Match {
    SeqId sequence = -1;
    std::int64_t length = 0;  // of the tokens that agree; 0: nothing does
  };

  // Throws InvalidArgument unless block_tokens is at least 1.
  explicit PrefixTable(std::int64_t block_tokens);

  // Adds a sequence as the most recently used one. Those of which it holds all tokens leave, unless
  // they are pinned: they are returned. Throws InvalidArgument for a sequence that it has, or where
  // there are more hashes than whole blocks.
  std::vector<SeqId> add(SeqId sequence, Text text);
  // The sequence that agrees longest with a text. Changes nothing.
  Match find(const Text& text) const;
  // Makes a sequence the most recently used one. Throws InvalidArgument for one that it has not, as
  // pin(), unpin() and remove() do.
  void use(SeqId sequence);
  // A sequence with pins is never the oldest one.
  void pin(SeqId sequence);
  void unpin(SeqId sequence);
  void remove(SeqId sequence);
  // The least recently used sequence without pins.
  std::optional<SeqId> oldest() const;

  bool contains(SeqId sequence) const { return entries_.contains(sequence); }
  std::size_t size() const { return entries_.size(); }
  std::int64_t block_tokens() const { return block_tokens_; }
  // Least recently used first.
  std::vector<SeqId> sequences() const { return {order_.begin(), order_.end()}; }

 private:
  struct Entry {
    Text text;
    std::vector<std::string> keys;  // of its blocks, in holders_
    std::int64_t pins = 0;
    std::list<SeqId>::iterator place;  // in order_
  };
  Entry& entry(SeqId sequence);
  std::int64_t agree(const Text& held, const Text& asked, std::int64_t blocks) const;
  void insert(SeqId sequence, Text&& text);
  void forget(SeqId sequence) noexcept;

  std::int64_t block_tokens_;
  std::list<SeqId> order_;  // least recently used first
  std::map<SeqId, Entry> entries_;
  // Sequences that have a block, by space and hash; the newest last.
  std::unordered_map<std::string, std::vector<SeqId>> holders_;
};

}  // namespace icecache

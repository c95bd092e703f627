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
  // Tokens of a sequence and the chained hashes of its first whole blocks: texts with the same hash
  // of a block have the same hashes of all blocks before it.
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
  // they are pinned: they are returned, the shortest first. Throws InvalidArgument for a sequence
  // that the table has, or if there are more hashes than whole blocks. Takes time by the blocks of
  // `text` and by what leaves, not by what the table holds; so does remove().
  std::vector<SeqId> add(SeqId sequence, Text text);
  // The sequence that agrees longest with a text. Changes nothing.
  Match find(const Text& text) const;
  // Makes a sequence the most recently used one. Throws InvalidArgument for one that the table does
  // not have, as pin(), unpin() and remove() do.
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
  // Counts add() and remove(): find() answers alike until it changes.
  std::int64_t version() const { return version_; }
  // Least recently used first.
  std::vector<SeqId> sequences() const { return {order_.begin(), order_.end()}; }

 private:
  // Sequences that have a block; the newest last.
  struct Holders {
    std::list<SeqId> all;
    std::vector<SeqId> ending;  // those whose last whole block it is
  };
  // By space and hash. Its elements stay where they are while others come and go.
  using Blocks = std::unordered_map<std::string, Holders>;
  struct Place {
    Blocks::value_type* block;
    std::list<SeqId>::iterator at;  // in the block's `all`
  };
  struct Entry {
    Text text;
    std::vector<Place> places;  // of its blocks
    std::int64_t pins = 0;
    std::list<SeqId>::iterator place;  // in order_
  };
  Entry& entry(SeqId sequence);
  const Holders* holders(const Text& text, std::size_t block) const;
  std::size_t known_blocks(const Text& text) const;
  std::int64_t agree(const Text& held, const Text& asked, std::int64_t blocks) const;
  std::vector<SeqId> covered_by(const Text& text) const;
  void insert(SeqId sequence, Text&& text);
  void forget(SeqId sequence) noexcept;

  std::int64_t block_tokens_;
  std::int64_t version_ = 0;
  std::list<SeqId> order_;  // least recently used first
  std::map<SeqId, Entry> entries_;
  Blocks blocks_;
};

}  // namespace icecache

#include "icecache/prefix_table.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "icecache/error.h"

namespace icecache {
namespace {

// Sequences with the same hash that a lookup compares: many may begin with one system prompt.
constexpr std::size_t kCompared = 16;

// Two lanes of multiply and xor over 64 bits (as in MurmurHash3's finaliser). No defence against
// forged collisions: where hashes agree, tokens are compared.
struct Hash128 {
  std::array<std::uint64_t, 2> state = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu};

  void add(std::uint64_t value) {
    for (std::size_t lane = 0; lane < state.size(); ++lane) {
      std::uint64_t x = state[lane] ^ (value + lane * 0x632be59bd9b4e019u);
      x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
      x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
      state[lane] = x ^ (x >> 33);
    }
  }
  std::string bytes() const {
    std::string text(sizeof(state), '\0');
    std::memcpy(text.data(), state.data(), sizeof(state));
    return text;
  }
};

std::string key_of(const std::string& space, const std::string& hash) {
  return std::to_string(space.size()) + ":" + space + hash;
}

}  // namespace

std::vector<std::string> hash_blocks(std::span<const std::int32_t> tokens,
                                     std::int64_t block_tokens) {
  if (block_tokens < 1) {
    throw InvalidArgument(message("block_tokens must be at least 1, got ", block_tokens));
  }
  Hash128 hash;
  std::vector<std::string> hashes;
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    hash.add(static_cast<std::uint32_t>(tokens[t]));
    if ((t + 1) % static_cast<std::size_t>(block_tokens) == 0) hashes.push_back(hash.bytes());
  }
  return hashes;
}

PrefixTable::PrefixTable(std::int64_t block_tokens) : block_tokens_(block_tokens) {
  if (block_tokens < 1) {
    throw InvalidArgument(message("block_tokens must be at least 1, got ", block_tokens));
  }
}

PrefixTable::Entry& PrefixTable::entry(SeqId sequence) {
  const auto found = entries_.find(sequence);
  if (found == entries_.end()) {
    throw InvalidArgument(
        message("sequence must be one of the ", entries_.size(), " in the table, got ", sequence));
  }
  return found->second;
}

// Tokens that two texts have in common whose first `blocks` hashes agree.
std::int64_t PrefixTable::agree(const Text& held, const Text& asked, std::int64_t blocks) const {
  const std::int64_t known = blocks * block_tokens_;
  if (!held.by_token || !asked.by_token) return known;
  const auto most = static_cast<std::ptrdiff_t>(std::min(held.tokens.size(), asked.tokens.size()));
  const auto differ =
      std::mismatch(held.tokens.begin(), held.tokens.begin() + most, asked.tokens.begin());
  const std::int64_t same = differ.first - held.tokens.begin();
  return same < known ? 0 : same;  // hashes of the caller's that collide
}

const PrefixTable::Holders* PrefixTable::holders(const Text& text, std::size_t block) const {
  const auto found = blocks_.find(key_of(text.space, text.hashes[block]));
  return found == blocks_.end() ? nullptr : &found->second;
}

// The first blocks of a text that some sequence has. Who has a block has those before it: a binary
// search finds the last one.
std::size_t PrefixTable::known_blocks(const Text& text) const {
  std::size_t known = 0, unknown = text.hashes.size() + 1;
  while (unknown - known > 1) {
    const std::size_t middle = (known + unknown) / 2;
    (holders(text, middle - 1) != nullptr ? known : unknown) = middle;
  }
  return known;
}

PrefixTable::Match PrefixTable::find(const Text& text) const {
  for (std::size_t blocks = known_blocks(text); blocks > 0; --blocks) {
    const Holders* having = holders(text, blocks - 1);
    if (having == nullptr) continue;  // hashes of the caller's that are not chained
    Match best;
    std::size_t compared = 0;
    for (auto id = having->all.rbegin(); id != having->all.rend() && compared < kCompared; ++id) {
      const auto length = agree(entries_.at(*id).text, text, static_cast<std::int64_t>(blocks));
      if (length > best.length) best = {*id, length};
      ++compared;
    }
    if (best.length > 0) return best;
  }
  return {};
}

std::vector<SeqId> PrefixTable::add(SeqId sequence, Text text) {
  if (entries_.contains(sequence)) {
    throw InvalidArgument(message("sequence must not be in the table already, got ", sequence));
  }
  if (static_cast<std::int64_t>(text.hashes.size()) >
      static_cast<std::int64_t>(text.tokens.size()) / block_tokens_) {
    throw InvalidArgument(message("hashes must be of whole blocks of ", block_tokens_, " of ",
                                  text.tokens.size(), " tokens, got ", text.hashes.size()));
  }
  std::vector<SeqId> covered = covered_by(text);
  insert(sequence, std::move(text));
  for (const SeqId id : covered) forget(id);
  ++version_;
  return covered;
}

// Sequences without pins of which a text holds all tokens, the shortest first.
std::vector<SeqId> PrefixTable::covered_by(const Text& text) const {
  std::vector<SeqId> covered;
  for (std::size_t blocks = 1; blocks <= text.hashes.size(); ++blocks) {
    const Holders* having = holders(text, blocks - 1);
    if (having == nullptr) continue;
    for (const SeqId id : having->ending) {
      const Entry& entry = entries_.at(id);
      const Text& held = entry.text;
      if (entry.pins > 0 || held.tokens.size() > text.tokens.size()) continue;
      // Many may end with this block, each with a few more tokens: most differ in the first.
      const auto more = static_cast<std::ptrdiff_t>(blocks) * block_tokens_;
      if (!std::equal(held.tokens.begin() + more, held.tokens.end(), text.tokens.begin() + more))
        continue;
      const std::int64_t same = agree(held, text, static_cast<std::int64_t>(blocks));
      if (same == static_cast<std::int64_t>(held.tokens.size())) covered.push_back(id);
    }
  }
  return covered;
}

void PrefixTable::insert(SeqId sequence, Text&& text) {
  order_.push_back(sequence);
  try {
    Entry& entry = entries_[sequence];
    entry.place = std::prev(order_.end());
    entry.text = std::move(text);
    entry.places.reserve(entry.text.hashes.size());
    for (const std::string& hash : entry.text.hashes) {
      std::list<SeqId> own = {sequence};
      auto& block = *blocks_.try_emplace(key_of(entry.text.space, hash)).first;
      entry.places.push_back({&block, own.begin()});
      block.second.all.splice(block.second.all.end(), own);
    }
    if (!entry.places.empty()) entry.places.back().block->second.ending.push_back(sequence);
  } catch (...) {
    if (entries_.contains(sequence)) {
      forget(sequence);
    } else {
      order_.pop_back();
    }
    throw;
  }
}

void PrefixTable::use(SeqId sequence) {
  order_.splice(order_.end(), order_, entry(sequence).place);
}

void PrefixTable::pin(SeqId sequence) {
  ++entry(sequence).pins;
}

void PrefixTable::unpin(SeqId sequence) {
  Entry& pinned = entry(sequence);
  if (pinned.pins == 0) throw InvalidArgument(message("sequence must be pinned, got ", sequence));
  --pinned.pins;
}

void PrefixTable::remove(SeqId sequence) {
  entry(sequence);
  forget(sequence);
  ++version_;
}

void PrefixTable::forget(SeqId sequence) noexcept {
  const auto found = entries_.find(sequence);
  const std::vector<Place>& places = found->second.places;
  if (!places.empty()) std::erase(places.back().block->second.ending, sequence);
  for (const Place& place : places) {
    place.block->second.all.erase(place.at);
    if (place.block->second.all.empty()) blocks_.erase(blocks_.find(place.block->first));
  }
  order_.erase(found->second.place);
  entries_.erase(found);
}

std::optional<SeqId> PrefixTable::oldest() const {
  for (const SeqId id : order_) {
    if (entries_.at(id).pins == 0) return id;
  }
  return std::nullopt;
}

}  // namespace icecache

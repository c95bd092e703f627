// Which sequence begins as a prompt does, and who goes first.
#include "icecache/prefix_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "icecache/error.h"
#include "refusal.h"

namespace icecache {
namespace {

constexpr std::int64_t kBlock = 4;

PrefixTable::Text text(std::vector<std::int32_t> tokens, std::string space = "",
                       bool by_token = true) {
  PrefixTable::Text made{std::move(tokens), {}, std::move(space), by_token};
  made.hashes = hash_blocks(made.tokens, kBlock);
  return made;
}

std::vector<std::int32_t> counting(int from, int to) {
  std::vector<std::int32_t> tokens;
  for (int i = from; i < to; ++i) tokens.push_back(i);
  return tokens;
}

std::vector<std::int32_t> joined(std::vector<std::int32_t> first,
                                 const std::vector<std::int32_t>& then) {
  first.insert(first.end(), then.begin(), then.end());
  return first;
}

TEST(PrefixTable, FindsTheLongestCommonBeginningTokenByToken) {
  PrefixTable store(kBlock);
  store.add(1, text(joined(counting(0, 10), {99, 98})));
  store.add(2, text(joined(counting(0, 14), {97})));
  const auto match = store.find(text(counting(0, 30)));
  EXPECT_EQ(match.sequence, 2);
  EXPECT_EQ(match.length, 14);
  EXPECT_EQ(store.find(text(joined(counting(0, 10), {99}))).length, 11);
  EXPECT_EQ(store.find(text(joined(counting(0, 3), {50, 51}))).length, 0) << "less than a block";
  EXPECT_EQ(store.find(text(counting(1, 30))).length, 0);
}

TEST(PrefixTable, SharesNothingBetweenSpaces) {
  PrefixTable store(kBlock);
  store.add(1, text(counting(0, 12), "a"));
  EXPECT_EQ(store.find(text(counting(0, 12), "a")).length, 12);
  for (const char* other : {"", "b", "aa", "1:a"}) {
    EXPECT_EQ(store.find(text(counting(0, 12), other)).length, 0) << other;
  }
}

TEST(PrefixTable, SharesWholeBlocksWhereTokensDoNotTellEverything) {
  PrefixTable store(kBlock);
  store.add(1, text(counting(0, 11), "", false));
  EXPECT_EQ(store.find(text(counting(0, 11))).length, 8);
  EXPECT_EQ(store.find(text(counting(0, 11), "", false)).length, 8);
  // The caller's hashes tell what tokens do not.
  PrefixTable::Text other = text(counting(0, 11), "", false);
  other.hashes[1] = "another picture";
  EXPECT_EQ(store.find(other).length, 4);
}

TEST(PrefixTable, ASequenceThatHoldsAnotherTakesItsPlace) {
  PrefixTable store(kBlock);
  store.add(1, text(counting(0, 9)));
  store.add(2, text(counting(0, 9), "b"));
  store.add(3, text(counting(0, 8)));  // is held by 1, and holds nobody
  store.pin(3);
  EXPECT_EQ(store.add(4, text(counting(0, 20))), std::vector<SeqId>{1});
  EXPECT_EQ(store.sequences(), (std::vector<SeqId>{2, 3, 4})) << "pinned ones and others' stay";
}

TEST(PrefixTable, TheLeastRecentlyUsedWithoutAPinGoesFirst) {
  PrefixTable store(kBlock);
  for (int i = 0; i < 3; ++i) store.add(i, text(counting(100 * i, 100 * i + 8)));
  EXPECT_EQ(store.oldest(), 0);
  store.use(0);
  store.pin(1);
  EXPECT_EQ(store.oldest(), 2);
  store.remove(2);
  EXPECT_EQ(store.oldest(), 0);
  store.remove(0);
  EXPECT_EQ(store.oldest(), std::nullopt);
  store.unpin(1);
  EXPECT_EQ(store.oldest(), 1);
}

TEST(PrefixTable, RefusesWhatItDoesNotHave) {
  const auto refused = [](const auto& call) { return testing::refusal<InvalidArgument>(call); };
  EXPECT_MENTIONS(refused([] { PrefixTable none(0); }), "block_tokens must be at least 1, got 0");
  PrefixTable store(kBlock);
  store.add(1, text(counting(0, 8)));
  EXPECT_MENTIONS(refused([&] { store.add(1, text(counting(0, 8))); }), "already, got 1");
  EXPECT_MENTIONS(refused([&] { store.remove(2); }), "sequence must be one of");
  EXPECT_MENTIONS(refused([&] { store.use(-1); }), "got -1");
  EXPECT_MENTIONS(refused([&] { store.unpin(1); }), "sequence must be pinned, got 1");
  PrefixTable::Text more = text(counting(0, 8));
  more.hashes.resize(3);
  EXPECT_MENTIONS(refused([&] { store.add(3, more); }), "hashes must be of whole blocks");
  EXPECT_EQ(store.size(), 1u);
}

// Against a search over all texts.
TEST(PrefixTable, AgreesWithASearchOverAll) {
  std::mt19937 random(5);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  PrefixTable store(kBlock);
  std::map<SeqId, PrefixTable::Text> held;
  std::vector<PrefixTable::Text> made = {text(counting(0, 40))};
  for (SeqId id = 0; id < 600; ++id) {
    const std::vector<std::int32_t>& begin = made[below(static_cast<int>(made.size()))].tokens;
    const std::vector<std::int32_t> some(begin.begin(),
                                         begin.begin() + below(static_cast<int>(begin.size()) + 1));
    std::vector<std::int32_t> more;
    for (int n = below(12); n > 0; --n) more.push_back(below(3));
    const PrefixTable::Text asked = text(joined(some, more), below(2) == 0 ? "" : "b");
    std::int64_t expected = 0;
    for (const auto& [other, entry] : held) {
      if (entry.space != asked.space) continue;
      const auto most = std::min(entry.tokens.size(), asked.tokens.size());
      std::int64_t same = 0;
      while (same < static_cast<std::int64_t>(most) && entry.tokens[same] == asked.tokens[same])
        ++same;
      if (same >= kBlock) expected = std::max(expected, same);
    }
    const PrefixTable::Match match = store.find(asked);
    // Of many with the same last common block it compares the newest.
    EXPECT_EQ(match.length / kBlock, expected / kBlock);
    EXPECT_LE(match.length, expected);
    if (match.length > 0) {
      const std::vector<std::int32_t>& theirs = held.at(match.sequence).tokens;
      EXPECT_TRUE(std::equal(theirs.begin(), theirs.begin() + match.length, asked.tokens.begin()));
    }
    made.push_back(asked);
    for (const SeqId gone : store.add(id, asked)) held.erase(gone);
    held[id] = asked;
    if (below(3) == 0) {
      const SeqId oldest = *store.oldest();
      store.remove(oldest);
      held.erase(oldest);
    }
    EXPECT_EQ(store.size(), held.size());
  }
}

}  // namespace
}  // namespace icecache

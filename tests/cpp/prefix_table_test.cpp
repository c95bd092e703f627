// Which sequence begins as a prompt does, and who goes first.
#include "icecache/prefix_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

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
  PrefixTable table(kBlock);
  table.add(1, text(joined(counting(0, 10), {99, 98})));
  table.add(2, text(joined(counting(0, 14), {97})));
  const auto match = table.find(text(counting(0, 30)));
  EXPECT_EQ(match.sequence, 2);
  EXPECT_EQ(match.length, 14);
  EXPECT_EQ(table.find(text(joined(counting(0, 10), {99}))).length, 11);
  EXPECT_EQ(table.find(text(joined(counting(0, 3), {50, 51}))).length, 0) << "less than a block";
  EXPECT_EQ(table.find(text(counting(1, 30))).length, 0);
}

TEST(PrefixTable, SharesNothingBetweenSpaces) {
  PrefixTable table(kBlock);
  table.add(1, text(counting(0, 12), "a"));
  EXPECT_EQ(table.find(text(counting(0, 12), "a")).length, 12);
  for (const char* other : {"", "b", "aa", "1:a"}) {
    EXPECT_EQ(table.find(text(counting(0, 12), other)).length, 0) << other;
  }
}

TEST(PrefixTable, SharesWholeBlocksWhereTokensDoNotTellEverything) {
  PrefixTable table(kBlock);
  table.add(1, text(counting(0, 11), "", false));
  EXPECT_EQ(table.find(text(counting(0, 11))).length, 8);
  EXPECT_EQ(table.find(text(counting(0, 11), "", false)).length, 8);
  // The caller's hashes tell what tokens do not.
  PrefixTable::Text other = text(counting(0, 11), "", false);
  other.hashes[1] = "another picture";
  EXPECT_EQ(table.find(other).length, 4);
}

TEST(PrefixTable, ASequenceThatHoldsAnotherTakesItsPlace) {
  PrefixTable table(kBlock);
  table.add(1, text(counting(0, 9)));
  table.add(2, text(counting(0, 9), "b"));
  table.add(3, text(counting(0, 8)));  // is held by 1, and holds nobody
  table.pin(3);
  EXPECT_EQ(table.add(4, text(counting(0, 20))), std::vector<SeqId>{1});
  EXPECT_EQ(table.sequences(), (std::vector<SeqId>{2, 3, 4})) << "pinned ones and others' stay";
}

TEST(PrefixTable, OfManyThatEndInOneBlockThoseThatItHoldsLeave) {
  PrefixTable table(kBlock);
  for (int i = 0; i < 40; ++i) table.add(i, text(joined(counting(0, 8), {100 + i, 7})));
  EXPECT_EQ(table.add(40, text(joined(counting(0, 8), {117, 7, 1}))), std::vector<SeqId>{17});
  table.add(41, text(counting(0, 8), "", false));
  EXPECT_EQ(table.add(42, text(counting(0, 9), "", false)), std::vector<SeqId>{41});
  table.add(43, text(counting(0, 4)));
  EXPECT_EQ(table.add(44, text(counting(0, 13), "", false)), std::vector<SeqId>{43});
  EXPECT_TRUE(table.add(45, text(counting(0, 13))).empty())
      << "nobody holds the end of a text whose token ids do not tell everything";
}

TEST(PrefixTable, ComparesTokensWhereHashesCollideOrAreNotChained) {
  PrefixTable table(kBlock);
  PrefixTable::Text one = text(counting(0, 12)),
                    other = text(joined(counting(0, 8), {50, 51, 52, 53}));
  other.hashes[2] = one.hashes[2];
  table.add(1, one);
  EXPECT_EQ(table.find(other).length, 8);
  EXPECT_TRUE(table.add(2, other).empty());
  one.hashes[0] = "unknown";  // the search for the last known block passes it
  EXPECT_EQ(table.find(one).length, 12);
  one.hashes = {"a", "b", "c"};
  EXPECT_EQ(table.find(one).length, 0);
}

TEST(PrefixTable, ItsVersionTellsWhetherAnAnswerStands) {
  PrefixTable table(kBlock);
  const std::int64_t empty = table.version();
  table.add(1, text(counting(0, 8)));
  const std::int64_t one = table.version();
  EXPECT_NE(one, empty);
  table.find(text(counting(0, 8)));
  table.use(1);
  table.pin(1);
  table.unpin(1);
  EXPECT_ANY_THROW(table.add(1, text(counting(0, 8))));
  EXPECT_ANY_THROW(table.remove(2));
  EXPECT_EQ(table.version(), one);
  table.remove(1);
  EXPECT_NE(table.version(), one);
  EXPECT_NE(table.version(), empty);
}

TEST(PrefixTable, TheLeastRecentlyUsedWithoutAPinGoesFirst) {
  PrefixTable table(kBlock);
  for (int i = 0; i < 3; ++i) table.add(i, text(counting(100 * i, 100 * i + 8)));
  EXPECT_EQ(table.oldest(), 0);
  table.use(0);
  table.pin(1);
  EXPECT_EQ(table.oldest(), 2);
  table.remove(2);
  EXPECT_EQ(table.oldest(), 0);
  table.remove(0);
  EXPECT_EQ(table.oldest(), std::nullopt);
  table.unpin(1);
  EXPECT_EQ(table.oldest(), 1);
}

TEST(PrefixTable, RefusesWhatItDoesNotHave) {
  const auto refused = [](const auto& call) { return testing::refusal<InvalidArgument>(call); };
  EXPECT_MENTIONS(refused([] { PrefixTable none(0); }), "block_tokens must be at least 1, got 0");
  PrefixTable table(kBlock);
  table.add(1, text(counting(0, 8)));
  EXPECT_MENTIONS(refused([&] { table.add(1, text(counting(0, 8))); }), "already, got 1");
  EXPECT_MENTIONS(refused([&] { table.remove(2); }), "sequence must be one of");
  EXPECT_MENTIONS(refused([&] { table.use(-1); }), "got -1");
  EXPECT_MENTIONS(refused([&] { table.unpin(1); }), "sequence must be pinned, got 1");
  PrefixTable::Text more = text(counting(0, 8));
  more.hashes.resize(3);
  EXPECT_MENTIONS(refused([&] { table.add(3, more); }), "hashes must be of whole blocks");
  EXPECT_EQ(table.size(), 1u);
}

// Against a search over all texts.
TEST(PrefixTable, AgreesWithASearchOverAll) {
  std::mt19937 random(5);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  PrefixTable table(kBlock);
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
    const PrefixTable::Match match = table.find(asked);
    // Of many with the same last common block it compares the newest.
    EXPECT_EQ(match.length / kBlock, expected / kBlock);
    EXPECT_LE(match.length, expected);
    if (match.length > 0) {
      const std::vector<std::int32_t>& theirs = held.at(match.sequence).tokens;
      EXPECT_TRUE(std::equal(theirs.begin(), theirs.begin() + match.length, asked.tokens.begin()));
    }
    made.push_back(asked);
    std::set<SeqId> covered;
    for (const auto& [other, entry] : held) {
      if (entry.space == asked.space && entry.tokens.size() >= kBlock &&
          entry.tokens.size() <= asked.tokens.size() &&
          std::equal(entry.tokens.begin(), entry.tokens.end(), asked.tokens.begin()))
        covered.insert(other);
    }
    const std::vector<SeqId> gone = table.add(id, asked);
    EXPECT_EQ(std::set<SeqId>(gone.begin(), gone.end()), covered);
    for (const SeqId other : gone) held.erase(other);
    held[id] = asked;
    if (below(3) == 0) {
      const SeqId oldest = *table.oldest();
      table.remove(oldest);
      held.erase(oldest);
    }
    EXPECT_EQ(table.size(), held.size());
  }
}

}  // namespace
}  // namespace icecache

// Tokens that are taken back: rejected drafts, a question that makes room for the next one.
#include "device_talk.h"

namespace icecache {
namespace {

Rows say(Talk& talk, int batch, unsigned seed) {
  const Words next = words(talk.shape, batch, seed);
  talk.queries = next.queries;
  return talk.step(next.keys, next.values);
}

struct Cut {
  int prompt, before, after, beyond;  // tokens: of the prompt, kept after it, taken back, next
  DType dtype = DType::kFloat32;
};

// Bit for bit: cached rows may be others, but no result depends on them.
TEST_F(DeviceCacheTest, TakenBackIsAsIfNeverSaid) {
  for (const Cut& cut : {Cut{300, 0, 5, 12},   // all that came after the prompt
                         Cut{300, 20, 3, 12},  // a draft
                         Cut{300, 6, 30, 12},  // more than a window
                         Cut{300, 2, 70, 4},   // more than a node
                         Cut{9, 6, 30, 16},    // a short prompt: to less than sinks and window
                         Cut{300, 4, 2, 6, DType::kBFloat16}}) {
    Case setup;
    setup.dtype = cut.dtype;
    setup.batch = 1;
    setup.kv_heads = 1;
    setup.budget = 96;
    Talk one(setup, 1200), other(setup, 1200);
    for (Talk* talk : {&one, &other}) {
      talk->prefill(0, cut.prompt);
      for (int t = 0; t < cut.before; ++t) say(*talk, 1, t);
    }
    for (int t = 0; t < cut.after; ++t) say(one, 1, 1000 + t);
    one.truncate(0, cut.prompt + cut.before);
    one.expect_complete(0);
    for (int t = 0; t < cut.beyond; ++t) {
      const Rows said = say(one, 1, 2000 + t), expected = say(other, 1, 2000 + t);
      ASSERT_TRUE(same(said, expected)) << cut.prompt << " + " << cut.before << ", step " << t;
    }
    one.expect_complete(0);
  }
}

TEST_F(DeviceCacheTest, TokensOfAPromptAreTakenBack) {
  Case setup;
  setup.kv_heads = 1;
  setup.budget = 512;
  Talk talk(setup, 800);
  talk.prefill(0, 400);
  talk.prefill(1, 450);
  for (int t = 0; t < 8; ++t) talk.step();
  for (const int kept : {390, 300, 20, 3}) {
    talk.truncate(0, kept);
    talk.expect_complete(0);
    for (int t = 0; t < 5; ++t) {
      const Rows out = talk.step();
      ASSERT_LT(talk.error(out, 0), rounding(setup.dtype)) << kept;
    }
    talk.expect_complete(0);
  }
  talk.expect_complete(1);
}

TEST_F(DeviceCacheTest, WhatIsTakenBackStaysWithAFork) {
  Case setup;
  setup.kv_heads = 1;
  Talk talk(setup, 1200);
  talk.prefill(0, 300);
  for (int t = 0; t < 50; ++t) talk.step({0, -1});
  talk.fork(1, 0);
  talk.truncate(0, 320);  // into pages that both hold
  talk.expect_complete(1);
  for (int t = 0; t < 30; ++t) {
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), 0.15);
    ASSERT_LT(talk.error(out, 1), 0.15);
  }
  talk.expect_complete(0);
  talk.expect_complete(1);
  talk.truncate(0, 200);  // into the prompt
  talk.expect_complete(0);
  talk.expect_complete(1);
  talk.cache->release(0, nullptr);
  talk.cache->truncate(1, 0, nullptr);
  EXPECT_EQ(talk.cache->memory().host_bytes, 0);
}

TEST_F(DeviceCacheTest, RefusesToTakeBackWhatIsNotThere) {
  Case setup;
  Talk talk(setup, 200);
  talk.prefill(0, 50);
  EXPECT_THROW(talk.cache->truncate(0, 51, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->truncate(0, -1, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->truncate(2, 1, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->truncate(1, 1, nullptr), InvalidArgument);  // holds nothing
  talk.truncate(0, 50);
  talk.expect_complete(0);
}

}  // namespace
}  // namespace icecache

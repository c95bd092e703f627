// Several tokens of a sequence in one call: steps of drafts, and tokens whose attention was computed
// elsewhere. Both leave what steps of one token leave, to the bit.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "device_talk.h"
#ifdef ICECACHE_EMULATE_CUDA
#include "emulator.h"
#endif

namespace icecache {
namespace {

// Row `from` of `rows` becomes row `to` of `target`.
void copy_row(Rows& target, std::size_t to, const Rows& rows, std::size_t from, int heads, int d) {
  const std::size_t size = static_cast<std::size_t>(heads) * d;
  for (std::size_t i = 0; i < size; ++i) target.set(to * size + i, rows.get(from * size + i));
}

// Two caches that are told the same: `many` in as few calls as there may be, `one` token by token.
struct Twins {
  Twins(const Case& setup, std::int64_t max_tokens)
      : batch(setup.batch), many(setup, max_tokens), one(setup, max_tokens) {}

  template <typename Do>
  void both(const Do& act) {
    act(many);
    act(one);
  }
  void prefill(int b, int tokens) {
    both([&](Talk& talk) { talk.prefill(b, tokens); });
  }
  void truncate(int b, std::int64_t kept) {
    many.cache->take_back(b, kept, nullptr);
    many.cache->take_back(b, kept + 3, nullptr);  // of which there are fewer
    one.truncate(b, kept);
    many.keys = one.keys;
    many.values = one.values;
  }

  // counts[b] tokens for sequence b; whether all answers are the same.
  bool step(const std::vector<int>& counts, int tokens = 0) {
    const CacheShape& shape = many.shape;
    const int d = shape.head_dim, all = std::accumulate(counts.begin(), counts.end(), 0);
    tokens = std::max(tokens, *std::max_element(counts.begin(), counts.end()));
    Rows k(shape.dtype, static_cast<std::size_t>(all) * shape.num_kv_heads * d), v = k;
    Rows q(shape.dtype, static_cast<std::size_t>(all) * shape.num_q_heads * d), expected = q;
    std::vector<std::int32_t> rows(static_cast<std::size_t>(tokens) * batch, -1);
    for (int t = 0; t < tokens; ++t) {
      const Words next = words(shape, batch, seed++);
      std::vector<std::int32_t> taking(batch, -1);
      int first = 0, taken = 0;
      for (int b = 0; b < batch; first += counts[b++]) {
        if (t >= counts[b]) continue;
        taking[b] = taken++;
        rows[t * batch + b] = first + t;
        copy_row(k, first + t, next.keys, b, shape.num_kv_heads, d);
        copy_row(v, first + t, next.values, b, shape.num_kv_heads, d);
        copy_row(q, first + t, next.queries, b, shape.num_q_heads, d);
      }
      if (taken == 0) continue;
      one.queries = next.queries;
      const Rows out = one.step(next.keys, next.values, taking);
      for (int b = 0; b < batch; ++b) {
        if (taking[b] < 0) continue;
        copy_row(expected, rows[t * batch + b], out, b, shape.num_q_heads, d);
      }
    }
    const OnDevice on_q(q), on_k(k), on_v(v), out(q);
    const gpu::Buffer on_rows(rows.size() * sizeof(std::int32_t), nullptr);
    gpu::copy_to_device(on_rows.data(), rows.data(), on_rows.bytes(), nullptr);
    many.cache->step(0, on_q.data(), on_k.data(), on_v.data(), out.data(), nullptr,
                     on_rows.as<std::int32_t>(), tokens);
    many.keys = one.keys;
    many.values = one.values;
    Rows found = q;
    out.read(found);
    return same(found, expected);
  }

  // `count` tokens for sequence b, which `many` does not attend; `asked` queries are given.
  void extend(int b, int count, int asked) {
    const CacheShape& shape = many.shape;
    const int d = shape.head_dim, heads = shape.num_kv_heads, q_heads = shape.num_q_heads;
    Rows k(shape.dtype, static_cast<std::size_t>(count) * heads * d), v = k;
    Rows q(shape.dtype, static_cast<std::size_t>(asked) * q_heads * d);
    for (int t = 0; t < count; ++t) {
      const Words next = words(shape, batch, seed++);
      std::vector<std::int32_t> taking(batch, -1);
      taking[b] = 0;
      one.queries = next.queries;
      one.step(next.keys, next.values, taking);
      for (int h = 0; h < heads; ++h) {
        copy_row(k, h * count + t, next.keys, b * heads + h, 1, d);
        copy_row(v, h * count + t, next.values, b * heads + h, 1, d);
      }
      for (int h = 0; h < q_heads && t >= count - asked; ++h) {
        copy_row(q, h * asked + t - (count - asked), next.queries, b * q_heads + h, 1, d);
      }
    }
    const OnDevice on_k(k), on_v(v), on_q(q);
    const auto view = [&](const OnDevice& rows, int of, int tokens) {
      return TensorView{rows.data(), shape.dtype, of, tokens, d, std::int64_t{tokens} * d, d};
    };
    many.cache->extend(0, b, view(on_k, heads, count), view(on_v, heads, count),
                       view(on_q, q_heads, asked), nullptr);
    gpu::synchronize(nullptr);
    many.keys = one.keys;
    many.values = one.values;
  }

  void expect_alike(const std::vector<int>& live) {
    for (const int b : live) {
      many.expect_complete(b);
      ASSERT_EQ(many.cache->length(0, b, nullptr), one.cache->length(0, b, nullptr));
    }
    const HeadStats mine = many.cache->stats(0, -1, nullptr);
    const HeadStats theirs = one.cache->stats(0, -1, nullptr);
    EXPECT_EQ(mine.steps, theirs.steps);
    EXPECT_EQ(mine.dense_steps, theirs.dense_steps);
  }

  int batch;
  unsigned seed = 100;
  Talk many, one;
};

Case small_budget(std::int64_t device_tokens) {
  Case setup;
  setup.budget = 96;
  setup.device_tokens = device_tokens;
  return setup;
}

// Drafts and their rejection: with and without residents, and with both in a batch.
TEST_F(DeviceCacheTest, StepsOfSeveralTokensAreStepsOfOne) {
  for (const std::int64_t device_tokens : {0, 4096}) {
    for (const int group : {4, 8}) {
      Case setup = small_budget(device_tokens);
      setup.group = group;
      setup.dtype = group == 8 ? DType::kBFloat16 : DType::kFloat32;
      setup.kv_heads = 1;
      Twins twins(setup, 1200);
      twins.prefill(0, 300);
      twins.prefill(1, 18);  // ends within sinks and window
      ASSERT_TRUE(twins.step({4, 1}));
      ASSERT_TRUE(twins.step({1, 16}));
      twins.truncate(1, 25);
      ASSERT_TRUE(twins.step({16, 3}));
      twins.truncate(0, 302);  // all but the first draft
      twins.both([](Talk& talk) { talk.cache->evict(1, nullptr); });
      ASSERT_TRUE(twins.step({5, 5}));
      ASSERT_TRUE(twins.step({0, 2}, 16));
      ASSERT_TRUE(twins.step({1, 1}));
      twins.expect_alike({0, 1});
    }
  }
}

// A sequence that outgrows its extents within a step goes on within the budget, in that step.
TEST_F(DeviceCacheTest, TheSwitchComesInTheMiddleOfAStep) {
  Case setup = small_budget(1024);
  setup.kv_heads = 2;
  setup.window = 4;  // shorter than what a step brings
  Twins twins(setup, 1200);
  for (Talk* talk : {&twins.many, &twins.one}) talk->cache->reserve(0, 500, nullptr);
  twins.prefill(0, 505);
  twins.prefill(1, 40);
  ASSERT_TRUE(twins.step({12, 2}));  // seven of them are within the extents
  EXPECT_EQ(twins.many.cache->stats(0, -1, nullptr).dense_steps, (7 + 2) * setup.kv_heads);
  ASSERT_TRUE(twins.step({3, 12}));
  twins.truncate(0, 508);  // before the switch
  ASSERT_TRUE(twins.step({16, 1}));
  twins.expect_alike({0, 1});
}

TEST_F(DeviceCacheTest, StepsOfSeveralTokensEndWithTheRoom) {
  for (const std::int64_t device_tokens : {0, 1024}) {
    Case setup = small_budget(device_tokens);
    setup.budget = 48;
    setup.kv_heads = 1;
    Twins twins(setup, 70);
    twins.prefill(0, 60);
    const int room = static_cast<int>(twins.many.room());
    while (twins.many.cache->length(0, 0, nullptr) + 16 <= room) ASSERT_TRUE(twins.step({16, 0}));
    ASSERT_TRUE(twins.step({16, 3}));  // NaN behind the last; sequence 1 holds nothing
    EXPECT_EQ(twins.many.cache->length(0, 0, nullptr), room);
    EXPECT_EQ(twins.many.cache->length(0, 1, nullptr), 0);
  }
}

TEST_F(DeviceCacheTest, RefusesStepsOfTooManyTokens) {
  Talk talk(small_budget(0), 200);
  talk.prefill(0, 30);
  const OnDevice rows(Rows(DType::kFloat32, 17 * 2 * 8 * 64));
  const gpu::Buffer of(17 * 2 * sizeof(std::int32_t), nullptr);
  for (const int tokens : {0, 17}) {
    EXPECT_THROW(talk.cache->step(0, rows.data(), rows.data(), rows.data(), rows.data(), nullptr,
                                  of.as<std::int32_t>(), tokens),
                 InvalidArgument);
  }
  EXPECT_THROW(
      talk.cache->step(0, rows.data(), rows.data(), rows.data(), rows.data(), nullptr, nullptr, 2),
      InvalidArgument);
  talk.expect_complete(0);
}

// Bit for bit what steps leave: window, pages, sketches, nodes, extents, queries of the next build.
TEST_F(DeviceCacheTest, TokensAttendedElsewhereAreAsTokensOfSteps) {
  struct Turn {
    int prompt, before, count, asked;  // tokens: of the prompt, of steps, of the turn; queries
    std::int64_t device_tokens;
    DType dtype = DType::kFloat32;
  };
  for (const Turn& turn :
       {Turn{1, 0, 1, 1, 0}, Turn{2, 1, 16, 16, 0}, Turn{3, 0, 100, 64, 0}, Turn{19, 0, 2, 2, 1024},
        Turn{20, 0, 1, 1, 0}, Turn{84, 0, 64, 64, 0}, Turn{300, 5, 15, 15, 1024, DType::kBFloat16},
        Turn{300, 7, 90, 80, 1024}, Turn{460, 0, 60, 60, 512}}) {
    Case setup = small_budget(turn.device_tokens);
    setup.dtype = turn.dtype;
    setup.batch = 1;
    setup.kv_heads = turn.count < 16 ? 2 : 1;
    setup.group = 2;
    Twins twins(setup, 900);
    if (turn.device_tokens == 512) {  // of which the turn goes beyond: not resident any more
      twins.both([](Talk& talk) { talk.cache->reserve(0, 500, nullptr); });
    }
    twins.prefill(0, turn.prompt);
    for (int t = 0; t < turn.before; ++t) ASSERT_TRUE(twins.step({1}));
    if (turn.device_tokens == 512) {
      twins.one.cache->reserve(0, turn.prompt + turn.count, nullptr);
    }
    twins.extend(0, turn.count, turn.asked);
    twins.many.expect_complete(0);
    EXPECT_EQ(twins.many.cache->memory().resident_sequences,
              twins.one.cache->memory().resident_sequences);
    ASSERT_TRUE(twins.step({3})) << turn.prompt << " + " << turn.count;
    twins.both([](Talk& talk) { talk.cache->evict(0, nullptr); });
    ASSERT_TRUE(twins.step({2})) << turn.prompt << " + " << turn.count;
    if (turn.prompt > 100 && turn.dtype == DType::kFloat32) continue;  // builds take long
    twins.both([](Talk& talk) { talk.cache->rebuild(0, 0, nullptr); });
    ASSERT_TRUE(twins.step({2})) << turn.prompt << " + " << turn.count;
    twins.truncate(0, turn.prompt + turn.before + turn.count / 2 + 1);
    ASSERT_TRUE(twins.step({2})) << turn.prompt << " + " << turn.count;
    twins.many.expect_complete(0);
  }
}

// What a prefix is worth: a fork and its suffix take the pages of the suffix, and leave the parent.
TEST_F(DeviceCacheTest, ASuffixOfAForkTakesItsOwnPages) {
  Case setup = small_budget(4096);
  Twins twins(setup, 2000);
  for (Talk* talk : {&twins.many, &twins.one}) talk->cache->reserve(0, 1030, nullptr);
  twins.prefill(0, 1020);
  twins.both([](Talk& talk) { talk.fork(1, 0); });
  twins.one.cache->reserve(1, 1120, nullptr);
  const std::int64_t forked = twins.many.cache->memory().host_bytes;
  twins.extend(1, 100, 64);
  const std::int64_t page = 2 * 16 * 64 * 4;
  EXPECT_LE(twins.many.cache->memory().host_bytes, forked + 64 * page * setup.kv_heads);
  ASSERT_TRUE(twins.step({2, 2}));
  for (const int b : {0, 1}) twins.both([b](Talk& talk) { talk.cache->evict(b, nullptr); });
  twins.truncate(0, 1021);  // into pages that the fork has, too
  ASSERT_TRUE(twins.step({2, 2}));
  twins.truncate(0, 900);  // a build
  ASSERT_TRUE(twins.step({2, 2}));
  twins.many.expect_complete(0);
  twins.many.expect_complete(1);
  EXPECT_THROW(twins.many.cache->take_back(0, 0, nullptr), InvalidArgument);
  EXPECT_THROW(twins.many.cache->take_back(2, 1, nullptr), InvalidArgument);
}

TEST_F(DeviceCacheTest, RefusesTokensBehindNothingOrBeyondTheRoom) {
  Case setup = small_budget(0);
  Talk talk(setup, 200);
  talk.prefill(0, 150);
  const OnDevice rows(Rows(DType::kFloat32, std::size_t{8} * 400 * 64));
  const auto extend = [&](int b, int heads, int tokens, int asked) {
    const auto view = [&](int of, int count) {
      return TensorView{rows.data(), DType::kFloat32, of, count, 64, std::int64_t{count} * 64, 64};
    };
    talk.cache->extend(0, b, view(heads, tokens), view(heads, tokens), view(8, asked), nullptr);
  };
  EXPECT_THROW(extend(1, 2, 5, 5), InvalidArgument);  // holds nothing
  EXPECT_THROW(extend(2, 2, 5, 5), InvalidArgument);
  EXPECT_THROW(extend(0, 1, 5, 5), InvalidArgument);
  EXPECT_THROW(extend(0, 2, 5, 6), InvalidArgument);
  EXPECT_THROW(extend(0, 2, 300, 5), InvalidArgument);
  talk.expect_complete(0);
  extend(0, 2, 5, 5);
  EXPECT_EQ(talk.cache->length(0, 0, nullptr), 155);
}

}  // namespace
}  // namespace icecache

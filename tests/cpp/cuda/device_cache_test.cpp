// DeviceCache against attention over everything in double: on the emulator, and on a GPU where the
// build has CUDA and the machine a device.
#include "icecache/device_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "cuda/cuda_info.h"
#include "cuda/device.h"
#ifdef ICECACHE_EMULATE_CUDA
#include "emulator.h"
#endif
#include "icecache/engine.h"
#include "icecache/error.h"

namespace icecache {
namespace {

// Numbers as they are stored.
class Rows {
 public:
  Rows(DType dtype, std::size_t count) : dtype_(dtype), bytes_(count * size_of(dtype)) {}

  std::size_t size() const { return bytes_.size() / size_of(dtype_); }
  std::size_t bytes() const { return bytes_.size(); }
  std::byte* data() { return bytes_.data(); }
  const std::byte* data() const { return bytes_.data(); }
  void set(std::size_t i, float x) {
    if (dtype_ == DType::kFloat32) {
      std::memcpy(bytes_.data() + 4 * i, &x, 4);
      return;
    }
    std::uint16_t half = 0;
    if (dtype_ == DType::kFloat16) {
      const auto narrow = static_cast<_Float16>(x);
      std::memcpy(&half, &narrow, 2);
    } else {
      const auto bits = std::bit_cast<std::uint32_t>(x);
      half = static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    std::memcpy(bytes_.data() + 2 * i, &half, 2);
  }
  float get(std::size_t i) const {
    float x = 0;
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&x, bytes_.data() + 4 * i, 4);
      return x;
    }
    std::uint16_t half = 0;
    std::memcpy(&half, bytes_.data() + 2 * i, 2);
    if (dtype_ == DType::kBFloat16) return std::bit_cast<float>(std::uint32_t{half} << 16);
    _Float16 narrow;
    std::memcpy(&narrow, &half, 2);
    return static_cast<float>(narrow);
  }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

class OnDevice {
 public:
  explicit OnDevice(const Rows& rows) : buffer_(rows.bytes(), nullptr) {
    gpu::copy_to_device(buffer_.data(), rows.data(), rows.bytes(), nullptr);
    gpu::synchronize(nullptr);
  }
  void* data() const { return buffer_.data(); }
  void read(Rows& rows) const {
    gpu::copy_to_host(rows.data(), buffer_.data(), rows.bytes(), nullptr);
    gpu::synchronize(nullptr);
  }

 private:
  gpu::Buffer buffer_;
};

struct Case {
  int head_dim = 64;
  DType dtype = DType::kFloat32;
  int kv_heads = 2, group = 4, batch = 2;
  int budget = 256, window = 16, page_size = 16, far_node_tokens = 64, rank = 32;
  std::int64_t device_pages = 0;
  std::string tail = "on";
};

// A conversation with one layer of a cache, with all that was said kept on the side.
class Talk {
 public:
  Talk(const Case& setup, std::int64_t max_tokens, unsigned seed = 1)
      : setup_(setup), random_(seed), max_tokens_(max_tokens) {
    shape.num_layers = 1;
    shape.num_kv_heads = setup.kv_heads;
    shape.num_q_heads = setup.kv_heads * setup.group;
    shape.head_dim = setup.head_dim;
    shape.dtype = setup.dtype;
    Config config;
    config.token_budget = setup.budget;
    config.window_tokens = setup.window;
    config.page_size = setup.page_size;
    config.far_node_tokens = setup.far_node_tokens;
    config.sketch_rank = setup.rank;
    config.device_pages = setup.device_pages;
    config.tail = setup.tail;
    config.host_memory = std::int64_t{1} << 30;
    config.index_threads = 1;
    cache = std::make_unique<DeviceCache>(shape, config, setup.batch, max_tokens, 0);
    keys.resize(setup.batch);
    values.resize(setup.batch);
    centres_.resize(static_cast<std::size_t>(kCentres) * setup.head_dim);
    for (float& c : centres_) c = normal();
  }

  int d() const { return setup_.head_dim; }
  float normal() { return std::normal_distribution<float>()(random_); }
  // Keys in clusters, so that there is something to find.
  float key(int centre, int i) { return centres_[centre * d() + i] + 0.6f * normal(); }

  // A prompt of `tokens` for sequence b.
  void prefill(int b, int tokens) {
    const int heads = setup_.kv_heads, asked = std::min(tokens, 128);
    Rows k(shape.dtype, static_cast<std::size_t>(heads) * tokens * d()), v = k;
    Rows q(shape.dtype, static_cast<std::size_t>(shape.num_q_heads) * asked * d());
    keys[b].assign(heads, {});
    values[b].assign(heads, {});
    for (int h = 0; h < heads; ++h) {
      for (int t = 0; t < tokens; ++t) {
        const int centre = static_cast<int>(random_() % kCentres);
        for (int i = 0; i < d(); ++i) {
          const std::size_t at = (static_cast<std::size_t>(h) * tokens + t) * d() + i;
          k.set(at, key(centre, i));
          v.set(at, normal());
          keys[b][h].push_back(k.get(at));
          values[b][h].push_back(v.get(at));
        }
      }
    }
    for (std::size_t i = 0; i < q.size(); ++i) q.set(i, query(static_cast<int>(i) % d()));
    held_.emplace_back(k);
    held_.emplace_back(v);
    held_.emplace_back(q);
    prompt_queries = q;
    const OnDevice* on = held_.data() + held_.size() - 3;
    const auto view = [&](const OnDevice& rows, int n, int t) {
      return TensorView{rows.data(), shape.dtype, n, t, d(), std::int64_t{t} * d(), d()};
    };
    cache->prefill(0, b, view(on[0], heads, tokens), view(on[1], heads, tokens),
                   view(on[2], shape.num_q_heads, asked), nullptr);
    cache->wait(0);
    held_.clear();
  }

  float query(int i) { return 2.0f * centres_[centre_ * d() + i] + 0.8f * normal(); }

  // One token for every sequence; returns the cache's outputs [B, Hq, D].
  Rows step() {
    centre_ = static_cast<int>(random_() % kCentres);
    Rows k(shape.dtype, static_cast<std::size_t>(setup_.batch) * setup_.kv_heads * d()), v = k;
    queries = Rows(shape.dtype, static_cast<std::size_t>(setup_.batch) * shape.num_q_heads * d());
    for (std::size_t i = 0; i < k.size(); ++i) {
      k.set(i, key(centre_, static_cast<int>(i) % d()));
      v.set(i, normal());
    }
    for (std::size_t i = 0; i < queries.size(); ++i) {
      queries.set(i, query(static_cast<int>(i) % d()));
    }
    return step(k, v);
  }
  Rows step(const Rows& k, const Rows& v) {
    for (int b = 0; b < setup_.batch; ++b) {
      if (keys[b].empty() || static_cast<std::int64_t>(keys[b][0].size()) / d() >= room()) continue;
      for (int h = 0; h < setup_.kv_heads; ++h) {
        for (int i = 0; i < d(); ++i) {
          const std::size_t at = (static_cast<std::size_t>(b) * setup_.kv_heads + h) * d() + i;
          keys[b][h].push_back(k.get(at));
          values[b][h].push_back(v.get(at));
        }
      }
    }
    Rows result = queries;
    const OnDevice q(queries), new_k(k), new_v(v), out(result);
    cache->step(0, q.data(), new_k.data(), new_v.data(), out.data(), nullptr);
    out.read(result);
    return result;
  }
  // Tokens that a sequence has room for: max_tokens, rounded up to whole nodes.
  std::int64_t room() const {
    const std::int64_t near = 4 + setup_.window,
                       node = std::max(setup_.far_node_tokens, setup_.page_size);
    return near + (max_tokens_ - near + node - 1) / node * node;
  }

  // Attention over everything, in double: [Hq, D] of sequence b.
  std::vector<double> dense(int b) const {
    std::vector<double> result;
    for (int h = 0; h < setup_.kv_heads; ++h) {
      const std::size_t tokens = keys[b][h].size() / d();
      for (int g = 0; g < setup_.group; ++g) {
        const std::size_t q =
            (static_cast<std::size_t>(b) * shape.num_q_heads + h * setup_.group + g) * d();
        std::vector<double> logits(tokens), out(d());
        for (std::size_t t = 0; t < tokens; ++t) {
          for (int i = 0; i < d(); ++i) logits[t] += queries.get(q + i) * keys[b][h][t * d() + i];
          logits[t] *= shape.softmax_scale();
        }
        const double high = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (std::size_t t = 0; t < tokens; ++t) {
          const double w = std::exp(logits[t] - high);
          sum += w;
          for (int i = 0; i < d(); ++i) out[i] += w * values[b][h][t * d() + i];
        }
        for (double x : out) result.push_back(x / sum);
      }
    }
    return result;
  }
  // Relative error of the outputs of sequence b.
  double error(const Rows& out, int b) const {
    const std::vector<double> exact = dense(b);
    double apart = 0, size = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
      const double delta = out.get(static_cast<std::size_t>(b) * exact.size() + i) - exact[i];
      apart += delta * delta;
      size += exact[i] * exact[i];
    }
    return std::sqrt(apart / size);
  }
  // That the cache holds every token of sequence b, each once.
  void expect_complete(int b) {
    const auto tokens = static_cast<std::size_t>(cache->length(0, b, nullptr));
    ASSERT_EQ(tokens * d(), keys[b][0].size());
    Rows k(shape.dtype, tokens * setup_.kv_heads * d()), v = k;
    const OnDevice on_k(k), on_v(v);
    cache->gather(0, b, on_k.data(), on_v.data(), nullptr);
    on_k.read(k);
    on_v.read(v);
    for (int h = 0; h < setup_.kv_heads; ++h) {
      std::multiset<std::vector<float>> held, said;
      for (std::size_t t = 0; t < tokens; ++t) {
        std::vector<float> a, c;
        for (int i = 0; i < d(); ++i) {
          a.push_back(k.get((h * tokens + t) * d() + i));
          c.push_back(keys[b][h][t * d() + i]);
        }
        for (int i = 0; i < d(); ++i) {
          a.push_back(v.get((h * tokens + t) * d() + i));
          c.push_back(values[b][h][t * d() + i]);
        }
        held.insert(std::move(a));
        said.insert(std::move(c));
      }
      EXPECT_TRUE(held == said) << "head " << h;
    }
  }

  static constexpr int kCentres = 24;
  CacheShape shape;
  std::unique_ptr<DeviceCache> cache;
  std::vector<std::vector<std::vector<float>>> keys, values;  // [B][Hkv][L * D]
  Rows prompt_queries{DType::kFloat32, 0};                    // of the last prompt
  Rows queries{DType::kFloat32, 0};                           // of the last step

 private:
  Case setup_;
  std::mt19937 random_;
  std::int64_t max_tokens_;
  std::vector<float> centres_;
  int centre_ = 0;
  std::vector<OnDevice> held_;
};

class DeviceCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_info().devices == 0) GTEST_SKIP() << cuda_info().message;
  }
};

double rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kFloat16 ? 2e-3 : 1e-2;
}

bool same(const Rows& a, const Rows& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.data(), b.data(), a.bytes()) == 0;
}

// Where the budget covers everything, it is full attention: every head size, type and group.
class DeviceCacheShapes : public DeviceCacheTest,
                          public ::testing::WithParamInterface<std::tuple<int, DType, int>> {};

TEST_P(DeviceCacheShapes, FullBudgetIsFullAttention) {
  Case setup;
  std::tie(setup.head_dim, setup.dtype, setup.group) = GetParam();
  setup.budget = 400;
  Talk talk(setup, 400);
  talk.prefill(0, 150);
  talk.prefill(1, 7);  // shorter than sinks and window
  for (int t = 0; t < 24; ++t) {
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), rounding(setup.dtype)) << "step " << t;
    ASSERT_LT(talk.error(out, 1), rounding(setup.dtype)) << "step " << t;
  }
  talk.expect_complete(0);
  talk.expect_complete(1);
}

std::string shape_name(const ::testing::TestParamInfo<std::tuple<int, DType, int>>& info) {
  return "d" + std::to_string(std::get<0>(info.param)) + name_of(std::get<1>(info.param)) + "g" +
         std::to_string(std::get<2>(info.param));
}

using ::testing::Combine;
using ::testing::Values;
INSTANTIATE_TEST_SUITE_P(Rows, DeviceCacheShapes,
                         Combine(Values(64, 96, 128, 256),
                                 Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                                 Values(4)),
                         shape_name);
INSTANTIATE_TEST_SUITE_P(Groups, DeviceCacheShapes,
                         Combine(Values(64, 128), Values(DType::kBFloat16), Values(1, 3, 7, 8, 16)),
                         shape_name);

TEST_F(DeviceCacheTest, WithinTheBudgetIsCloseToFullAttention) {
  Case setup;
  setup.batch = 1;
  Talk talk(setup, 4096);
  setup.tail = "off";
  Talk without(setup, 4096);
  talk.prefill(0, 3000);
  without.prefill(0, 3000);
  double with_tail = 0, no_tail = 0;
  for (int t = 0; t < 8; ++t) {
    with_tail += talk.error(talk.step(), 0) / 8;
    no_tail += without.error(without.step(), 0) / 8;
  }
  EXPECT_LT(with_tail, 0.08);
  EXPECT_LT(with_tail, 0.7 * no_tail);
  talk.expect_complete(0);
}

// The same algorithm as on the CPU: the engine there comes as close to full attention.
TEST_F(DeviceCacheTest, IsAsCloseAsTheEngineOnTheCpu) {
  Case setup;
  setup.batch = 1;
  setup.budget = 96;
  setup.far_node_tokens = 32;
  Talk talk(setup, 4096);
  const int tokens = 3000, heads = setup.kv_heads, d = setup.head_dim;
  talk.prefill(0, tokens);
  Engine engine(talk.shape, talk.cache->config());
  const std::vector<SeqId> sequence = {engine.new_sequence()};
  // The last `count` tokens of every head, as [Hkv, count, D].
  const auto last = [&](const std::vector<std::vector<float>>& all, int count) {
    Rows rows(talk.shape.dtype, static_cast<std::size_t>(heads) * count * d);
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < count * d; ++i) {
        rows.set(static_cast<std::size_t>(h) * count * d + i,
                 all[h][all[h].size() - count * d + i]);
      }
    }
    return rows;
  };
  const auto view = [&](Rows& rows, int of, int count) {
    return TensorView{rows.data(), talk.shape.dtype, of, count, d, std::int64_t{count} * d, d};
  };
  Rows keys = last(talk.keys[0], tokens), values = last(talk.values[0], tokens);
  const TensorView prompt_keys[] = {view(keys, heads, tokens)};
  const TensorView prompt_values[] = {view(values, heads, tokens)};
  const TensorView seen[] = {view(talk.prompt_queries, talk.shape.num_q_heads, 128)};
  engine.append(sequence, 0, prompt_keys, prompt_values);
  engine.observe(sequence, 0, seen);
  double on_device = 0, on_cpu = 0;
  for (int t = 0; t < 10; ++t) {
    on_device += talk.error(talk.step(), 0) / 10;
    Rows k = last(talk.keys[0], 1), v = last(talk.values[0], 1), q = talk.queries, out = q;
    const TensorView key[] = {view(k, heads, 1)}, value[] = {view(v, heads, 1)};
    const TensorView query[] = {view(q, talk.shape.num_q_heads, 1)};
    const TensorView result[] = {view(out, talk.shape.num_q_heads, 1)};
    engine.step(sequence, 0, key, value, query, result);
    on_cpu += talk.error(out, 0) / 10;
  }
  EXPECT_LT(on_device, 1.1 * on_cpu);
  EXPECT_GT(on_device, 0.9 * on_cpu);
}

TEST_F(DeviceCacheTest, OptionsAllWork) {
  for (const int page_size : {8, 16, 32}) {
    for (const int node : {32, 64}) {
      for (const int rank : {32, 64}) {
        Case setup;
        setup.batch = 1;
        setup.kv_heads = 1;
        setup.page_size = page_size;
        setup.far_node_tokens = node;
        setup.rank = rank;
        setup.dtype = DType::kBFloat16;
        Talk talk(setup, 2200);
        talk.prefill(0, 2100);  // two blocks of the scan
        EXPECT_LT(talk.error(talk.step(), 0), 0.15) << page_size << " " << node << " " << rank;
        talk.expect_complete(0);
      }
    }
  }
}

TEST_F(DeviceCacheTest, TheSameCallsGiveTheSameBits) {
  Case setup;
  Talk one(setup, 3000), two(setup, 3000);
  for (Talk* talk : {&one, &two}) {
    talk->prefill(0, 2500);
    talk->prefill(1, 900);
  }
  for (int t = 0; t < 6; ++t) ASSERT_TRUE(same(one.step(), two.step())) << "step " << t;
}

// The row cache changes what moves, and nothing else.
TEST_F(DeviceCacheTest, EvictionChangesNoResult) {
  Case setup;
  setup.batch = 1;
  Talk large(
      [&] {
        setup.device_pages = 1024;
        return setup;
      }(),
      3000);
  Talk small(
      [&] {
        setup.device_pages = 1;
        return setup;
      }(),
      3000);
  large.prefill(0, 2800);
  small.prefill(0, 2800);
  for (int t = 0; t < 30; ++t) ASSERT_TRUE(same(large.step(), small.step())) << "step " << t;
  const DeviceCacheStats few = small.cache->stats(0, -1, nullptr),
                         many = large.cache->stats(0, -1, nullptr);
  EXPECT_GT(few.misses, many.misses);
  EXPECT_EQ(few.misses + few.hits, many.misses + many.hits);
  EXPECT_GT(few.bytes_moved, many.bytes_moved);
  EXPECT_GT(many.hits, 0);
  EXPECT_EQ(few.steps, 30 * 2);
  small.expect_complete(0);
}

TEST_F(DeviceCacheTest, GeneratedTokensJoinTheIndex) {
  Case setup;
  setup.batch = 1;
  setup.kv_heads = 1;
  setup.budget = 64;
  setup.far_node_tokens = 32;
  Talk talk(setup, 700);
  talk.prefill(0, 300);
  double error = 0;
  for (int t = 0; t < 300; ++t) {
    const Rows out = talk.step();
    if (t >= 292) error += talk.error(out, 0) / 8;
  }
  EXPECT_LT(error, 0.25);
  talk.expect_complete(0);
}

// A short prompt shapes a poor metric; built anew, the index sees what came after it.
TEST_F(DeviceCacheTest, ARebuiltIndexServesAGrownSequence) {
  Case setup;
  setup.batch = 2;
  setup.kv_heads = 1;
  setup.budget = 64;
  setup.far_node_tokens = 32;
  Talk kept(setup, 1200), rebuilt(setup, 1200);
  double before = 0, after = 0;
  for (Talk* talk : {&kept, &rebuilt}) {
    talk->prefill(0, 24);
    talk->prefill(1, 300);
    for (int t = 0; t < 700; ++t) talk->step();
  }
  const std::int64_t pages = rebuilt.cache->memory().host_bytes;
  rebuilt.cache->rebuild(0, 0, nullptr);
  EXPECT_EQ(rebuilt.cache->memory().host_bytes, pages);
  rebuilt.expect_complete(0);
  for (int t = 0; t < 40; ++t) {
    before += kept.error(kept.step(), 0) / 40;
    after += rebuilt.error(rebuilt.step(), 0) / 40;
  }
  EXPECT_LT(after, 0.8 * before);
  rebuilt.expect_complete(0);
  rebuilt.expect_complete(1);
}

TEST_F(DeviceCacheTest, ASecondPromptTakesThePlaceOfTheFirst) {
  Case setup;
  Talk talk(setup, 2000);
  talk.prefill(0, 1500);
  talk.prefill(1, 400);
  for (int t = 0; t < 30; ++t) talk.step();
  talk.prefill(0, 700);
  const Rows out = talk.step();
  EXPECT_LT(talk.error(out, 0), 0.15);
  EXPECT_LT(talk.error(out, 1), 0.15);
  talk.expect_complete(0);
  talk.expect_complete(1);
}

TEST_F(DeviceCacheTest, EmptySequencesAreZeroAndFullOnesNaN) {
  Case setup;
  setup.kv_heads = 1;
  Talk talk(setup, 40);
  talk.prefill(0, 38);
  std::int64_t held = 38;
  for (; held < talk.room(); ++held) {
    const Rows out = talk.step();
    ASSERT_LT(talk.error(out, 0), 1e-4);
    for (std::size_t i = out.size() / 2; i < out.size(); ++i) ASSERT_EQ(out.get(i), 0.0f);
  }
  const Rows out = talk.step();
  for (std::size_t i = 0; i < out.size() / 2; ++i) ASSERT_TRUE(std::isnan(out.get(i)));
  EXPECT_EQ(talk.cache->length(0, 0, nullptr), held);
  talk.expect_complete(0);
}

TEST_F(DeviceCacheTest, AForkGoesItsOwnWay) {
  Case setup;
  Talk talk(setup, 2000);
  talk.prefill(0, 1500);
  for (int t = 0; t < 5; ++t) talk.step();
  const std::int64_t before = talk.cache->memory().host_bytes;
  talk.cache->fork(1, 0, nullptr);
  EXPECT_LT(talk.cache->memory().host_bytes, 2 * before);  // full pages are shared
  talk.keys[1] = talk.keys[0];
  talk.values[1] = talk.values[0];
  for (int t = 0; t < 60; ++t) {
    const Rows out = talk.step();
    if (t % 20 != 0) continue;
    ASSERT_LT(talk.error(out, 0), 0.15);
    ASSERT_LT(talk.error(out, 1), 0.15);
  }
  talk.expect_complete(0);
  talk.expect_complete(1);
  talk.prefill(0, 1600);  // does not write what the fork shares
  talk.expect_complete(1);
  talk.cache->release(0, nullptr);
  talk.expect_complete(1);
  talk.cache->release(1, nullptr);
  EXPECT_EQ(talk.cache->memory().host_bytes, 0);
}

TEST_F(DeviceCacheTest, EqualZeroAndHugeKeys) {
  for (const float size : {0.0f, 1.0f, 1e15f}) {
    Case setup;
    setup.batch = 1;
    setup.kv_heads = 1;
    setup.budget = 128;
    Talk talk(setup, 3000);
    talk.prefill(0, 40);
    const int tokens = 2600;
    Rows k(talk.shape.dtype, static_cast<std::size_t>(tokens) * 64), v = k, q = k;
    talk.keys[0].assign(1, {});
    talk.values[0].assign(1, {});
    for (std::size_t i = 0; i < k.size(); ++i) {
      k.set(i, size);
      v.set(i, 1.0f);
      q.set(i, 0.5f);
      talk.keys[0][0].push_back(size);
      talk.values[0][0].push_back(1.0f);
    }
    Rows queries(talk.shape.dtype, static_cast<std::size_t>(4) * 100 * 64);
    for (std::size_t i = 0; i < queries.size(); ++i) queries.set(i, 0.01f);
    const OnDevice on_k(k), on_v(v), on_q(queries);
    talk.cache->prefill(0, 0, {on_k.data(), DType::kFloat32, 1, tokens, 64, tokens * 64, 64},
                        {on_v.data(), DType::kFloat32, 1, tokens, 64, tokens * 64, 64},
                        {on_q.data(), DType::kFloat32, 4, 100, 64, 6400, 64}, nullptr);
    talk.cache->wait(0);
    talk.queries = Rows(talk.shape.dtype, 4 * 64);
    for (std::size_t i = 0; i < talk.queries.size(); ++i) talk.queries.set(i, 0.01f);
    Rows new_k(talk.shape.dtype, 64), new_v = new_k;
    for (std::size_t i = 0; i < 64; ++i) {
      new_k.set(i, size);
      new_v.set(i, 1.0f);
    }
    const Rows out = talk.step(new_k, new_v);
    for (std::size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out.get(i), 1.0f, 1e-3) << size;
    talk.expect_complete(0);
  }
}

TEST_F(DeviceCacheTest, NaNReachesOnlyItsOwnSequence) {
  Case setup;
  Talk talk(setup, 2000);
  talk.prefill(0, 1200);
  talk.prefill(1, 1200);
  talk.step();
  Rows k(talk.shape.dtype, 2 * 2 * 64), v = k;
  for (std::size_t i = 0; i < k.size(); ++i) k.set(i, i < k.size() / 2 ? NAN : 0.1f);
  const Rows out = talk.step(k, v);
  EXPECT_TRUE(std::isnan(out.get(0)));
  EXPECT_LT(talk.error(out, 1), 0.15);
  EXPECT_LT(talk.error(talk.step(), 1), 0.15);
}

TEST_F(DeviceCacheTest, RefusesWithWhatIsSupported) {
  CacheShape shape{1, 4, 2, 80, DType::kBFloat16, 0.0f};
  Config config;
  const auto refusal = [&](int batch = 1, std::int64_t max_tokens = 1000, int device = 0) {
    try {
      DeviceCache cache(shape, config, batch, max_tokens, device);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal(), "device=cuda: head_dim must be 64, 96, 128 or 256, got 80");
  shape.head_dim = 64;
  EXPECT_EQ(refusal(0), "batch must be positive, got 0");
  EXPECT_NE(refusal(1, 8).find("max_tokens must be above"), std::string::npos);
  EXPECT_NE(refusal(1, 1000, 99).find("device must be from 0 to"), std::string::npos);
  config.index = "dci";
  EXPECT_EQ(refusal(), "device=cuda: index must be tree, got dci");
  config = {};
  config.token_budget = 700;
  EXPECT_NE(refusal().find("candidates must be at most 512"), std::string::npos);
}

TEST_F(DeviceCacheTest, RefusesTensorsThatDoNotFit) {
  Talk talk({}, 100);
  talk.prefill(0, 50);
  const Rows rows(DType::kFloat32, 2 * 200 * 64);
  const OnDevice on(rows);
  const TensorView fits{on.data(), DType::kFloat32, 2, 60, 64, 60 * 64, 64};
  TensorView queries{on.data(), DType::kFloat32, 8, 20, 64, 20 * 64, 64};
  TensorView wrong = fits;
  wrong.tokens = 61;
  EXPECT_THROW(talk.cache->prefill(0, 0, fits, wrong, queries, nullptr), InvalidArgument);
  wrong = fits;
  wrong.dtype = DType::kBFloat16;
  EXPECT_THROW(talk.cache->prefill(0, 0, wrong, fits, queries, nullptr), InvalidArgument);
  wrong = fits;
  wrong.token_stride = 66;
  EXPECT_THROW(talk.cache->prefill(0, 0, wrong, fits, queries, nullptr), InvalidArgument);
  wrong = fits;
  wrong.tokens = 150;
  EXPECT_THROW(talk.cache->prefill(0, 0, wrong, wrong, queries, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->prefill(1, 0, fits, fits, queries, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->prefill(0, 2, fits, fits, queries, nullptr), InvalidArgument);
  EXPECT_THROW(talk.cache->fork(0, 1, nullptr), InvalidArgument);
  talk.expect_complete(0);
}

#ifdef ICECACHE_EMULATE_CUDA
TEST_F(DeviceCacheTest, RunningOutOfDeviceMemoryLeavesOthersUsable) {
  Talk talk({}, 1500);
  talk.prefill(0, 1000);
  const std::size_t room = emulator::device_room;
  emulator::device_room = 1000;
  EXPECT_THROW(Talk({}, 1500), OutOfPages);
  emulator::device_room = 100000;
  EXPECT_THROW(talk.prefill(1, 1200), OutOfPages);
  emulator::device_room = room;
  EXPECT_LT(talk.error(talk.step(), 0), 0.15);
  talk.prefill(1, 1200);
  const Rows out = talk.step();
  EXPECT_LT(talk.error(out, 0), 0.15);
  EXPECT_LT(talk.error(out, 1), 0.15);
  talk.expect_complete(0);
}
#endif

}  // namespace
}  // namespace icecache

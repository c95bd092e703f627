// What tests of DeviceCache share: a conversation with a cache that remembers all that was said.
// On the emulator, and on a GPU where the build has CUDA and the machine a device.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/cuda_info.h"
#include "cuda/device.h"
#include "icecache/device_cache.h"
#include "icecache/error.h"

namespace icecache {

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
  std::int64_t device_pages = 0, device_tokens = 0;
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
    config.device_tokens = setup.device_tokens;
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

  // One token for every sequence, or for those with a row; returns the cache's outputs [B, Hq, D],
  // 0 for the others.
  Rows step(const std::vector<std::int32_t>& rows = {}) {
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
    return step(k, v, rows);
  }
  Rows step(const Rows& k, const Rows& v, const std::vector<std::int32_t>& rows = {}) {
    for (int b = 0; b < setup_.batch; ++b) {
      if (keys[b].empty() || static_cast<std::int64_t>(keys[b][0].size()) / d() >= room()) continue;
      if (!rows.empty() && rows[b] < 0) continue;
      for (int h = 0; h < setup_.kv_heads; ++h) {
        for (int i = 0; i < d(); ++i) {
          const std::size_t at = (static_cast<std::size_t>(b) * setup_.kv_heads + h) * d() + i;
          keys[b][h].push_back(k.get(at));
          values[b][h].push_back(v.get(at));
        }
      }
    }
    if (rows.empty()) {
      Rows result = queries;
      const OnDevice q(queries), new_k(k), new_v(v), out(result);
      cache->step(0, q.data(), new_k.data(), new_v.data(), out.data(), nullptr);
      out.read(result);
      return result;
    }
    const int count = 1 + *std::max_element(rows.begin(), rows.end());
    const int of_q = shape.num_q_heads * d(), of_k = setup_.kv_heads * d();
    Rows result(shape.dtype, static_cast<std::size_t>(count) * of_q);
    const OnDevice q(in_rows(queries, rows, count, of_q)), new_k(in_rows(k, rows, count, of_k));
    const OnDevice new_v(in_rows(v, rows, count, of_k)), out(result);
    const gpu::Buffer of_sequences(rows.size() * sizeof(std::int32_t), nullptr);
    gpu::copy_to_device(of_sequences.data(), rows.data(), of_sequences.bytes(), nullptr);
    cache->step(0, q.data(), new_k.data(), new_v.data(), out.data(), nullptr,
                of_sequences.as<std::int32_t>());
    out.read(result);
    Rows all(shape.dtype, queries.size());
    for (int b = 0; b < setup_.batch; ++b) {
      for (int i = 0; i < of_q && rows[b] >= 0; ++i) {
        all.set(static_cast<std::size_t>(b) * of_q + i,
                result.get(static_cast<std::size_t>(rows[b]) * of_q + i));
      }
    }
    return all;
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
  // Makes sequence b a copy of another.
  void fork(int b, int from) {
    cache->fork(b, from, nullptr);
    keys[b] = keys[from];
    values[b] = values[from];
  }
  // Takes back all but the first `kept` tokens of sequence b.
  void truncate(int b, std::int64_t kept) {
    cache->truncate(b, kept, nullptr);
    for (int h = 0; h < setup_.kv_heads; ++h) {
      keys[b][h].resize(kept * d());
      values[b][h].resize(kept * d());
    }
  }
  // That the cache holds every token of sequence b, in order of position.
  void expect_complete(int b) {
    const auto tokens = static_cast<std::size_t>(cache->length(0, b, nullptr));
    ASSERT_EQ(tokens * d(), keys[b][0].size());
    Rows k(shape.dtype, tokens * setup_.kv_heads * d()), v = k;
    const OnDevice on_k(k), on_v(v);
    cache->gather(0, b, on_k.data(), on_v.data(), nullptr);
    on_k.read(k);
    on_v.read(v);
    for (int h = 0; h < setup_.kv_heads; ++h) {
      for (std::size_t i = 0; i < tokens * d(); ++i) {
        ASSERT_EQ(k.get(h * tokens * d() + i), keys[b][h][i]) << "head " << h << ", " << i / d();
        ASSERT_EQ(v.get(h * tokens * d() + i), values[b][h][i]) << "head " << h << ", " << i / d();
      }
    }
  }

  static constexpr int kCentres = 24;
  CacheShape shape;
  std::unique_ptr<DeviceCache> cache;
  std::vector<std::vector<std::vector<float>>> keys, values;  // [B][Hkv][L * D]
  Rows prompt_queries{DType::kFloat32, 0};                    // of the last prompt
  Rows queries{DType::kFloat32, 0};                           // of the last step

 private:
  // Row rows[b] of `count` is row b of `of_sequences`.
  Rows in_rows(const Rows& of_sequences, const std::vector<std::int32_t>& rows, int count,
               int width) const {
    Rows result(shape.dtype, static_cast<std::size_t>(count) * width);
    for (std::size_t b = 0; b < rows.size(); ++b) {
      for (int i = 0; i < width && rows[b] >= 0; ++i) {
        result.set(static_cast<std::size_t>(rows[b]) * width + i, of_sequences.get(b * width + i));
      }
    }
    return result;
  }

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

// What one step brings for a batch.
struct Words {
  Rows keys, values, queries;
};

inline Words words(const CacheShape& shape, int batch, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto rows = [&](int heads) {
    Rows made(shape.dtype, static_cast<std::size_t>(batch) * heads * shape.head_dim);
    for (std::size_t i = 0; i < made.size(); ++i) made.set(i, normal(random));
    return made;
  };
  Rows keys = rows(shape.num_kv_heads), values = rows(shape.num_kv_heads);
  return {std::move(keys), std::move(values), rows(shape.num_q_heads)};
}

inline double rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kFloat16 ? 2e-3 : 1e-2;
}

inline bool same(const Rows& a, const Rows& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.data(), b.data(), a.bytes()) == 0;
}

// Of a test over head dims, types and groups.
inline std::string shape_name(const ::testing::TestParamInfo<std::tuple<int, DType, int>>& info) {
  return "d" + std::to_string(std::get<0>(info.param)) + name_of(std::get<1>(info.param)) + "g" +
         std::to_string(std::get<2>(info.param));
}

}  // namespace icecache

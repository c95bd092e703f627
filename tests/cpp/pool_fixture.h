// A small page pool and the context that tests give to what stores tokens in it.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "index/query_moments.h"
#include "index/selection.h"
#include "pages/head_context.h"
#include "pages/page_pool.h"
#include "simd/kernels.h"

namespace icecache::testing {

// Rows [n, D] of keys and values as floats, and as the cache stores them.
struct Tokens {
  std::vector<float> keys, values;
  std::vector<std::byte> raw_keys, raw_values;
  int dim = 0;
  DType dtype = DType::kFloat32;

  int count() const { return static_cast<int>(keys.size()) / dim; }
  // Tokens [begin, begin + n), the first at `position`.
  TokenBlock block(int begin, int n, int position) const {
    const std::size_t row = dim * size_of(dtype);
    return {raw_keys.data() + begin * row, raw_values.data() + begin * row, n, position};
  }
  // Encodes the floats, and makes the floats what the encoding holds.
  void encode() {
    raw_keys.resize(keys.size() * size_of(dtype));
    raw_values.resize(values.size() * size_of(dtype));
    const simd::Kernels& kernels = simd::kernels();
    kernels.from_float(keys.data(), raw_keys.data(), dtype, keys.size());
    kernels.from_float(values.data(), raw_values.data(), dtype, values.size());
    kernels.to_float(raw_keys.data(), dtype, keys.data(), keys.size());
    kernels.to_float(raw_values.data(), dtype, values.data(), values.size());
  }
};

// Keys around a few centres, as attention keys are; values of any direction.
inline Tokens clustered_tokens(int n, int dim, DType dtype, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> centres(8 * dim);
  for (float& x : centres) x = 1.5f * normal(random);
  Tokens tokens;
  tokens.dim = dim;
  tokens.dtype = dtype;
  for (int i = 0; i < n; ++i) {
    const int centre = static_cast<int>(random() % 8);
    for (int j = 0; j < dim; ++j) {
      tokens.keys.push_back(centres[centre * dim + j] + 0.4f * normal(random));
      tokens.values.push_back(normal(random));
    }
  }
  tokens.encode();
  return tokens;
}

class PoolFixture {
 public:
  PoolFixture(std::size_t pages, int page_size, int dim, int group = 1,
              DType dtype = DType::kFloat32) {
    config.page_size = page_size;
    PagePool::Options options;
    options.page_bytes = 2 * page_size * dim * size_of(dtype);
    options.capacity_bytes = pages * options.page_bytes;
    options.integrity = Integrity::kAlways;
    options.poison_freed = true;
    pool = std::make_unique<PagePool>(options);
    context.pool = pool.get();
    context.owner = {1, 2, 3};
    context.config = &config;
    context.head_dim = dim;
    context.group = group;
    context.dtype = dtype;
    context.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  }

  Config config;
  std::unique_ptr<PagePool> pool;
  HeadContext context;
};

}  // namespace icecache::testing

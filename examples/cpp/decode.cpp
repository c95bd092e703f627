// One layer's cache of a long sequence: a prompt of 20,000 tokens, then 50 decode steps within 256.
#include <cstdio>
#include <random>
#include <span>
#include <vector>

#include "icecache/engine.h"
#include "icecache/error.h"

namespace {

// Tensors [heads, tokens, dim] of random numbers, with the view that the engine takes.
struct Rows {
  Rows(int heads, int tokens, int dim, std::mt19937& random) : values(heads * tokens * dim) {
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(random);
    view = {values.data(), icecache::DType::kFloat32, heads, tokens, dim, tokens * dim, dim};
  }
  // As a batch of one sequence.
  std::span<const icecache::TensorView> batch() const { return {&view, 1}; }

  std::vector<float> values;
  icecache::TensorView view;
};

}  // namespace

int main() try {
  constexpr int kQueryHeads = 8, kHeads = 2, kDim = 64, kPrompt = 20000, kSteps = 50;
  icecache::CacheShape shape;
  shape.num_layers = 1;
  shape.num_q_heads = kQueryHeads;
  shape.num_kv_heads = kHeads;
  shape.head_dim = kDim;
  icecache::Config config;
  config.token_budget = 256;
  icecache::Engine engine(shape, config);

  std::mt19937 random(1);
  const icecache::SeqId sequence = engine.new_sequence();
  const std::vector<icecache::SeqId> sequences = {sequence};
  Rows keys(kHeads, kPrompt, kDim, random), values(kHeads, kPrompt, kDim, random);
  engine.append(sequences, 0, keys.batch(), values.batch());
  // The prompt's attention was computed elsewhere, say: its last queries shape the index.
  Rows last(kQueryHeads, 256, kDim, random);
  engine.observe(sequences, 0, last.batch());

  for (int step = 0; step < kSteps; ++step) {
    Rows key(kHeads, 1, kDim, random), value(kHeads, 1, kDim, random);
    Rows query(kQueryHeads, 1, kDim, random), output(kQueryHeads, 1, kDim, random);
    engine.step(sequences, 0, key.batch(), value.batch(), query.batch(), output.batch());
  }
  const icecache::HeadStats stats = engine.stats(0, 0);
  std::printf("%lld tokens, %lld steps, %.1f KiB read a step and head, %.1f MiB of pages\n",
              static_cast<long long>(engine.length(sequence, 0)),
              static_cast<long long>(stats.steps),
              static_cast<double>(stats.bytes_read) / static_cast<double>(stats.steps) / 1024.0,
              static_cast<double>(engine.pool_bytes()) / 1048576.0);
  engine.release(sequence);
  return 0;
} catch (const icecache::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}

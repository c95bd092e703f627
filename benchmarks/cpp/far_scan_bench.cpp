// The far field of one head: far_scan weighs 512 nodes (32k tokens in nodes of 64) for 4 query
// heads, attend_logits merges their values.
#include <benchmark/benchmark.h>

#include <cmath>
#include <memory>
#include <vector>

#include "icecache/attention_state.h"
#include "operands.h"
#include "registry.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench {
namespace {

constexpr int kGroup = 4;
constexpr std::int64_t kNodes = 512;

// Summaries of many heads: each [kNodes, D] of means, variances and values.
struct Heads {
  Heads(int head_dim, Home home)
      : floats(kNodes * head_dim),
        count(std::max<std::int64_t>(working_set(home) / (2 * floats * 4), 1)),
        means(count * floats * 4),
        variances(count * floats * 4),
        log_weights(normal(kNodes, 1.0f, 9)),
        dq(normal(kGroup * head_dim, 0.05f, 10)) {
    fill_normal(means.data(), count * floats * 4, DType::kFloat32, 11);
    fill_normal(variances.data(), count * floats * 4, DType::kFloat32, 12);
    for (std::int64_t i = 0; i < count * floats; ++i) {
      variances.as<float>()[i] = std::abs(variances.as<float>()[i]);
    }
  }
  std::int64_t floats;  // of one head's means
  std::int64_t count;
  Buffer means, variances;
  std::vector<float> log_weights, dq;
};

void far_scan(benchmark::State& state, int head_dim, const Heads& heads) {
  std::vector<float> out(kGroup * kNodes);
  Cycle cycle(heads.count);
  simd::FarScanArgs args;
  args.log_weight = heads.log_weights.data();
  args.dq = heads.dq.data();
  args.out = out.data();
  args.nodes = kNodes;
  args.group = kGroup;
  args.head_dim = head_dim;
  const auto kernel = simd::kernels().far_scan;
  for (auto _ : state) {
    const auto head = static_cast<std::int64_t>(cycle.next());
    args.mean = heads.means.as<float>() + head * heads.floats;
    args.variance = heads.variances.as<float>() + head * heads.floats;
    kernel(args);
    benchmark::ClobberMemory();
  }
  const auto floats = static_cast<double>(heads.floats);
  report(state, {2 * 4 * floats, 2.0 * kGroup * floats});
}

void attend_logits(benchmark::State& state, int head_dim, const Heads& heads) {
  const std::vector<float> logits = normal(kGroup * kNodes, 1.0f, 13);
  std::vector<float> out(kGroup * head_dim), max(kGroup), sum(kGroup);
  const AttentionState merged{out.data(), max.data(), sum.data(), kGroup, head_dim};
  merged.clear();
  Cycle cycle(heads.count);
  const auto kernel = simd::kernels().attend_logits;
  for (auto _ : state) {
    const auto head = static_cast<std::int64_t>(cycle.next());
    kernel(logits.data(), heads.means.as<float>() + head * heads.floats, kNodes, merged);
    benchmark::ClobberMemory();
  }
  const auto floats = static_cast<double>(heads.floats);
  report(state, {4 * floats, kGroup * floats});
}

const bool registered = [] {
  for (const int head_dim : {64, 128}) {
    for (const Home home : {Home::kMemory, Home::kCache}) {
      const std::string suffix = label(DType::kFloat32, head_dim, home);
      const auto make = [=] { return std::make_shared<Heads>(head_dim, home); };
      add("far_scan/" + suffix, make,
          [=](benchmark::State& state, Heads& heads) { far_scan(state, head_dim, heads); });
      add("attend_logits/" + suffix, make,
          [=](benchmark::State& state, Heads& heads) { attend_logits(state, head_dim, heads); });
    }
  }
  return true;
}();

}  // namespace
}  // namespace icecache::bench

// softmax_stats and add_exp over a row of scores, one a token. Rows are as long as a
// sequence and were written a moment before they are read, so they are in the cache.
#include <benchmark/benchmark.h>

#include <vector>

#include "operands.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench::softmax_bench {
namespace {

constexpr int kShort = 2048, kLong = 32768;

void softmax_stats(benchmark::State& state) {
  const auto n = state.range(0);
  const std::vector<float> row = normal(n, 3.0f, 6);
  const auto kernel = simd::kernels().softmax_stats;
  float max = 0.0f, sum = 0.0f;
  for (auto _ : state) {
    kernel(row.data(), n, &max, &sum);
    benchmark::DoNotOptimize(sum);
  }
  report(state, {4.0 * static_cast<double>(n)});
}
BENCHMARK(softmax_stats)->Arg(kShort)->Arg(kLong);

void add_exp(benchmark::State& state) {
  const auto n = state.range(0);
  const std::vector<float> row = normal(n, 3.0f, 6);
  std::vector<float> sums(n);
  const auto kernel = simd::kernels().add_exp;
  for (auto _ : state) {
    kernel(row.data(), 9.0f, sums.data(), n);
    benchmark::ClobberMemory();
  }
  report(state, {12.0 * static_cast<double>(n)});
}
BENCHMARK(add_exp)->Arg(kShort)->Arg(kLong);

}  // namespace
}  // namespace icecache::bench::softmax_bench

// matmul: coordinates of 4,096 keys in the query metric, [N, D] x [D, R]; and [D, D] x [D, D].
#include <benchmark/benchmark.h>

#include <vector>

#include "operands.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench::matmul_bench {
namespace {

void matmul(benchmark::State& state) {
  const auto n = state.range(0), k = state.range(1), m = state.range(2);
  const std::vector<float> a = normal(n * k, 1.0f, 7), b = normal(k * m, 1.0f, 8);
  std::vector<float> c(n * m);
  const auto kernel = simd::kernels().matmul;
  for (auto _ : state) {
    kernel(a.data(), b.data(), c.data(), n, k, m);
    benchmark::ClobberMemory();
  }
  report(state, {4.0 * static_cast<double>(n * k + k * m + n * m), static_cast<double>(n * k * m)});
}
BENCHMARK(matmul)
    ->ArgNames({"n", "k", "m"})
    ->Args({4096, 64, 32})
    ->Args({4096, 128, 32})
    ->Args({128, 128, 128})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace icecache::bench::matmul_bench

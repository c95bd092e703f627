// icecache_bench [--benchmark_filter=REGEX] [--benchmark_format=json]: the kernels and the index on
// one core. Counters: roof.h. ICECACHE_SIMD chooses the level, as everywhere.
#include <benchmark/benchmark.h>

#include <string>

#include "roof.h"
#include "simd/kernels.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  const auto giga = [](double rate) { return std::to_string(rate * 1e-9); };
  benchmark::AddCustomContext("simd", std::string(icecache::simd::kernels().name));
  benchmark::AddCustomContext("read_gbs", giga(icecache::bench::roof().read_bytes));
  benchmark::AddCustomContext("fma_gmacs", giga(icecache::bench::roof().macs));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

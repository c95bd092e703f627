// The roofs of one core that results are held against: how fast it reads memory, how fast it
// multiplies and adds. Measured once, at the first call, in the process that runs the benchmarks.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>

namespace icecache::bench {

struct Roof {
  double read_bytes = 0.0;  // bytes/s of a streaming read over kReadBytes, best of several
  double macs = 0.0;        // fp32 multiply-adds/s from registers, widest vectors of the CPU
};

constexpr std::int64_t kReadBytes = std::int64_t{256} << 20;

const Roof& roof();

// What one iteration does: memory it has to touch once (reads and writes, counted by hand from the
// shapes, not what the caches make of it), and multiply-adds; 0: not counted.
struct Work {
  double bytes = 0.0;
  double macs = 0.0;
};

// Counters of a finished benchmark: bytes_per_second and roof_share (of Roof::read_bytes; above 1
// where the caches serve the reads), GMAC/s and fma_share (of Roof::macs).
void report(benchmark::State& state, const Work& per_iteration);

}  // namespace icecache::bench

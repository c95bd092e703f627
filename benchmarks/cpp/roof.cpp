#include "roof.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "operands.h"

namespace icecache::bench {
namespace {

constexpr int kRepeats = 7;

double seconds_of(auto&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// 16 bytes: every x86-64 and ARM64 has them. Memory is slower than that by far.
using Lane = std::uint32_t __attribute__((vector_size(16)));

std::uint32_t read_all(const Lane* data, std::int64_t lanes) {
  constexpr int kStreams = 8;  // independent sums: loads, not adds, are what is waited for
  Lane sums[kStreams] = {};
  for (std::int64_t i = 0; i + kStreams <= lanes; i += kStreams) {
    for (int j = 0; j < kStreams; ++j) sums[j] ^= data[i + j];
  }
  for (int j = 1; j < kStreams; ++j) sums[0] ^= sums[j];
  return sums[0][0] ^ sums[0][1] ^ sums[0][2] ^ sums[0][3];
}

double measure_read() {
  const Buffer memory(kReadBytes);
  std::fill_n(memory.as<std::uint32_t>(), kReadBytes / 4, 1u);  // real pages, not the zero page
  const auto* lanes = memory.as<const Lane>();
  double best = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    best = std::min(
        best, seconds_of([&] {
          benchmark::DoNotOptimize(read_all(lanes, kReadBytes / static_cast<int>(sizeof(Lane))));
        }));
  }
  return kReadBytes / best;
}

// More chains of dependent multiply-adds than latency x ports of today's cores.
constexpr int kChains = 12;
constexpr std::int64_t kRounds = 1 << 21;

using Vec4 = float __attribute__((vector_size(16)));
using Vec8 = float __attribute__((vector_size(32)));
using Vec16 = float __attribute__((vector_size(64)));

template <typename Vec>
[[gnu::always_inline]] inline void multiply_add() {
  float scale = 0.999f, start = 0.001f;
  benchmark::DoNotOptimize(scale);
  benchmark::DoNotOptimize(start);
  const Vec factor = Vec{} + scale, term = Vec{} + start;
  Vec sums[kChains];
  for (int j = 0; j < kChains; ++j) sums[j] = term * static_cast<float>(j);
  for (std::int64_t i = 0; i < kRounds; ++i) {
    for (int j = 0; j < kChains; ++j) sums[j] = sums[j] * factor + term;
  }
  benchmark::DoNotOptimize(sums);
}

#if defined(__x86_64__)
[[gnu::target("avx512f")]] void multiply_add_avx512() {
  multiply_add<Vec16>();
}
[[gnu::target("avx2,fma")]] void multiply_add_avx2() {
  multiply_add<Vec8>();
}
#endif
void multiply_add_portable() {
  multiply_add<Vec4>();
}

double measure_macs() {
  void (*run)() = multiply_add_portable;
  int lanes = 4;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    run = multiply_add_avx512;
    lanes = 16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    run = multiply_add_avx2;
    lanes = 8;
  }
#endif
  double best = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    best = std::min(best, seconds_of(run));
  }
  return static_cast<double>(kRounds) * kChains * lanes / best;
}

}  // namespace

const Roof& roof() {
  static const Roof measured{measure_read(), measure_macs()};
  return measured;
}

void report(benchmark::State& state, const Work& per_iteration) {
  using benchmark::Counter;
  const auto rate = [&](double amount) {
    return Counter(amount, Counter::kIsIterationInvariantRate);
  };
  if (per_iteration.bytes > 0.0) {
    state.counters["bytes_per_second"] =
        Counter(per_iteration.bytes, Counter::kIsIterationInvariantRate, Counter::kIs1024);
    state.counters["roof_share"] = rate(per_iteration.bytes / roof().read_bytes);
  }
  if (per_iteration.macs > 0.0) {
    state.counters["GMAC/s"] = rate(per_iteration.macs * 1e-9);
    state.counters["fma_share"] = rate(per_iteration.macs / roof().macs);
  }
}

}  // namespace icecache::bench

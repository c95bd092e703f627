// to_float and all_finite over stored keys: 64 Ki elements a call.
#include <benchmark/benchmark.h>

#include <memory>
#include <string>
#include <vector>

#include "operands.h"
#include "registry.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench::conversion_bench {
namespace {

constexpr std::int64_t kElements = 65536;

// Blocks of kElements one after the other.
struct Blocks {
  Blocks(DType dtype, Home home)
      : block_bytes(kElements * static_cast<std::int64_t>(size_of(dtype))),
        count(std::max<std::int64_t>(working_set(home) / block_bytes, 1)),
        memory(count * block_bytes) {
    fill_normal(memory.data(), count * block_bytes, dtype, 5);
  }
  const std::byte* block(std::size_t i) const {
    return memory.data() + static_cast<std::int64_t>(i) * block_bytes;
  }
  std::int64_t block_bytes, count;
  Buffer memory;
};

void to_float(benchmark::State& state, DType dtype, const Blocks& blocks) {
  std::vector<float> out(kElements);
  Cycle cycle(blocks.count);
  const auto kernel = simd::kernels().to_float;
  for (auto _ : state) {
    kernel(blocks.block(cycle.next()), dtype, out.data(), kElements);
    benchmark::ClobberMemory();
  }
  // What is written stays in the cache.
  report(state, {static_cast<double>(blocks.block_bytes)});
}

void all_finite(benchmark::State& state, DType dtype, const Blocks& blocks) {
  Cycle cycle(blocks.count);
  const auto kernel = simd::kernels().all_finite;
  for (auto _ : state) {
    benchmark::DoNotOptimize(kernel(blocks.block(cycle.next()), dtype, kElements));
  }
  report(state, {static_cast<double>(blocks.block_bytes)});
}

const bool registered = [] {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const Home home : {Home::kMemory, Home::kCache}) {
      const std::string suffix = std::string(icecache::name_of(dtype)) + "/" + name_of(home);
      const auto make = [=] { return std::make_shared<Blocks>(dtype, home); };
      add("to_float/" + suffix, make,
          [=](benchmark::State& state, Blocks& blocks) { to_float(state, dtype, blocks); });
      add("all_finite/" + suffix, make,
          [=](benchmark::State& state, Blocks& blocks) { all_finite(state, dtype, blocks); });
    }
  }
  return true;
}();

}  // namespace
}  // namespace icecache::bench::conversion_bench

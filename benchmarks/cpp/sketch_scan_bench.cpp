// sketch_scan: 4 query heads against the sketches of 32k keys, 32 coordinates of 4 bits each.
#include <benchmark/benchmark.h>

#include <memory>
#include <vector>

#include "operands.h"
#include "registry.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench {
namespace {

constexpr int kGroup = 4, kRank = 32, kBits = 4, kPageSize = 16;
constexpr std::int64_t kTokens = 32768, kHeadBytes = kTokens * kRank * kBits / 8;

// Codes of many heads, kHeadBytes each; any bytes are codes.
struct Codes {
  explicit Codes(Home home)
      : count(std::max<std::int64_t>(working_set(home) / kHeadBytes, 1)),
        memory(count * kHeadBytes) {
    fill_normal(memory.data(), count * kHeadBytes, DType::kFloat32, 14);
  }
  std::int64_t count;
  Buffer memory;
};

void sketch_scan(benchmark::State& state, const Codes& codes) {
  const std::vector<float> queries = normal(kGroup * kRank, 0.1f, 15), bias(kGroup);
  std::vector<float> scores(kGroup * kTokens);
  Cycle cycle(codes.count);
  simd::SketchScanArgs args;
  args.queries = queries.data();
  args.bias = bias.data();
  args.scores = scores.data();
  args.score_stride = kTokens;
  args.pages = kTokens / kPageSize;
  args.group = kGroup;
  args.rank = kRank;
  args.page_size = kPageSize;
  args.bits = kBits;
  const auto kernel = simd::kernels().sketch_scan;
  for (auto _ : state) {
    args.codes =
        codes.memory.as<std::uint8_t>() + static_cast<std::int64_t>(cycle.next()) * kHeadBytes;
    kernel(args);
    benchmark::ClobberMemory();
  }
  report(state, {static_cast<double>(kHeadBytes), 1.0 * kGroup * kRank * kTokens});
}

const bool registered = [] {
  for (const Home home : {Home::kMemory, Home::kCache}) {
    add(
        std::string("sketch_scan/") + name_of(home), [=] { return std::make_shared<Codes>(home); },
        sketch_scan)
        ->Unit(benchmark::kMicrosecond);
  }
  return true;
}();

}  // namespace
}  // namespace icecache::bench

// sketch_scan: 4 query heads against the sketches of 32k keys, 32 coordinates of 4 bits each, with
// the weights of all pages; score_rank: what orders its scores.
#include <benchmark/benchmark.h>

#include <memory>
#include <vector>

#include "operands.h"
#include "registry.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench::sketch_scan_bench {
namespace {

constexpr int kGroup = 4, kRank = 32, kBits = 4, kPageSize = 16;
constexpr std::int64_t kTokens = 32768, kPages = kTokens / kPageSize;
constexpr std::int64_t kHeadBytes = kTokens * kRank * kBits / 8;

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

// The arguments of a scan of one head, and the buffers behind them.
struct Scan {
  Scan() {
    args.masks = masks.data();
    args.queries = queries.data();
    args.base = base;
    args.scores = scores.data();
    args.max = max;
    args.mass = mass.data();
    args.score_stride = kTokens;
    args.pages = kPages;
    args.group = kGroup;
    args.rank = kRank;
    args.page_size = kPageSize;
    args.bits = kBits;
    args.shift = 4;
    for (std::size_t i = 0; i < queries.size(); ++i) {
      queries[i] = static_cast<std::int8_t>(37 * i % 255 - 127);
    }
  }
  std::vector<std::uint32_t> masks = std::vector<std::uint32_t>(kPages, (1u << kPageSize) - 1);
  std::vector<std::int8_t> queries = std::vector<std::int8_t>(kGroup * kRank);
  std::vector<std::int16_t> scores = std::vector<std::int16_t>(kGroup * kTokens);
  std::vector<float> mass = std::vector<float>(kPages * simd::mass_stride(kGroup));
  // No sum is below its negative.
  const std::int32_t base[kGroup] = {32 * 15 * 127, 32 * 15 * 127, 32 * 15 * 127, 32 * 15 * 127};
  std::int16_t max[kGroup] = {};
  simd::SketchScanArgs args;
};

void sketch_scan(benchmark::State& state, const Codes& codes) {
  Scan scan;
  Cycle cycle(codes.count);
  for (auto _ : state) {
    scan.args.codes =
        codes.memory.as<std::uint8_t>() + static_cast<std::int64_t>(cycle.next()) * kHeadBytes;
    simd::kernels().sketch_scan(scan.args);
    benchmark::ClobberMemory();
  }
  report(state, {static_cast<double>(kHeadBytes), 1.0 * kGroup * kRank * kTokens});
}

// The scores of one head as a scan leaves them.
void score_rank(benchmark::State& state, const Codes& codes) {
  Scan scan;
  scan.args.codes = codes.memory.as<std::uint8_t>();
  simd::kernels().sketch_scan(scan.args);
  std::vector<std::int16_t> rank(kTokens), block_max(kTokens / simd::kRankBlock * simd::kRankLanes);
  const std::int16_t offset[kGroup] = {100, -100, 50, 0};
  for (auto _ : state) {
    simd::kernels().score_rank(
        {scan.scores.data(), offset, rank.data(), block_max.data(), kTokens, kTokens, kGroup});
    benchmark::ClobberMemory();
  }
  report(state, {2.0 * kGroup * kTokens, 0.0});
}

const bool registered = [] {
  for (const Home home : {Home::kMemory, Home::kCache}) {
    add(
        std::string("sketch_scan/") + name_of(home), [=] { return std::make_shared<Codes>(home); },
        sketch_scan)
        ->Unit(benchmark::kMicrosecond);
  }
  add(
      "score_rank/cache", [] { return std::make_shared<Codes>(Home::kCache); }, score_rank)
      ->Unit(benchmark::kMicrosecond);
  return true;
}();

}  // namespace
}  // namespace icecache::bench::sketch_scan_bench

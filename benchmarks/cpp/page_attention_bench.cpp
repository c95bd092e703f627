// attend_page: a GQA group of 4 queries against pages of 16 tokens, whole or a few
// slots of each, one page a call, pages in random order of address.
#include <benchmark/benchmark.h>

#include <bit>
#include <memory>
#include <random>
#include <string>

#include "icecache/attention_state.h"
#include "operands.h"
#include "registry.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench {
namespace {

constexpr int kGroup = 4;

struct Case {
  DType dtype;
  int head_dim;
  Home home;
  int slots;  // of each page that take part
};

std::uint32_t random_slots(int count, std::mt19937& random) {
  std::uint32_t mask = 0;
  while (std::popcount(mask) < count) mask |= 1u << random() % Pages::kPageSize;
  return mask;
}

class PageRounds {
 public:
  explicit PageRounds(const Case& c)
      : pages_(working_set(c.home), c.dtype, c.head_dim),
        queries_(normal(kGroup * c.head_dim, 0.09f, 3)),
        cycle_(pages_.count()) {
    args_.queries = queries_.data();
    args_.dtype = c.dtype;
    args_.rows = kGroup;
    args_.head_dim = c.head_dim;
    args_.page_size = Pages::kPageSize;
    std::mt19937 random(4);
    for (std::uint32_t& mask : masks_) mask = random_slots(c.slots, random);
  }

  const simd::PageArgs& next() {
    const std::size_t page = cycle_.next();
    args_.keys = pages_.keys(page);
    args_.values = pages_.values(page);
    args_.slots = masks_[page % std::size(masks_)];
    return args_;
  }

 private:
  Pages pages_;
  std::vector<float> queries_;
  Cycle cycle_;
  std::uint32_t masks_[61] = {};
  simd::PageArgs args_;
};

// Bytes of one row of keys (or values) of every slot that takes part.
double row_bytes(const Case& c) {
  return static_cast<double>(c.slots) * c.head_dim * static_cast<double>(size_of(c.dtype));
}

void attend_page(benchmark::State& state, const Case& c, PageRounds& rounds) {
  std::vector<float> out(kGroup * c.head_dim), max(kGroup), sum(kGroup);
  const AttentionState merged{out.data(), max.data(), sum.data(), kGroup, c.head_dim};
  merged.clear();
  const auto kernel = simd::kernels().attend_page;
  for (auto _ : state) {
    kernel(rounds.next(), merged);
    benchmark::ClobberMemory();
  }
  report(state, {2 * row_bytes(c), 2.0 * c.slots * kGroup * c.head_dim});
}

void add_case(const Case& c) {
  add(
      "attend_page/" + label(c.dtype, c.head_dim, c.home) + "/slots:" + std::to_string(c.slots),
      [c] { return std::make_shared<PageRounds>(c); },
      [c](benchmark::State& state, PageRounds& rounds) { attend_page(state, c, rounds); });
}

const bool registered = [] {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int head_dim : {64, 128}) {
      for (const Home home : {Home::kMemory, Home::kCache}) {
        for (const int slots : {Pages::kPageSize, 2}) {
          add_case({dtype, head_dim, home, slots});
        }
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace icecache::bench

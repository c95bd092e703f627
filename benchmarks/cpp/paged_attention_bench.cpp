// attend_pages, of a decode step's picks and of a prompt's last tokens: pages of 16 tokens, 4 query
// heads a KV head.
#include <benchmark/benchmark.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/paged_attention.h"
#include "operands.h"
#include "registry.h"
#include "roof.h"

namespace icecache::bench::paged_attention_bench {
namespace {

constexpr int kGroup = 4;
constexpr int kPicked = 64;  // pages of one call of attend_pages

struct Shape {
  DType dtype;
  int head_dim;
  PageLayout layout() const { return {head_dim, Pages::kPageSize, dtype}; }
};

// States of `rows` queries [rows, D], and the queries.
struct Rows {
  Rows(int rows, int head_dim)
      : queries(normal(static_cast<std::size_t>(rows) * head_dim, 0.09f, 3)),
        out(queries.size()),
        max(rows),
        sum(rows),
        state{out.data(), max.data(), sum.data(), rows, head_dim} {
    state.clear();
  }
  std::vector<float> queries, out, max, sum;
  AttentionState state;
};

void attend_pages_of_step(benchmark::State& state, const Shape& shape, const Pages& pages) {
  Rows rows(kGroup, shape.head_dim);
  Cycle cycle(pages.count() / kPicked);
  std::vector<PageSlots> picked(kPicked);
  for (auto _ : state) {
    const std::size_t first = cycle.next() * kPicked;
    for (int i = 0; i < kPicked; ++i) picked[i] = {pages.keys(first + i), 0xffffu};
    attend_pages(picked, {rows.queries.data(), 1, kGroup}, shape.layout(), rows.state);
    benchmark::ClobberMemory();
  }
  const double tokens = kPicked * Pages::kPageSize;
  report(state, {static_cast<double>(kPicked * pages.page_bytes()),
                 2.0 * tokens * kGroup * shape.head_dim});
}

// The last `kTile` tokens of a prompt of `kPrompt` tokens.
constexpr int kTile = 128, kPrompt = 4096;

void attend_prefill_tile(benchmark::State& state, const Shape& shape, const Pages& pages) {
  Rows rows(kTile * kGroup, shape.head_dim);
  std::vector<PageSlots> prompt;
  for (int i = 0; i < kPrompt / Pages::kPageSize; ++i) prompt.push_back({pages.keys(i), 0xffffu});
  const QueryBlock block{rows.queries.data(), kTile, kGroup, kPrompt - kTile + 1};
  for (auto _ : state) {
    attend_pages(prompt, block, shape.layout(), rows.state);
    benchmark::ClobberMemory();
  }
  const double pairs = kTile * (kPrompt - 0.5 * (kTile - 1));  // query and token that meet
  report(state, {0.0, 2.0 * pairs * kGroup * shape.head_dim});
}

const bool registered = [] {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int head_dim : {64, 128}) {
      const Shape shape{dtype, head_dim};
      for (const Home home : {Home::kMemory, Home::kCache}) {
        // Half of a second-level cache may hold fewer pages than one call takes.
        const std::int64_t one_call =
            2 * kPicked * Pages::kPageSize * head_dim * static_cast<std::int64_t>(size_of(dtype));
        const std::int64_t bytes = std::max(working_set(home), one_call);
        add(
            "attend_pages/" + label(dtype, head_dim, home),
            [=] { return std::make_shared<Pages>(bytes, dtype, head_dim); },
            [=](benchmark::State& state, Pages& pages) {
              attend_pages_of_step(state, shape, pages);
            });
      }
      const std::int64_t prompt_bytes =
          2 * kPrompt * head_dim * static_cast<std::int64_t>(size_of(dtype));
      add(
          "attend_pages/prompt/" + std::string(icecache::name_of(dtype)) +
              "/D:" + std::to_string(head_dim),
          [=] { return std::make_shared<Pages>(prompt_bytes, dtype, head_dim); },
          [=](benchmark::State& state, Pages& pages) { attend_prefill_tile(state, shape, pages); })
          ->Unit(benchmark::kMillisecond);
    }
  }
  return true;
}();

}  // namespace
}  // namespace icecache::bench::paged_attention_bench

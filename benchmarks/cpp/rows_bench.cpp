// row_logits and add_rows: 4 query heads against the rows of a step: 320 candidates' keys, 220
// picked values, 512 far-field nodes (32k tokens in nodes of 64), which lie side by side.
#include <benchmark/benchmark.h>

#include <memory>
#include <string>
#include <vector>

#include "operands.h"
#include "registry.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench::rows_bench {
namespace {

constexpr int kGroup = 4;

struct Case {
  DType dtype;
  int head_dim;
  Home home;
  int rows;  // of one call
  bool scattered;
};

// The rows of many calls: one of every third page where scattered.
class Rounds {
 public:
  explicit Rounds(const Case& c)
      : case_(c),
        pages_(working_set(c.home), c.dtype, c.head_dim),
        queries_(normal(kGroup * c.head_dim, 0.09f, 3)),
        weights_(normal(kGroup * c.rows, 0.1f, 4)),
        out_(kGroup * c.head_dim),
        logits_(kGroup * c.rows),
        rows_(c.rows) {}

  simd::RowsArgs next() {
    const std::size_t row = case_.head_dim * size_of(case_.dtype);
    for (const void*& address : rows_) {
      if (case_.scattered) {
        address = pages_.keys(at_) + at_ % Pages::kPageSize * row;
        at_ = (at_ + 3) % pages_.count();
      } else {
        address = pages_.keys(at_ / (2 * Pages::kPageSize)) + at_ % (2 * Pages::kPageSize) * row;
        at_ = (at_ + 1) % (pages_.count() * 2 * Pages::kPageSize);
      }
    }
    return {rows_.data(), case_.dtype, case_.rows, kGroup, case_.head_dim};
  }
  float* logits() { return logits_.data(); }
  float* out() { return out_.data(); }
  const float* queries() const { return queries_.data(); }
  const float* weights() const { return weights_.data(); }

 private:
  Case case_;
  Pages pages_;
  std::vector<float> queries_, weights_, out_, logits_;
  std::vector<const void*> rows_;
  std::size_t at_ = 0;
};

void report_rows(benchmark::State& state, const Case& c) {
  const double elements = static_cast<double>(c.rows) * c.head_dim;
  report(state, {elements * static_cast<double>(size_of(c.dtype)), kGroup * elements});
}

void row_logits(benchmark::State& state, const Case& c, Rounds& rounds) {
  for (auto _ : state) {
    simd::kernels().row_logits(rounds.next(), rounds.queries(), rounds.logits(), c.rows);
    benchmark::ClobberMemory();
  }
  report_rows(state, c);
}

void add_rows(benchmark::State& state, const Case& c, Rounds& rounds) {
  for (auto _ : state) {
    simd::kernels().add_rows(rounds.next(), rounds.weights(), c.rows, rounds.out());
    benchmark::ClobberMemory();
  }
  report_rows(state, c);
}

void add_case(const std::string& name, const Case& c,
              void (*run)(benchmark::State&, const Case&, Rounds&)) {
  add(
      name + "/" + label(c.dtype, c.head_dim, c.home) + "/rows:" + std::to_string(c.rows),
      [c] { return std::make_shared<Rounds>(c); },
      [c, run](benchmark::State& state, Rounds& rounds) { run(state, c, rounds); })
      ->Unit(benchmark::kMicrosecond);
}

const bool registered = [] {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int head_dim : {64, 128}) {
      for (const Home home : {Home::kMemory, Home::kCache}) {
        add_case("row_logits_candidates", {dtype, head_dim, home, 320, true}, row_logits);
        add_case("add_rows_picked", {dtype, head_dim, home, 220, true}, add_rows);
        add_case("add_rows_far", {dtype, head_dim, home, 512, false}, add_rows);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace icecache::bench::rows_bench

// Registers benchmarks together with their operands.
#pragma once

#include <benchmark/benchmark.h>

#include <memory>
#include <string>
#include <type_traits>

namespace icecache::bench {

// The operands of the benchmark that ran last. google-benchmark calls a function several times
// until it knows the number of iterations: they are made at the first call, and dropped when
// another benchmark makes its own, so that one working set at a time is in memory.
struct Current {
  std::shared_ptr<void> operands;
  const void* owner = nullptr;
};
inline Current current;

// Registers `run(state, operands)` as `name`; `make()` returns a std::shared_ptr to the operands.
template <typename Make, typename Run>
benchmark::internal::Benchmark* add(const std::string& name, Make make, Run run) {
  auto owner = std::make_shared<int>();  // its address is the key
  return benchmark::RegisterBenchmark(name.c_str(), [owner, make, run](benchmark::State& state) {
    using Operands = typename std::invoke_result_t<Make>::element_type;
    if (current.owner != owner.get()) {
      current = {};
      current = {make(), owner.get()};
    }
    run(state, *static_cast<Operands*>(current.operands.get()));
  });
}

}  // namespace icecache::bench

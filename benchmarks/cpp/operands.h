// What kernels are run on: large aligned memory, random numbers, pages in a pool, and the two sizes
// of working set that every memory-bound kernel is measured at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "icecache/types.h"
#include "pages/page_pool.h"

namespace icecache::bench {

// Aligned memory, in huge pages where the system grants them, as the PagePool has it.
class Buffer {
 public:
  explicit Buffer(std::int64_t bytes);
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }
  std::byte* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Free> memory_;
};

// Where a kernel's operands lie when it is called: kMemory: further back than any cache reaches;
// kCache: in the core's own second-level cache.
enum class Home : std::uint8_t { kMemory, kCache };
const char* name_of(Home home);
// Bytes of the working set that is walked through: several times the last-level cache (at least
// 256 MiB, at most 1 GiB), or half of the second-level cache.
std::int64_t working_set(Home home);

// "bfloat16 D=128 ... memory": what google-benchmark appends to the name of the benchmark.
std::string label(DType dtype, int head_dim, Home home);

std::vector<float> normal(std::size_t n, float deviation, unsigned seed);
// Fills `bytes` bytes with random finite numbers of `dtype`.
void fill_normal(std::byte* out, std::int64_t bytes, DType dtype, unsigned seed);

// Pages [2][S][D] full of random numbers, in random order of address.
class Pages {
 public:
  Pages(std::int64_t bytes, DType dtype, int head_dim);
  std::size_t count() const { return order_.size(); }
  const std::byte* keys(std::size_t page) const { return order_[page]; }
  const std::byte* values(std::size_t page) const { return order_[page] + page_bytes_ / 2; }
  std::int64_t page_bytes() const { return page_bytes_; }
  static constexpr int kPageSize = 16;

 private:
  std::int64_t page_bytes_;
  std::unique_ptr<PagePool> pool_;
  std::vector<const std::byte*> order_;
};

// 0, 1, ..., n - 1, 0, 1, ...: the operand of the next iteration.
class Cycle {
 public:
  explicit Cycle(std::size_t n) : n_(n) {}
  std::size_t next() {
    const std::size_t now = at_;
    at_ = now + 1 == n_ ? 0 : now + 1;
    return now;
  }

 private:
  std::size_t n_, at_ = 0;
};

}  // namespace icecache::bench

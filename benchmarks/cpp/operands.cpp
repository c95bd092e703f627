#include "operands.h"

#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>

#include "simd/kernels.h"

namespace icecache::bench {
namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

// Largest cache of a level, 0 where the system does not tell.
std::int64_t cache_bytes(int level) {
  std::int64_t largest = 0;
  for (const auto& cache : benchmark::CPUInfo::Get().caches) {
    if (cache.level == level && cache.type != "Instruction") {
      largest = std::max<std::int64_t>(largest, cache.size);
    }
  }
  return largest;
}

}  // namespace

Buffer::Buffer(std::int64_t bytes) {
  constexpr std::size_t kAlignment = 2 * kMiB;
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded)));
  if (memory_ == nullptr) throw std::bad_alloc();
  madvise(memory_.get(), rounded, MADV_HUGEPAGE);
}

void Buffer::Free::operator()(std::byte* memory) const {
  std::free(memory);
}

const char* name_of(Home home) {
  return home == Home::kMemory ? "memory" : "cache";
}

std::int64_t working_set(Home home) {
  if (home == Home::kMemory) {
    const std::int64_t last = std::max(cache_bytes(3), cache_bytes(2));
    return std::clamp(4 * last, 256 * kMiB, 1024 * kMiB);
  }
  const std::int64_t second = cache_bytes(2);
  return second > 0 ? second / 2 : 256 << 10;
}

std::string label(DType dtype, int head_dim, Home home) {
  return std::string(icecache::name_of(dtype)) + "/D:" + std::to_string(head_dim) + "/" +
         name_of(home);
}

std::vector<float> normal(std::size_t n, float deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0.0f, deviation);
  std::vector<float> values(n);
  for (float& value : values) value = distribution(random);
  return values;
}

void fill_normal(std::byte* out, std::int64_t bytes, DType dtype, unsigned seed) {
  // A block of odd length, repeated: drawing gigabytes would take longer than the benchmarks.
  const std::vector<float> drawn = normal(65521, 1.0f, seed);
  std::vector<std::byte> block(drawn.size() * size_of(dtype));
  simd::kernels().from_float(drawn.data(), block.data(), dtype, drawn.size());
  for (std::int64_t at = 0; at < bytes; at += static_cast<std::int64_t>(block.size())) {
    const auto left = static_cast<std::size_t>(bytes - at);
    std::memcpy(out + at, block.data(), std::min(left, block.size()));
  }
}

Pages::Pages(std::int64_t bytes, DType dtype, int head_dim)
    : page_bytes_(2 * kPageSize * head_dim * static_cast<std::int64_t>(size_of(dtype))) {
  const auto count = static_cast<std::size_t>(std::max<std::int64_t>(bytes / page_bytes_, 1));
  PagePool::Options options;
  options.page_bytes = static_cast<std::size_t>(page_bytes_);
  options.capacity_bytes = count * options.page_bytes;
  pool_ = std::make_unique<PagePool>(options);
  std::vector<PageId> ids;
  pool_->allocate(count, {0, 0, 0}, ids);
  std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
  std::vector<std::byte> content(options.page_bytes * 7);
  fill_normal(content.data(), static_cast<std::int64_t>(content.size()), dtype, 2);
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(pool_->data(ids[i]), content.data() + i % 7 * options.page_bytes,
                options.page_bytes);
    order_.push_back(pool_->data(ids[i]));
  }
}

}  // namespace icecache::bench

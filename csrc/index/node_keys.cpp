#include "index/node_keys.h"

#include <bit>

#include "simd/kernels.h"

namespace icecache {

NodeKeys::NodeKeys(const PageTable& table, const Sketch& sketch, int rank,
                   std::span<const std::vector<int>> pages_of_nodes)
    : head_dim_(table.head_dim()),
      dims_(dims(rank)),
      means_(pages_of_nodes.size() * head_dim_, 0.0f),
      sums_(pages_of_nodes.size() * 2 * dims_, 0.0f) {
  float key[kMaxHeadDim];
  std::uint8_t codes[kMaxSketchRank];
  float *mean = means_.data(), *sum = sums_.data();
  for (const std::vector<int>& pages : pages_of_nodes) {
    std::int32_t count = 0;
    for (const int page : pages) count += table.count(page);
    for (const int page : pages) {
      for (std::uint32_t slots = table.mask(page); slots != 0; slots &= slots - 1) {
        const int slot = std::countr_zero(slots);
        table.key(page, slot, key);
        // Shares are small: no sum of finite keys leaves the range of float.
        simd::kernels().axpy(1.0f / static_cast<float>(count), key, mean, head_dim_);
        sketch.read(page, slot, dims_, codes);
        for (int j = 0; j < dims_; ++j) {
          const auto code = static_cast<float>(codes[j]);
          sum[j] += code;
          sum[dims_ + j] += code * code;
        }
      }
    }
    mean += head_dim_;
    sum += 2 * dims_;
  }
}

}  // namespace icecache

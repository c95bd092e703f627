#include "index/node_keys.h"

#include <algorithm>
#include <bit>

#include "simd/kernels.h"

namespace icecache {

NodeKeys::NodeKeys(const PageTable& table, const Sketch& sketch, int rank,
                   std::span<const std::vector<int>> pages_of_nodes)
    : dims_(dims(rank)),
      means_(pages_of_nodes.size() * table.head_dim()),
      spreads_(pages_of_nodes.size() * dims_),
      sums_(pages_of_nodes.size() * 2 * dims_, 0.0f) {
  const int d = table.head_dim(), nodes = static_cast<int>(pages_of_nodes.size());
  float key[kMaxHeadDim], mean[kMaxHeadDim];
  std::uint8_t codes[kMaxSketchRank];
  float* sum = sums_.data();
  for (int node = 0; node < nodes; ++node, sum += 2 * dims_) {
    std::int32_t count = 0;
    for (const int page : pages_of_nodes[node]) count += table.count(page);
    std::fill_n(mean, d, 0.0f);
    for (const int page : pages_of_nodes[node]) {
      for (std::uint32_t slots = table.mask(page); slots != 0; slots &= slots - 1) {
        const int slot = std::countr_zero(slots);
        table.key(page, slot, key);
        // Shares are small: no sum of finite keys leaves the range of float.
        simd::kernels().axpy(1.0f / static_cast<float>(count), key, mean, d);
        sketch.read(page, slot, dims_, codes);
        for (int j = 0; j < dims_; ++j) {
          const auto code = static_cast<float>(codes[j]);
          sum[j] += code;
          sum[dims_ + j] += code * code;
        }
      }
    }
    for (int i = 0; i < d; ++i) means_[i * nodes + node] = mean[i];
    for (int j = 0; j < dims_; ++j) {
      spreads_[j * nodes + node] =
          spread(sum[j], sum[dims_ + j], static_cast<float>(std::max(count, 1)));
    }
  }
}

}  // namespace icecache

#include <algorithm>

#ifndef ICECACHE_EMULATE_CUDA
#include <cub/device/device_radix_sort.cuh>
#endif

#include "cuda/build_kernels.h"
#include "cuda/launch.h"

namespace icecache::gpu {
std::vector<std::vector<std::int32_t>> bisection_levels(int n, int node_tokens) {
  std::vector<std::vector<std::int32_t>> levels;
  std::vector<std::int32_t> bounds = {0, n};
  while (true) {
    std::vector<std::int32_t> next = {0};
    for (std::size_t i = 0; i + 1 < bounds.size(); ++i) {
      const int nodes = (bounds[i + 1] - bounds[i] + node_tokens - 1) / node_tokens;
      if (nodes > 1) next.push_back(bounds[i] + nodes / 2 * node_tokens);
      next.push_back(bounds[i + 1]);
    }
    if (next.size() == bounds.size()) return levels;
    levels.push_back(std::move(bounds));
    bounds = std::move(next);
  }
}

void launch_sample(const BuildParams& p, Stream stream) {
  const auto heads = static_cast<unsigned>(p.shape.kv_heads);
  const std::int64_t items =
      static_cast<std::int64_t>(p.key_samples + p.query_samples) * p.shape.head_dim;
  with_type(p.shape.dtype, [&](auto type) {
    launch("sample", sample_kernel<decltype(type)>, dim3(blocks_for(items, kBuildBlock), heads),
           kBuildBlock, stream, p);
  });
}

void launch_coordinates(const BuildParams& p, Stream stream) {
  const auto heads = static_cast<unsigned>(p.shape.kv_heads);
  const int tokens = p.length - p.first;
  with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 blocks(blocks_for(tokens, 64), heads);
    launch("coordinates of keys", coordinates_kernel<T, false>, blocks, kBuildBlock, stream, p);
    if (p.shape.tail) {
      launch("coordinates of values", coordinates_kernel<T, true>, blocks, kBuildBlock, stream, p);
    }
  });
  launch("range start", range_start_kernel, dim3(1), kBuildBlock, stream, p);
  launch("range", range_kernel, dim3(blocks_for(tokens, 16 * kBuildBlock / p.shape.rank), heads),
         kBuildBlock, stream, p);
  launch("levels", levels_kernel, dim3(heads), kBuildBlock, stream, p);
}

void launch_order_start(const BuildParams& p, Stream stream) {
  launch("order", order_kernel,
         dim3(blocks_for(p.indexed, kBuildBlock), static_cast<unsigned>(p.shape.kv_heads)),
         kBuildBlock, stream, p);
}

void launch_level(const BuildParams& p, Stream stream) {
  const auto heads = static_cast<unsigned>(p.shape.kv_heads);
  const dim3 parts(static_cast<unsigned>(p.segment_count), heads);
  if (p.indexed / p.segment_count >= kDirectionRows) {
    launch("direction", direction_kernel<kWideBlock>, parts, kWideBlock, stream, p);
  } else {
    launch("direction", direction_kernel<kBuildBlock>, parts, kBuildBlock, stream, p);
  }
  launch("projection", projection_kernel, dim3(blocks_for(p.indexed, kBuildBlock), heads),
         kBuildBlock, stream, p);
}

void launch_lay_out(const BuildParams& p, Stream stream) {
  const auto heads = static_cast<unsigned>(p.shape.kv_heads);
  const int nodes = (p.indexed + p.shape.far_node_tokens - 1) / p.shape.far_node_tokens;
  with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    if (nodes > 0) {
      launch("lay_out", lay_out_kernel<T>, dim3(static_cast<unsigned>(nodes), heads), kBuildBlock,
             stream, p);
    }
    launch("near", near_kernel<T>, dim3(heads), kBuildBlock, stream, p);
  });
}

#ifdef ICECACHE_EMULATE_CUDA
std::size_t sort_room(std::int64_t) {
  return 1;
}

void sort_pairs(void*, std::size_t, const unsigned long long* keys, unsigned long long* keys_out,
                const std::int32_t* values, std::int32_t* values_out, std::int64_t n, int, Stream) {
  std::vector<std::int32_t> ranking(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) ranking[i] = static_cast<std::int32_t>(i);
  std::stable_sort(ranking.begin(), ranking.end(),
                   [&](std::int32_t a, std::int32_t b) { return keys[a] < keys[b]; });
  for (std::int64_t i = 0; i < n; ++i) {
    keys_out[i] = keys[ranking[i]];
    values_out[i] = values[ranking[i]];
  }
}
#else
std::size_t sort_room(std::int64_t n) {
  std::size_t bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<unsigned long long*>(nullptr),
                                        static_cast<unsigned long long*>(nullptr),
                                        static_cast<std::int32_t*>(nullptr),
                                        static_cast<std::int32_t*>(nullptr), n),
        "DeviceRadixSort::SortPairs");
  return bytes;
}

void sort_pairs(void* room, std::size_t room_bytes, const unsigned long long* keys,
                unsigned long long* keys_out, const std::int32_t* values, std::int32_t* values_out,
                std::int64_t n, int key_bits, Stream stream) {
  check(cub::DeviceRadixSort::SortPairs(room, room_bytes, keys, keys_out, values, values_out, n, 0,
                                        key_bits, static_cast<cudaStream_t>(stream)),
        "DeviceRadixSort::SortPairs");
}
#endif

}  // namespace icecache::gpu

// Where a layer keeps what it has of an index token. Device code.
#pragma once

#include "cuda/gpu.h"
#include "cuda/step.h"

namespace icecache::gpu {

// A pair's part of a chunk that its sequence holds.
__device__ __forceinline__ std::byte* chunk_part(const StepShape& s, const LayerState& layer, int x,
                                                 int chunk) {
  return layer.chunks[static_cast<std::int64_t>(x) * s.chunks() + chunk] + layer.in_chunk;
}

// [R / 8]
__device__ __forceinline__ std::uint32_t* codes_of(const StepShape& s, const LayerState& layer,
                                                   int x, int token) {
  return reinterpret_cast<std::uint32_t*>(chunk_part(s, layer, x, token / kChunkTokens)) +
         token % kChunkTokens * s.words();
}

__device__ __forceinline__ std::int16_t& row_of(const StepShape& s, const LayerState& layer, int x,
                                                int token) {
  return reinterpret_cast<std::int16_t*>(chunk_part(s, layer, x, token / kChunkTokens) +
                                         s.row_of_at())[token % kChunkTokens];
}

// [D]
template <typename T>
__device__ __forceinline__ T* mean_of(const StepShape& s, const LayerState& layer, int x, int node,
                                      int d) {
  const int shift = s.node_shift();
  std::byte* part = chunk_part(s, layer, x, node >> shift) + s.means_at();
  return reinterpret_cast<T*>(part) + (node & ((1 << shift) - 1)) * d;
}

// The key [D] of a token that an extent holds, by position; its value is kExtentTokens rows behind.
template <typename T>
__device__ __forceinline__ T* extent_key(const StepShape& s, const LayerState& layer, int x,
                                         int position, int d) {
  std::byte* part =
      layer.extents[static_cast<std::int64_t>(x) * s.extents + position / kExtentTokens] +
      layer.in_extent;
  return reinterpret_cast<T*>(part) + position % kExtentTokens * d;
}

// The host page [2][S][D] of an index token.
__device__ __forceinline__ std::byte* page_of(const StepShape& s, const LayerState& layer, int x,
                                              int token) {
  const int b = x / s.kv_heads, h = x % s.kv_heads;
  return layer
      .pages[(static_cast<std::int64_t>(b) * s.pages() + (token >> s.page_shift())) * s.kv_heads +
             h];
}

}  // namespace icecache::gpu

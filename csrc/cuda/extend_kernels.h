// The kernels that append many tokens at once (tokens.h). Device code: seen by cuda_extend.cu alone.
#pragma once

#include "cuda/step_append.h"
#include "cuda/tokens.h"

namespace icecache::gpu {

// The rows of new tokens.
template <typename T>
__device__ __forceinline__ const T* new_key(const ExtendParams& p, int h, int token) {
  return static_cast<const T*>(p.keys) + h * p.key_head + token * p.key_token;
}
template <typename T>
__device__ __forceinline__ const T* new_value(const ExtendParams& p, int h, int token) {
  return static_cast<const T*>(p.values) + h * p.value_head + token * p.value_token;
}

// Whether the sequence is resident, and will be: its extents have capacity for the new tokens.
__device__ __forceinline__ bool stays_resident(const ExtendParams& p, int x) {
  return p.shape.extents > 0 && p.layer.resident[x] == p.length &&
         p.layer.extent_room[x] >= p.length + p.count;
}

// Tokens that leave the window join the index, a far-field node of them for each block: of the old
// window, and new ones.
template <typename T, int D>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<T>)
    extend_index_kernel(const ExtendParams p) {
  __shared__ SketchMemory<D> shared;
  static_assert(D <= kBlock, "a thread for each element of a value");
  const StepShape& s = p.shape;
  const int h = blockIdx.y, x = p.first_pair + h, d = threadIdx.x;
  const int before = max(0, p.length - s.near_rows());
  const int after = max(0, p.length + p.count - s.near_rows());
  const int node = (before >> s.far_shift()) + static_cast<int>(blockIdx.x);
  const int node_first = node << s.far_shift();
  const int first = max(before, node_first), last = min(after, node_first + s.far_node_tokens);
  float sum = 0.0f;
  if (first > node_first && d < D) sum = p.layer.open_sum[static_cast<std::int64_t>(x) * D + d];
#pragma unroll 1
  for (int token = first; token < last; ++token) {
    const int position = token + s.sink_tokens;
    const T *key, *value;
    if (position < p.length) {
      const std::int64_t at = (static_cast<std::int64_t>(x) * s.rows() + near_row(s, position)) * D;
      key = static_cast<const T*>(p.layer.row_keys) + at;
      value = static_cast<const T*>(p.layer.row_values) + at;
    } else {
      key = new_key<T>(p, h, position - p.length);
      value = new_value<T>(p, h, position - p.length);
    }
    if (d < D) sum += to_float(value[d]);
    index_token<T, D>(s, p.layer, x, token, key, value, shared);
  }
  if (d < D) {
    mean_of<T>(s, p.layer, x, node, D)[d] =
        from_float<T>(divide(sum, static_cast<float>(last - node_first)));
  }
}

// New tokens go to the extents of a resident sequence.
template <typename T, int D>
__global__ void __launch_bounds__(kBlock) extend_extents_kernel(const ExtendParams p) {
  constexpr int kVectors = RowShape<T, D>::kVectors, kAtOnce = kBlock / kVectors;
  const int h = blockIdx.y, x = p.first_pair + h;
  if (!stays_resident(p, x)) return;
  const int own = static_cast<int>(threadIdx.x) / kVectors, v = threadIdx.x % kVectors;
  for (int token = blockIdx.x * kAtOnce + own; own < kAtOnce && token < p.count;
       token += gridDim.x * kAtOnce) {
    T* to = extent_key<T>(p.shape, p.layer, x, p.length + token, D);
    reinterpret_cast<uint4*>(to)[v] = vectors_of(new_key<T>(p, h, token))[v];
    reinterpret_cast<uint4*>(to + kExtentTokens * D)[v] = vectors_of(new_value<T>(p, h, token))[v];
  }
}

// What the kernels above read has its new state: sinks and window, the node that is being filled,
// the ring of queries, the length. A block for each head.
template <typename T, int D>
__global__ void __launch_bounds__(kBlock) extend_near_kernel(const ExtendParams p) {
  constexpr int kVectors = RowShape<T, D>::kVectors;
  const StepShape& s = p.shape;
  const int h = blockIdx.x, x = p.first_pair + h, thread = threadIdx.x;
  const int total = p.length + p.count, indexed = max(0, total - s.near_rows());
  const int window = max(s.sink_tokens, total - s.window_tokens);  // its first position
  for (int i = thread; i < p.count * kVectors; i += kBlock) {
    const int token = i / kVectors, v = i % kVectors, position = p.length + token;
    if (position >= s.sink_tokens && position < window) continue;
    const std::int64_t to =
        (static_cast<std::int64_t>(x) * s.rows() + near_row(s, position)) * kVectors + v;
    static_cast<uint4*>(p.layer.row_keys)[to] = vectors_of(new_key<T>(p, h, token))[v];
    static_cast<uint4*>(p.layer.row_values)[to] = vectors_of(new_value<T>(p, h, token))[v];
  }
  const bool is_open = (indexed & (s.far_node_tokens - 1)) > 0;
  for (int d = thread; d < D && is_open; d += kBlock) {
    p.layer.open_sum[static_cast<std::int64_t>(x) * D + d] =
        open_node_sum<T>(s, p.layer, x, indexed, d, D);
  }
  const int kept = min(p.query_tokens, kRecentQueries);
  uint4* recent = static_cast<uint4*>(p.layer.recent_queries) +
                  static_cast<std::int64_t>(x) * s.group * kRecentQueries * kVectors;
  for (int i = thread; i < s.group * kept * kVectors; i += kBlock) {
    const int g = i / (kept * kVectors), back = i / kVectors % kept, v = i % kVectors;
    const T* query = static_cast<const T*>(p.queries) + (h * s.group + g) * p.query_head +
                     (p.query_tokens - 1 - back) * p.query_token;
    recent[(g * kRecentQueries + (total - 1 - back) % kRecentQueries) * kVectors + v] =
        vectors_of(query)[v];
  }
  if (thread == 0) {
    if (stays_resident(p, x)) p.layer.resident[x] = total;
    p.layer.lengths[x] = total;
  }
}

}  // namespace icecache::gpu

// The kernels of tokens.h. Device code: seen by cuda_tokens.cu alone.
#pragma once

#include "cuda/gpu.h"
#include "cuda/step_common.h"
#include "cuda/tokens.h"

namespace icecache::gpu {

constexpr int kTokenBlock = 256;

// Where the key of an index token of pair x lies, in vectors; its value is a page's half behind.
template <typename T>
__device__ __forceinline__ const uint4* page_row(const StepShape& s, const LayerState& layer, int x,
                                                 int token) {
  return vectors_of(host_key<T>(s, layer, x, token, s.head_dim));
}

template <typename T>
__global__ void __launch_bounds__(kTokenBlock) fetch_kernel(const FetchParams p) {
  const StepShape& s = p.shape;
  const int h = blockIdx.y, x = p.first_pair + h, vectors = s.head_dim / Vector<T>::kCount;
  const int indexed = max(0, p.length - s.near_rows());
  const bool is_resident =
      s.extents > 0 && p.layer.resident[x] >= p.length && p.layer.extent_room[x] >= p.length;
  const std::int64_t all = static_cast<std::int64_t>(p.length) * vectors;
  for (std::int64_t i = blockIdx.x * kTokenBlock + threadIdx.x; i < all;
       i += static_cast<std::int64_t>(gridDim.x) * kTokenBlock) {
    const auto row = static_cast<int>(i / vectors), v = static_cast<int>(i % vectors);
    const uint4 *key, *value;
    int position = row;
    const int token = row - s.sink_tokens;
    if (is_resident) {
      key = vectors_of(extent_key<T>(s, p.layer, x, row, s.head_dim));
      value = key + kExtentTokens * vectors;
    } else if (token >= 0 && token < indexed) {
      key = page_row<T>(s, p.layer, x, token);
      value = key + s.page_size * vectors;
      if (token < p.arranged.count) {
        position = s.sink_tokens +
                   p.arranged.order[static_cast<std::int64_t>(h) * p.arranged.count + token];
      }
    } else {
      const std::int64_t at =
          (static_cast<std::int64_t>(x) * s.rows() + near_row(s, row)) * vectors;
      key = static_cast<const uint4*>(p.layer.row_keys) + at;
      value = static_cast<const uint4*>(p.layer.row_values) + at;
    }
    const std::int64_t to = h * all + static_cast<std::int64_t>(position) * vectors + v;
    static_cast<uint4*>(p.keys)[to] = key[v];
    static_cast<uint4*>(p.values)[to] = value[v];
  }
}

template <typename T>
__global__ void __launch_bounds__(kTokenBlock) keep_kernel(const KeepParams p) {
  const StepShape& s = p.shape;
  const int h = blockIdx.y, x = p.first_pair + h, thread = threadIdx.x;
  const int vectors = s.head_dim / Vector<T>::kCount, of_block = kTokenBlock / vectors;
  const int own = thread / vectors, v = thread % vectors;
  for (int position = blockIdx.x * of_block + own; own < of_block && position < p.length;
       position += gridDim.x * of_block) {
    const auto* key = static_cast<const T*>(p.keys) + h * p.key_head + position * p.key_token;
    const auto* value =
        static_cast<const T*>(p.values) + h * p.value_head + position * p.value_token;
    T* to = extent_key<T>(s, p.layer, x, position, s.head_dim);
    reinterpret_cast<uint4*>(to)[v] = vectors_of(key)[v];
    reinterpret_cast<uint4*>(to + kExtentTokens * s.head_dim)[v] = vectors_of(value)[v];
  }
  if (blockIdx.x == 0 && thread == 0) p.layer.resident[x] = ~p.length;
}

// A block for each head.
static __global__ void __launch_bounds__(kExtentsAtOnce) give_extents_kernel(const ExtentParams p) {
  const int h = blockIdx.x, x = p.first_pair + h, i = threadIdx.x;
  if (i < p.count) {
    p.layer.extents[static_cast<std::int64_t>(x) * p.shape.extents + p.first + i] =
        p.extents[i] + h * p.head_bytes;
  }
  if (i == 0) p.layer.extent_room[x] = p.room;
}

// A block for each head and layer.
template <typename T>
__global__ void __launch_bounds__(kTokenBlock, 2) truncate_kernel(const TruncateParams p) {
  const StepShape& s = p.shape;
  const LayerState& layer = p.layers[blockIdx.y];
  const int x = p.first_pair + static_cast<int>(blockIdx.x), thread = threadIdx.x;
  const int d = s.head_dim, vectors = d / Vector<T>::kCount;
  const int length = layer.lengths[x];
  if (length <= p.kept) return;
  __syncthreads();  // all have read it
  const int indexed = max(0, p.kept - s.near_rows());

  // The window of then, of which the ring holds what has not been displaced since.
  const int first = max(s.sink_tokens, p.kept - s.window_tokens);
  const int last = min(p.kept, length - s.window_tokens);
  for (int i = thread; i < (last - first) * vectors; i += kTokenBlock) {
    const int position = first + i / vectors, v = i % vectors;
    const uint4* key = page_row<T>(s, layer, x, position - s.sink_tokens);
    const std::int64_t to =
        (static_cast<std::int64_t>(x) * s.rows() + near_row(s, position)) * vectors + v;
    static_cast<uint4*>(layer.row_keys)[to] = key[v];
    static_cast<uint4*>(layer.row_values)[to] = key[s.page_size * vectors + v];
  }

  const int in_node = indexed % s.far_node_tokens, node = indexed / s.far_node_tokens;
  for (int i = thread; i < d && in_node > 0; i += kTokenBlock) {
    const float sum = open_node_sum<T>(s, layer, x, indexed, i, d);
    layer.open_sum[static_cast<std::int64_t>(x) * d + i] = sum;
    mean_of<T>(s, layer, x, node, d)[i] = from_float<T>(divide(sum, static_cast<float>(in_node)));
  }

  // Cached rows of tokens that are gone. Stamps are lengths: none may lie ahead.
  const std::int64_t cached = static_cast<std::int64_t>(x) * s.cached_rows;
  for (int r = thread; r < s.cached_rows; r += kTokenBlock) {
    std::int32_t& owner = layer.owner[cached + r];
    std::int32_t& stamp = layer.stamp[cached + r];
    if (owner >= indexed) {
      owner = -1;  // append forgets the token's row when it comes again
      stamp = 0;
      layer.has_value[cached + r] = 0;
    } else {
      stamp = min(stamp, p.kept);
    }
  }
  if (thread == 0) {
    layer.lengths[x] = p.kept;
    layer.resident[x] = min(layer.resident[x], p.kept);
  }
}

}  // namespace icecache::gpu

// What the kernels of a step share. Device code.
#pragma once

#include <climits>

#include "cuda/chunk.h"
#include "cuda/gpu.h"
#include "cuda/step.h"

namespace icecache::gpu {

constexpr int kBlock = 256;  // threads of append, scan, rank, choose, rescore
// Blocks of the widest kernels that a multiprocessor holds at once; fp32 rows take more registers.
template <typename T>
constexpr int kLeastBlocks = sizeof(T) == 4 ? 1 : 2;

// Where pair x stands in queries, keys, values and out; < 0: it takes no part in this step.
__device__ __forceinline__ int input_of(const StepParams& p, int x) {
  return p.scratch.inputs[x];
}
// Tokens of pair x before this step; < 0: no sequence there, or it takes no part; or kFull.
__device__ __forceinline__ int length_of(const StepParams& p, int x) {
  return p.scratch.lengths[x];
}
// In place of the length: of a sequence without room; of one that attend_all answers.
constexpr int kFull = INT_MAX, kResident = INT_MAX - 1;
__device__ __forceinline__ bool is_idle(int length) {
  return length < 0 || length >= kResident;
}
// Index tokens and near rows once the token at position `length` is in the window.
__device__ __forceinline__ int index_tokens(const StepShape& s, int length) {
  return max(0, length + 1 - s.near_rows());
}
__device__ __forceinline__ int near_count(const StepShape& s, int length) {
  return min(length + 1, s.near_rows());
}
// The near row of a position.
__device__ __forceinline__ int near_row(const StepShape& s, int position) {
  return position < s.sink_tokens ? position
                                  : s.sink_tokens + (position - s.sink_tokens) % s.window_tokens;
}

// Where an index token of pair x has its key, and its value, in its host page; d: the head dimension.
template <typename T>
__device__ __forceinline__ T* host_key(const StepShape& s, const LayerState& layer, int x,
                                       int token, int d) {
  return reinterpret_cast<T*>(page_of(s, layer, x, token)) + (token & (s.page_size - 1)) * d;
}
template <typename T>
__device__ __forceinline__ T* host_value(const StepShape& s, const LayerState& layer, int x,
                                         int token, int d) {
  return host_key<T>(s, layer, x, token, d) + s.page_size * d;
}
// Of the far-field node that is being filled, whose last token is ahead of `indexed`: the sum of the
// i-th elements of its values, added up in the order in which they came.
template <typename T>
__device__ __forceinline__ float open_node_sum(const StepShape& s, const LayerState& layer, int x,
                                               int indexed, int i, int d) {
  float sum = 0.0f;
  for (int token = indexed & ~(s.far_node_tokens - 1); token < indexed; ++token) {
    sum += to_float(host_value<T>(s, layer, x, token, d)[i]);
  }
  return sum;
}

// Whether this block is the last of `blocks` that arrive: then it sees all that the others wrote.
// All threads of the block call it.
__device__ __forceinline__ bool is_last_block(std::uint32_t* arrived, unsigned blocks) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    device_fence();  // of the whole block's writes, which the barrier puts ahead of it
    is_last = atomicAdd(arrived, 1u) + 1 == blocks;
    device_fence();
  }
  __syncthreads();
  return is_last;
}

// Queries of a pair's group [H, D], scaled; heads beyond the group are 0.
template <typename T, int D, int Threads>
__device__ __forceinline__ void load_queries(const StepParams& p, int input, float* queries) {
  const StepShape& s = p.shape;
  constexpr int kCount = Vector<T>::kCount, kVectors = D / kCount;
  const uint4* from =
      vectors_of(static_cast<const T*>(p.queries) + static_cast<std::int64_t>(input) * s.group * D);
#pragma unroll 1
  for (int i = threadIdx.x; i < s.padded_group() * kVectors; i += Threads) {
    float query[kCount] = {};
    if (i < s.group * kVectors) Vector<T>{from[i]}.unpack(query);
#pragma unroll
    for (int j = 0; j < kCount; ++j) queries[i * kCount + j] = query[j] * s.scale;
  }
}

// Products of a row, of which each of its lanes holds a part, with four queries [4, D]; summed over
// the row's lanes. All lanes of the warp call it.
template <typename T, int D>
__device__ __forceinline__ float4 row_products(const uint4* held, const float* queries,
                                               int within) {
  using Shape = RowShape<T, D>;
  float sums[kHeadTile] = {};
#pragma unroll
  for (int j = 0; j < Shape::kPerLane; ++j) {
    const int v = Shape::vector(within, j);
    if (v < Shape::kVectors) {
      float k[Shape::kCount];
      Vector<T>{held[j]}.unpack(k);
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
#pragma unroll
        for (int i = 0; i < Shape::kCount; ++i) {
          sums[g] += queries[g * D + v * Shape::kCount + i] * k[i];
        }
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kHeadTile; ++g) sums[g] = warp_sum(sums[g], Shape::kLanes);
  return make_float4(sums[0], sums[1], sums[2], sums[3]);
}

}  // namespace icecache::gpu

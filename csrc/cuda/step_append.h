// append: three blocks for each pair, which do not wait for each other. Device code.
#pragma once

#include "cuda/step_common.h"

namespace icecache::gpu {

// Shared memory of a block that gives tokens their sketches.
template <int D>
struct SketchMemory {
  static constexpr int kMaxRank = 64;
  float key[D];
  float slices[kBlock];
  float projected[kMaxRank];
};

// A token joins the index of pair x, a KV head of one sequence: its key and value go to its host
// page, and its key gets a sketch. All threads of the block call it.
template <typename T, int D>
__device__ __forceinline__ void index_token(const StepShape& s, const LayerState& layer, int x,
                                            int token, const T* row_key, const T* row_value,
                                            SketchMemory<D>& shared) {
  using Shape = RowShape<T, D>;
  const int thread = threadIdx.x, rank = s.rank;
  if (thread == 0) row_of(s, layer, x, token) = -1;
  if (thread < Shape::kVectors) {
    reinterpret_cast<uint4*>(host_key<T>(s, layer, x, token, D))[thread] =
        vectors_of(row_key)[thread];
  } else if (thread < 2 * Shape::kVectors) {
    const int v = thread - Shape::kVectors;
    reinterpret_cast<uint4*>(host_value<T>(s, layer, x, token, D))[v] = vectors_of(row_value)[v];
  }
  const float* mean_key = layer.mean_key + static_cast<std::int64_t>(x) * D;
  for (int d = thread; d < D; d += kBlock) shared.key[d] = to_float(row_key[d]) - mean_key[d];
  __syncthreads();
  const int per_slice = D * rank / kBlock, r = thread % rank, slice = thread / rank;
  const float* basis = layer.from_key + static_cast<std::int64_t>(x) * D * rank;
  float sum = 0.0f;
#pragma unroll 4
  for (int d = slice * per_slice; d < (slice + 1) * per_slice; ++d) {
    sum += shared.key[d] * basis[d * rank + r];
  }
  shared.slices[thread] = sum;
  __syncthreads();
  if (thread < rank) {
    for (int other = thread + rank; other < kBlock; other += rank) sum += shared.slices[other];
    shared.projected[thread] = sum;
  }
  __syncthreads();
  if (thread < s.words()) {
    const std::int64_t first = static_cast<std::int64_t>(x) * rank + thread * kCodesPerWord;
    codes_of(s, layer, x, token)[thread] = pack_codes(shared.projected + thread * kCodesPerWord,
                                                      layer.low + first, layer.step + first);
  }
}

// The token that leaves the window goes to its host page, and the new one takes its place, and
// one in the extent of a resident sequence.
template <typename T, int D>
__device__ void store_token(const StepParams& p, int x, int input, int length, bool is_resident) {
  __shared__ SketchMemory<D> shared;
  const StepShape& s = p.shape;
  const int thread = threadIdx.x, row = near_row(s, length);
  const std::int64_t at = (static_cast<std::int64_t>(x) * s.rows() + row) * D;
  T* row_key = static_cast<T*>(p.layer.row_keys) + at;
  T* row_value = static_cast<T*>(p.layer.row_values) + at;
  const int displaced = length - s.near_rows();
  if (displaced >= 0) {
    for (int d = thread; d < D; d += kBlock) {
      const int in_node = displaced & (s.far_node_tokens - 1);
      float* open = p.layer.open_sum + static_cast<std::int64_t>(x) * D + d;
      const float sum = (in_node == 0 ? 0.0f : *open) + to_float(row_value[d]);
      *open = sum;
      mean_of<T>(s, p.layer, x, displaced >> s.far_shift(), D)[d] =
          from_float<T>(divide(sum, static_cast<float>(in_node + 1)));
    }
    index_token<T, D>(s, p.layer, x, displaced, row_key, row_value, shared);
  }
  __syncthreads();
  const T* new_key = static_cast<const T*>(p.keys) + static_cast<std::int64_t>(input) * D;
  const T* new_value = static_cast<const T*>(p.values) + static_cast<std::int64_t>(input) * D;
  for (int d = thread; d < D; d += kBlock) {
    row_key[d] = new_key[d];
    row_value[d] = new_value[d];
  }
  if (!is_resident) return;
  T* kept_key = extent_key<T>(s, p.layer, x, length, D);
  for (int d = thread; d < D; d += kBlock) {
    kept_key[d] = new_key[d];
    kept_key[kExtentTokens * D + d] = new_value[d];
  }
}

// Logits of sink and window, the new token among them, and the sum of their weights.
template <typename T, int D>
__device__ void score_near(const StepParams& p, int x, int input, int length) {
  using Shape = RowShape<T, D>;
  constexpr int kWarps = kBlock / kWarp;
  __shared__ float query[kMaxStepGroup * D];
  __shared__ float4 logits[kMaxNear];
  const StepShape& s = p.shape;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int heads = s.padded_group(), near = near_count(s, length), newest = near_row(s, length);
  const T* rows =
      static_cast<const T*>(p.layer.row_keys) + static_cast<std::int64_t>(x) * s.rows() * D;
  const T* new_key = static_cast<const T*>(p.keys) + static_cast<std::int64_t>(input) * D;
  load_queries<T, D, kBlock>(p, input, query);
  __syncthreads();
  const int own = lane / Shape::kLanes, within = lane % Shape::kLanes;
  for (int tile = 0; tile < heads; tile += kHeadTile) {
#pragma unroll 2
    for (int first = warp * Shape::kRows; first < near; first += kWarps * Shape::kRows) {
      const int e = first + own;
      uint4 held[Shape::kPerLane] = {};
      const T* row = e == newest || e >= near ? new_key : rows + e * D;
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) held[j] = vectors_of(row)[v];
      }
      const float4 four = row_products<T, D>(held, query + tile * D, within);
      if (e < near && within == 0) {
        logits[e] = four;
        *reinterpret_cast<float4*>(p.scratch.near_logits +
                                   (static_cast<std::int64_t>(x) * s.near_rows() + e) * heads +
                                   tile) = four;
      }
    }
    __syncthreads();
    if (warp < kHeadTile) {
      const float* of_head = reinterpret_cast<const float*>(logits) + warp;
      float largest = -INFINITY, sum = 0.0f;
#pragma unroll 2
      for (int e = lane; e < near; e += kWarp) largest = fmaxf(largest, of_head[e * kHeadTile]);
      largest = warp_max(largest);
#pragma unroll 2
      for (int e = lane; e < near; e += kWarp) sum += expf(of_head[e * kHeadTile] - largest);
      sum = warp_sum(sum);
      if (lane == 0) {
        p.scratch.near_lse[static_cast<std::int64_t>(x) * heads + tile + warp] =
            largest + logf(sum);
      }
    }
    __syncthreads();
  }
}

// The queries, kept for the metric of the next build.
template <typename T, int D>
__device__ __forceinline__ void keep_queries(const StepParams& p, int x, int input, int length) {
  const StepShape& s = p.shape;
  T* recent = static_cast<T*>(p.layer.recent_queries) +
              static_cast<std::int64_t>(x) * s.group * kRecentQueries * D +
              length % kRecentQueries * D;
  const T* from = static_cast<const T*>(p.queries) + static_cast<std::int64_t>(input) * s.group * D;
  constexpr int kVectors = RowShape<T, D>::kVectors;
#pragma unroll 1
  for (int i = threadIdx.x; i < s.group * kVectors; i += kBlock) {
    reinterpret_cast<uint4*>(recent + i / kVectors * kRecentQueries * D)[i % kVectors] =
        vectors_of(from)[i];
  }
}

// The queries in sketch coordinates, in 8 bits on a scale that the heads share.
template <typename T, int D>
__device__ void project_queries(const StepParams& p, int x, int input, int length) {
  constexpr int kMaxRank = 64, kWarps = kBlock / kWarp;
  __shared__ float query[kMaxStepGroup * D];
  __shared__ float slices[kHeadTile * kBlock];
  __shared__ float projected[kMaxStepGroup * kMaxRank];
  __shared__ float room[kWarps];
  const StepShape& s = p.shape;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int heads = s.padded_group(), rank = s.rank;
  const int slice_count = kBlock / rank, per_slice = D / slice_count;
  const int r = thread % rank, slice = thread / rank;
  const float* basis = p.layer.from_query + static_cast<std::int64_t>(x) * D * rank;
  const float* mean_key = p.layer.mean_key + static_cast<std::int64_t>(x) * D;
  const float* low = p.layer.low + static_cast<std::int64_t>(x) * rank;
  const float* step = p.layer.step + static_cast<std::int64_t>(x) * rank;
  load_queries<T, D, kBlock>(p, input, query);
  __syncthreads();
  float largest = 0.0f;
  for (int tile = 0; tile < heads; tile += kHeadTile) {
    float sums[kHeadTile] = {};
#pragma unroll 8
    for (int d = slice * per_slice; d < (slice + 1) * per_slice; ++d) {
      const float b = basis[d * rank + r];
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) sums[g] += query[(tile + g) * D + d] * b;
    }
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) slices[g * kBlock + thread] = sums[g];
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < kHeadTile * rank; i += kBlock) {
      float sum = 0.0f;
#pragma unroll 4
      for (int other = 0; other < slice_count; ++other) {
        sum += slices[i / rank * kBlock + other * rank + i % rank];
      }
      sum *= step[i % rank];
      projected[tile * rank + i] = sum;
      largest = fmaxf(largest, fabsf(sum));
    }
    __syncthreads();
  }
  largest = warp_max(largest);
  if (lane == 0) room[warp] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, room[w]);
  const float scale = fmaxf(largest, 1e-20f) * (1.0f / 127.0f);
  const float unit = scale * static_cast<float>(rank / 16);  // scores lose log2(R / 16) bits
  if (thread == 0) p.scratch.unit[x] = unit;
  keep_queries<T, D>(p, x, input, length);
#pragma unroll 1
  for (int g = warp; g < heads; g += kWarps) {
    float bias = 0.0f;
    for (int d = lane; d < D; d += kWarp) bias += query[g * D + d] * mean_key[d];
#pragma unroll 1
    for (int i = lane; i < rank; i += kWarp) {
      const float code = rintf(divide(projected[g * rank + i], scale));
      p.scratch.query_codes[(static_cast<std::int64_t>(x) * heads + g) * rank + i] =
          static_cast<std::int8_t>(code);
      bias += scale * code * divide(low[i], step[i]);
    }
    bias = warp_sum(bias) + 0.5f * (unit - scale);  // shifting rounds down
    if (lane == 0) p.scratch.bias[static_cast<std::int64_t>(x) * heads + g] = bias;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<T>) append_kernel(const StepParams p) {
  wait_for_earlier_kernel();
  // Later kernels read what is found here.
  const int x = blockIdx.x, heads = p.shape.kv_heads;
  const int row = p.rows == nullptr ? x / heads : p.rows[x / heads];
  const int input = row < 0 ? -1 : row * heads + x % heads;
  int length = row < 0 ? -1 : p.layer.lengths[x];
  if (length >= p.shape.near_rows() + p.layer.room[x]) length = kFull;
  // Of a step of several tokens attend_all has answered those of residents by now.
  const bool is_taken = p.tokens > 1 && p.shape.extents > 0 && p.token < p.scratch.taken[x];
  const bool is_resident = p.tokens == 1 && p.shape.extents > 0 && !is_idle(length) &&
                           length == p.layer.resident[x] && length < p.layer.extent_room[x];
  if (blockIdx.y == 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRanks; i += kBlock) {
      p.scratch.histogram[static_cast<std::int64_t>(x) * kRanks + i] = 0;
    }
    if (threadIdx.x == 0) {
      p.scratch.inputs[x] = input;
      p.scratch.lengths[x] = is_resident || is_taken ? kResident : length;
      p.scratch.resident_lengths[x] = is_resident ? length : -1;
      p.scratch.found[x] = 0;
      p.scratch.blocks_ranked[x] = 0;
      p.scratch.blocks_done[x] = 0;
    }
  }
  if (is_taken || is_idle(length)) return;
  switch (blockIdx.y) {
    case 0:
      return store_token<T, D>(p, x, input, length, is_resident);
    case 1:
      if (!is_resident) score_near<T, D>(p, x, input, length);
      return;
    default:
      if (is_resident) return keep_queries<T, D>(p, x, input, length);
      return project_queries<T, D>(p, x, input, length);
  }
}

}  // namespace icecache::gpu

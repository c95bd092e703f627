// attend: rows and nodes, split over blocks. Device code.
#pragma once

#include "cuda/step_common.h"

namespace icecache::gpu {

constexpr int kAttendBlock = 256;
constexpr int kAttendUnroll = 4;

// Tiles: fours of heads that one block takes.
template <typename T, int D, int Tiles>
__global__ void __launch_bounds__(kAttendBlock, Tiles == 1 ? kLeastBlocks<T> : 1)
    attend_kernel(const StepParams p) {
  using Shape = RowShape<T, D>;
  constexpr int kHeads = Tiles * kHeadTile, kWarps = kAttendBlock / kWarp;
  constexpr int kParts = kWarps * Shape::kRows;  // rows that the block reads at once
  __shared__ float sums[kWarps][kHeads];
  __shared__ float room[kWarps][kHeads * D / 2];
  __shared__ bool is_last;
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  const int heads = s.padded_group(), first_head = blockIdx.z * kHeads;
  const int input = input_of(p, x);
  if (input < 0) return;
  T* out = static_cast<T*>(p.out) + static_cast<std::int64_t>(input) * s.group * D;
  if (is_idle(s, length)) {
    const T value = from_float<T>(length < 0 ? 0.0f : NAN);
    if (blockIdx.x == 0 && blockIdx.z == 0) {
      for (int i = thread; i < s.group * D; i += kAttendBlock) out[i] = value;
    }
    return;
  }
  const int rows = p.scratch.entry_count[x], count = index_tokens(s, length);
  const int nodes = s.tail ? (count + s.far_node_tokens - 1) / s.far_node_tokens : 0;
  const int of_block = s.attend_rows(), blocks = (rows + nodes + of_block - 1) / of_block;
  const int begin = blockIdx.x * of_block, end = min(begin + of_block, rows + nodes);
  if (begin >= end) return;

  T* row_values = static_cast<T*>(p.layer.row_values) + static_cast<std::int64_t>(x) * s.rows() * D;
  const T* means =
      static_cast<const T*>(p.layer.means) + static_cast<std::int64_t>(x) * s.nodes() * D;
  const std::int64_t entry0 = static_cast<std::int64_t>(x) * s.entries();
  const std::int64_t node0 = static_cast<std::int64_t>(x) * s.nodes();
  const int part = warp * Shape::kRows + lane / Shape::kLanes, within = lane % Shape::kLanes;
  float sum[kHeads] = {};
  float acc[kHeads][Shape::kElements] = {};
  // The values of kAttendUnroll rows and their weights; all loads are under way before one is used.
  uint4 held[kAttendUnroll][Shape::kPerLane];
  float weights[kAttendUnroll][kHeads];
  const auto load = [&](int u, const T* row, const float* weight, bool counts) {
#pragma unroll
    for (int j = 0; j < Shape::kPerLane; ++j) {
      const int v = Shape::vector(within, j);
      held[u][j] =
          vectors_of(row)[Shape::kVectors % Shape::kLanes == 0 ? v : min(v, Shape::kVectors - 1)];
    }
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const bool is_there = counts && first_head + t * kHeadTile < heads;
      const float4 four = reinterpret_cast<const float4*>(weight)[is_there ? t : 0];
      weights[u][t * 4] = is_there ? four.x : 0.0f;
      weights[u][t * 4 + 1] = is_there ? four.y : 0.0f;
      weights[u][t * 4 + 2] = is_there ? four.z : 0.0f;
      weights[u][t * 4 + 3] = is_there ? four.w : 0.0f;
    }
  };
  const auto accumulate = [&](int u) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) sum[g] += weights[u][g];
#pragma unroll
    for (int j = 0; j < Shape::kPerLane; ++j) {
      float value[Shape::kCount];
      Vector<T>{held[u][j]}.unpack(value);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
#pragma unroll
        for (int i = 0; i < Shape::kCount; ++i) {
          acc[g][j * Shape::kCount + i] += weights[u][g] * value[i];
        }
      }
    }
  };

  const float* mass = p.scratch.mass + node0 * heads + first_head;
  for (int first = max(begin, rows) + part; first < end; first += kParts * kAttendUnroll) {
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      const int e = first + u * kParts, node = min(e, end - 1) - rows;
      load(u, means + static_cast<std::int64_t>(node) * D,
           mass + static_cast<std::int64_t>(node) * heads, e < end);
    }
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) accumulate(u);
  }
  // Masses of nodes are over exp(lse), weights of rows over the largest of it and all logits.
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    const float far_scale =
        first_head + g < heads
            ? p.scratch.far_scale[static_cast<std::int64_t>(x) * heads + first_head + g]
            : 0.0f;
    sum[g] *= far_scale;
#pragma unroll
    for (int i = 0; i < Shape::kElements; ++i) acc[g][i] *= far_scale;
  }
  const int last_row = min(end, rows);
  for (int first = begin + part; first < last_row; first += kParts * kAttendUnroll) {
    int row[kAttendUnroll], source[kAttendUnroll];
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      const int e = min(first + u * kParts, last_row - 1);
      row[u] = p.scratch.entry_rows[entry0 + e];
      source[u] = p.scratch.entry_sources[entry0 + e];
    }
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      const int e = first + u * kParts, clamped = min(e, last_row - 1);
      const T* from = source[u] < 0 ? row_values + static_cast<std::int64_t>(row[u]) * D
                                    : host_value<T>(p, x, source[u], D);
      load(u, from, p.scratch.entry_weights + (entry0 + clamped) * heads + first_head,
           e < last_row);
      if (e >= last_row) source[u] = -1;
    }
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      accumulate(u);
      if (source[u] < 0 || blockIdx.z != 0) continue;
      uint4* to = reinterpret_cast<uint4*>(row_values + static_cast<std::int64_t>(row[u]) * D);
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) to[v] = held[u][j];
      }
    }
  }

  // Over the parts of the warp, then over the warps, in two halves to fit shared memory.
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    for (int offset = Shape::kLanes; offset < kWarp; offset *= 2) {
      sum[g] += __shfl_xor_sync(~0u, sum[g], offset);
#pragma unroll
      for (int i = 0; i < Shape::kElements; ++i) {
        acc[g][i] += __shfl_xor_sync(~0u, acc[g][i], offset);
      }
    }
    if (lane == 0) sums[warp][g] = sum[g];
  }
  const std::int64_t block0 =
      (static_cast<std::int64_t>(x) * s.attend_blocks() + blockIdx.x) * heads + first_head;
  for (int half = 0; half < 2; ++half) {
    if (lane < Shape::kLanes) {
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        if (g / (kHeads / 2) != half) continue;
#pragma unroll
        for (int j = 0; j < Shape::kPerLane; ++j) {
          const int v = Shape::vector(within, j);
          if (v < Shape::kVectors) {
#pragma unroll
            for (int i = 0; i < Shape::kCount; ++i) {
              room[warp][(g % (kHeads / 2)) * D + v * Shape::kCount + i] =
                  acc[g][j * Shape::kCount + i];
            }
          }
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < kHeads / 2 * D; i += kAttendBlock) {
      const int g = half * (kHeads / 2) + i / D;
      if (first_head + g >= heads) continue;
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += room[w][i];
      p.scratch.partial[(block0 + g) * D + i % D] = total;
    }
    __syncthreads();
  }
  if (thread < kHeads && first_head + thread < heads) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[w][thread];
    p.scratch.partial_sum[block0 + thread] = total;
  }

  // The last block merges, in the order of the blocks, and the pair has one more token.
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    is_last = atomicAdd(p.scratch.blocks_done + x, 1u) + 1 == blocks * gridDim.z;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const std::int64_t first_block = static_cast<std::int64_t>(x) * s.attend_blocks() * heads;
  __shared__ float totals[kMaxGroup];
  __shared__ float4 parts[kAttendBlock];
  for (int g = warp; g < s.group; g += kWarps) {
    float total = 0.0f;
    for (int block = lane; block < blocks; block += kWarp) {
      total += __ldcg(p.scratch.partial_sum + first_block +
                      static_cast<std::int64_t>(block) * heads + g);
    }
    total = warp_sum(total);
    if (lane == 0) totals[g] = total;
  }
  // Four outputs to an item, and as many threads to an item as there are to spare.
  const int items = s.group * D / 4, at_once = min(items, kAttendBlock);
  const int threads = kAttendBlock / at_once, share = thread / at_once;
  for (int first = 0; first < items; first += at_once) {
    const int item = first + thread % at_once;
    const bool works = share < threads && item < items;
    float4 sum4 = make_float4(0, 0, 0, 0);
    if (works) {
#pragma unroll 4
      for (int block = share; block < blocks; block += threads) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(
            p.scratch.partial + (first_block + static_cast<std::int64_t>(block) * heads) * D +
            item * 4));
        sum4.x += part.x;
        sum4.y += part.y;
        sum4.z += part.z;
        sum4.w += part.w;
      }
    }
    parts[thread] = sum4;
    __syncthreads();
    if (works && share == 0) {
      for (int other = 1; other < threads; ++other) {
        const float4 part = parts[thread + other * at_once];
        sum4.x += part.x;
        sum4.y += part.y;
        sum4.z += part.z;
        sum4.w += part.w;
      }
      const float total = totals[item * 4 / D];
      out[item * 4] = from_float<T>(sum4.x / total);
      out[item * 4 + 1] = from_float<T>(sum4.y / total);
      out[item * 4 + 2] = from_float<T>(sum4.z / total);
      out[item * 4 + 3] = from_float<T>(sum4.w / total);
    }
    __syncthreads();
  }
  if (thread == 0) p.layer.lengths[x] = length + 1;
}

}  // namespace icecache::gpu

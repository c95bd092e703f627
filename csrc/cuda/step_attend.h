// attend: rows and nodes, split over blocks. Device code.
#pragma once

#include "cuda/step_common.h"

namespace icecache::gpu {

constexpr int kAttendBlock = 256;
constexpr int kAttendUnroll = 4;  // rows of each part of a warp that are under way, twice
constexpr int kMaxEntries = kMaxNear + kMaxCandidates;

// Tiles: fours of heads that one block takes. A block has its share of the nodes and of the rows.
template <typename T, int D, int Tiles>
__global__ void __launch_bounds__(kAttendBlock, Tiles == 1 ? kLeastBlocks<T> : 1)
    attend_kernel(const StepParams p) {
  using Shape = RowShape<T, D>;
  constexpr int kHeads = Tiles * kHeadTile, kWarps = kAttendBlock / kWarp;
  constexpr int kParts = kWarps * Shape::kRows;  // rows that the block reads at once
  constexpr int kStep = kParts * kAttendUnroll;
  // Weights of a part's rows, [kAttendUnroll, kHeads], are spread over its lanes.
  constexpr int kWeights = (kAttendUnroll * kHeads + Shape::kLanes - 1) / Shape::kLanes;
  __shared__ int2 entries[kMaxEntries];  // of this block: row, source
  __shared__ float4 weight_room[2][kWarps][kAttendUnroll * Shape::kRows][Tiles];
  __shared__ float sums[kWarps][kHeads];
  __shared__ float room[kWarps][kHeads * D / 2];
  __shared__ bool is_last;
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  const int heads = s.padded_group(), first_head = blockIdx.z * kHeads;
  const int input = input_of(p, x), all_rows = p.scratch.entry_count[x];
  if (input < 0) return;
  T* out = static_cast<T*>(p.out) + static_cast<std::int64_t>(input) * s.group * D;
  if (is_idle(length)) {
    const T value = from_float<T>(length < 0 ? 0.0f : NAN);
    if (blockIdx.x == 0 && blockIdx.z == 0) {
      for (int i = thread; i < s.group * D; i += kAttendBlock) out[i] = value;
    }
    return;
  }
  const int count = index_tokens(s, length);
  const int all_nodes = s.tail ? (count + s.far_node_tokens - 1) / s.far_node_tokens : 0;
  const int blocks =
      min(static_cast<int>(gridDim.x), (all_rows + all_nodes + kAttendLeast - 1) / kAttendLeast);
  const int block = blockIdx.x;
  if (block >= blocks) return;
  const auto share = [&](int all, int of) {
    return static_cast<int>(static_cast<std::int64_t>(all) * of / blocks);
  };
  const int first_node = share(all_nodes, block), nodes = share(all_nodes, block + 1) - first_node;
  const int first_row = share(all_rows, block), rows = share(all_rows, block + 1) - first_row;
  const int items = nodes + rows;

  T* row_values = static_cast<T*>(p.layer.row_values) + static_cast<std::int64_t>(x) * s.rows() * D;
  const float* mass =
      p.scratch.mass + (static_cast<std::int64_t>(x) * s.nodes() + first_node) * heads + first_head;
  const std::int64_t entry0 = static_cast<std::int64_t>(x) * s.entries() + first_row;
  const float* row_weights = p.scratch.entry_weights + entry0 * heads + first_head;
  const int part = warp * Shape::kRows + lane / Shape::kLanes, within = lane % Shape::kLanes;
  const int own_head = within % kHeads;
  const bool is_head = first_head + own_head < heads;
  // Masses of nodes are over exp(lse), weights of rows over the largest of it and all logits.
  const float far_scale =
      is_head ? p.scratch.far_scale[static_cast<std::int64_t>(x) * heads + first_head + own_head]
              : 0.0f;

  // What a lane holds of a step: its parts of the values, and its weights of the part's rows.
  struct Held {
    uint4 values[kAttendUnroll][Shape::kPerLane];
    float weights[kWeights];
  };
  const auto load_row = [&](uint4* held, const T* row) {
#pragma unroll
    for (int j = 0; j < Shape::kPerLane; ++j) {
      const int v = Shape::vector(within, j);
      held[j] =
          vectors_of(row)[Shape::kVectors % Shape::kLanes == 0 ? v : min(v, Shape::kVectors - 1)];
    }
  };
  const auto item_of_weight = [&](int first, int k) {
    return first + (k * Shape::kLanes + within) / kHeads * kParts + part;
  };
  const auto load_nodes = [&](Held& held, int first) {
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      load_row(held.values[u],
               mean_of<T>(s, p.layer, x, first_node + first + u * kParts + part, D));
    }
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      const bool counts = (k * Shape::kLanes + within) / kHeads < kAttendUnroll && is_head;
      const std::int64_t node = counts ? item_of_weight(first, k) : 0;
      held.weights[k] = counts ? mass[node * heads + own_head] * far_scale : 0.0f;
    }
  };
  const auto load_any = [&](Held& held, int first) {
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      const int item = min(first + u * kParts + part, items - 1);
      const T* from;
      if (item < nodes) {
        from = mean_of<T>(s, p.layer, x, first_node + item, D);
      } else {
        const int2 entry = entries[item - nodes];
        from = entry.y < 0 ? row_values + static_cast<std::int64_t>(entry.x) * D
                           : host_value<T>(p, x, entry.y, D);
      }
      load_row(held.values[u], from);
    }
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      const int item = item_of_weight(first, k);
      const bool counts =
          (k * Shape::kLanes + within) / kHeads < kAttendUnroll && item < items && is_head;
      const bool is_node = item < nodes;
      const float* from = is_node ? mass + static_cast<std::int64_t>(item) * heads
                                  : row_weights + static_cast<std::int64_t>(item - nodes) * heads;
      held.weights[k] = counts ? from[own_head] * (is_node ? far_scale : 1.0f) : 0.0f;
    }
  };
  const auto load = [&](Held& held, int first) {
    if (first >= items) return;
    if (first + kStep <= nodes) {
      load_nodes(held, first);
    } else {
      load_any(held, first);
    }
  };
  float sum = 0.0f;  // of the own head's weights
  float acc[kHeads][Shape::kElements] = {};
  const auto accumulate = [&](const Held& held, int first, float4(*room_of_warp)[Tiles]) {
    if (first >= items) return;
    float* to_weights =
        reinterpret_cast<float*>(room_of_warp) + lane / Shape::kLanes * kHeads + own_head;
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      const int u = (k * Shape::kLanes + within) / kHeads;
      if (u < kAttendUnroll) to_weights[u * Shape::kRows * kHeads] = held.weights[k];
      sum += held.weights[k];
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      float weight[kHeads];
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const float4 four = room_of_warp[u * Shape::kRows + lane / Shape::kLanes][t];
        weight[t * 4] = four.x;
        weight[t * 4 + 1] = four.y;
        weight[t * 4 + 2] = four.z;
        weight[t * 4 + 3] = four.w;
      }
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        float value[Shape::kCount];
        Vector<T>{held.values[u][j]}.unpack(value);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
#pragma unroll
          for (int i = 0; i < Shape::kCount; ++i) {
            acc[g][j * Shape::kCount + i] += weight[g] * value[i];
          }
        }
      }
    }
    if (first + kStep <= nodes || blockIdx.z != 0) return;
      // Values that came from host memory stay.
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      const int item = first + u * kParts + part;
      if (item < nodes || item >= items) continue;
      const int2 entry = entries[item - nodes];
      if (entry.y < 0) continue;
      uint4* to = reinterpret_cast<uint4*>(row_values + static_cast<std::int64_t>(entry.x) * D);
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) to[v] = held.values[u][j];
      }
    }
  };

  // Two steps by turns: the loads of one are under way while the other is added up. Those of the
  // first are ahead of the block's barrier where they can be.
  Held even = {}, odd = {};
  const bool begins_with_nodes = kStep <= nodes;
  if (begins_with_nodes) load_nodes(even, 0);
  for (int e = thread; e < rows; e += kAttendBlock) {
    entries[e] = make_int2(p.scratch.entry_rows[entry0 + e], p.scratch.entry_sources[entry0 + e]);
  }
  __syncthreads();
  if (!begins_with_nodes) load_any(even, 0);
  for (int first = 0; first < items; first += 2 * kStep) {
    load(odd, first + kStep);
    accumulate(even, first, weight_room[0][warp]);
    load(even, first + 2 * kStep);
    accumulate(odd, first + kStep, weight_room[1][warp]);
  }

  // Over the parts of the warp, then over the warps, in two halves to fit shared memory.
  for (int offset = kHeads; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane < kHeads) sums[warp][lane] = sum;
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    for (int offset = Shape::kLanes; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int i = 0; i < Shape::kElements; ++i) {
        acc[g][i] += __shfl_xor_sync(~0u, acc[g][i], offset);
      }
    }
  }
  const std::int64_t block0 =
      (static_cast<std::int64_t>(x) * gridDim.x + block) * heads + first_head;
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
  const std::int64_t first_block = static_cast<std::int64_t>(x) * gridDim.x * heads;
  __shared__ float totals[kMaxGroup];
  __shared__ float4 parts[kAttendBlock];
  for (int g = warp; g < s.group; g += kWarps) {
    float total = 0.0f;
    for (int b = lane; b < blocks; b += kWarp) {
      total +=
          __ldcg(p.scratch.partial_sum + first_block + static_cast<std::int64_t>(b) * heads + g);
    }
    total = warp_sum(total);
    if (lane == 0) totals[g] = total;
  }
  // Four outputs at a time, and as many threads to them as there are to spare.
  const int fours = s.group * D / 4, at_once = min(fours, kAttendBlock);
  const int threads = kAttendBlock / at_once, turn = thread / at_once;
  for (int first = 0; first < fours; first += at_once) {
    const int four = first + thread % at_once;
    const bool works = turn < threads && four < fours;
    float4 sum4 = make_float4(0, 0, 0, 0);
    if (works) {
#pragma unroll 8
      for (int b = turn; b < blocks; b += threads) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(
            p.scratch.partial + (first_block + static_cast<std::int64_t>(b) * heads) * D +
            four * 4));
        sum4.x += part.x;
        sum4.y += part.y;
        sum4.z += part.z;
        sum4.w += part.w;
      }
    }
    parts[thread] = sum4;
    __syncthreads();
    if (works && turn == 0) {
      for (int other = 1; other < threads; ++other) {
        const float4 part = parts[thread + other * at_once];
        sum4.x += part.x;
        sum4.y += part.y;
        sum4.z += part.z;
        sum4.w += part.w;
      }
      const float total = totals[four * 4 / D];
      out[four * 4] = from_float<T>(sum4.x / total);
      out[four * 4 + 1] = from_float<T>(sum4.y / total);
      out[four * 4 + 2] = from_float<T>(sum4.z / total);
      out[four * 4 + 3] = from_float<T>(sum4.w / total);
    }
    __syncthreads();
  }
  if (thread == 0) p.layer.lengths[x] = length + 1;
}

}  // namespace icecache::gpu

// attend: rows and nodes, split over blocks. Device code.
#pragma once

#include "cuda/attend_sums.h"
#include "cuda/step_common.h"

namespace icecache::gpu {

constexpr int kAttendBlock = 128;
constexpr int kAttendStages = 4;  // of a warp: all but one are under way while that is added up
constexpr int kMaxEntries = kMaxNear + 2 * kMaxCandidates;

// Four outputs of some blocks, and the weights in them.
struct AttendPart {
  float4 values;
  float weight;
  __device__ __forceinline__ void add(float4 more_values, float more_weight) {
    values += more_values;
    weight += more_weight;
  }
};

// The outputs of a pair [G, D] from the sums of its `blocks` blocks, which begin with that of number
// `first_sum` of all, in a fixed order, each times scale(block, head). `room`: shared,
// [kAttendBlock]. Four outputs at a time, and as many threads to them as there are to spare.
template <typename T, int D, typename Scale>
__device__ __forceinline__ void merge_blocks(const StepParams& p, std::int64_t first_sum,
                                             int blocks, T* out, AttendPart* room,
                                             const Scale& scale) {
  constexpr int kAtOnce = 8;  // parts whose loads are under way at once
  const int thread = threadIdx.x, group = p.shape.group, heads = p.shape.padded_group();
  const int fours = group * D / 4, at_once = min(fours, kAttendBlock);
  const int threads = kAttendBlock / at_once, turn = thread / at_once;
  const std::int64_t first_block = first_sum * heads;
  for (int first = 0; first < fours; first += at_once) {
    const int four = first + thread % at_once, head = four * 4 / D;
    const bool works = turn < threads && four < fours;
    AttendPart part = {make_float4(0, 0, 0, 0), 0.0f};
    for (int first_part = turn; first_part < blocks; first_part += kAtOnce * threads) {
      float4 values[kAtOnce];
      float weights[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int block = first_part + k * threads;
        const bool there = works && block < blocks;
        const std::int64_t at = first_block + static_cast<std::int64_t>(block) * heads;
        const auto* sums = reinterpret_cast<const float4*>(p.scratch.partial + at * D) + four;
        values[k] = there ? __ldcg(sums) : make_float4(0, 0, 0, 0);
        weights[k] = there ? __ldcg(p.scratch.partial_sum + at + head) : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float by = scale(min(first_part + k * threads, blocks - 1), head);
        part.add(
            make_float4(values[k].x * by, values[k].y * by, values[k].z * by, values[k].w * by),
            weights[k] * by);
      }
    }
    room[thread] = part;
    __syncthreads();
    if (works && turn == 0) {
      for (int other = 1; other < threads; ++other) {
        const AttendPart& more = room[thread + other * at_once];
        part.add(more.values, more.weight);
      }
      out[four * 4] = from_float<T>(part.values.x / part.weight);
      out[four * 4 + 1] = from_float<T>(part.values.y / part.weight);
      out[four * 4 + 2] = from_float<T>(part.values.z / part.weight);
      out[four * 4 + 3] = from_float<T>(part.values.w / part.weight);
    }
    __syncthreads();
  }
}

// What a block adds up for one pair and kHeads of its heads: its share of the nodes, then of the
// entries. Tiles: fours of heads that it takes. Values go from memory to shared memory without
// registers between (docs/cuda.md).
template <typename T, int D, int Tiles>
struct AttendShare {
  using Shape = RowShape<T, D>;
  using Stage = AttendStage<T, D, Tiles>;
  static constexpr int kHeads = Tiles * kHeadTile, kWarps = kAttendBlock / kWarp;
  static constexpr int kRows = Stage::kRows, kStages = kAttendStages;

  const StepParams& p;
  const int x, block, blocks, heads, first_head;
  Stage* const ring;   // [kStages] of this warp
  int* const entries;  // [kMaxEntries] of the block; ~row where the value is missing
  const int lane, warp;
  const int own = lane / Shape::kLanes, within = lane % Shape::kLanes;
  T* const row_values =
      static_cast<T*>(p.layer.row_values) + static_cast<std::int64_t>(x) * p.shape.rows() * D;
  // Nodes, and then entries: how many, their weights, and the first of them.
  int items = 0;
  const float* weights = nullptr;
  int first_node = 0, entry0 = 0;
  float4 sum = make_float4(0, 0, 0, 0);  // of the weights that the lane copied
  AttendSums<T, D, Tiles> values_of_heads = {};

  // The index of the first item that belongs to block `of`, when `all` items are split evenly over
  // the blocks. The product fits 32 bits: there are fewer than 2^26 items and at most 16 blocks.
  __device__ __forceinline__ int share(int all, int of) const {
    return static_cast<int>(static_cast<unsigned>(all * of) / static_cast<unsigned>(blocks));
  }

  // Nodes are split by whole stages, so that all nodes of a stage lie in one chunk.
  __device__ __forceinline__ void take_nodes(int all_nodes) {
    const int all_stages = (all_nodes + kRows - 1) / kRows;
    first_node = share(all_stages, block) * kRows;
    items = min(share(all_stages, block + 1) * kRows, all_nodes) - first_node;
    weights =
        p.scratch.mass + (static_cast<std::int64_t>(x) * p.shape.nodes() + first_node) * heads;
  }

  // Waits for pick, which ran beside the nodes.
  __device__ __forceinline__ void take_entries() {
    wait_for_earlier_kernel();
    const int all = p.scratch.entry_count[x], first = share(all, block);
    items = share(all, block + 1) - first;
    entry0 = x * p.shape.entries() + first;
    weights = p.scratch.entry_weights + static_cast<std::int64_t>(entry0) * heads;
#pragma unroll 1
    for (int e = threadIdx.x; e < items; e += kAttendBlock) {
      const int row = p.scratch.entry_rows[entry0 + e];
      entries[e] = p.scratch.entry_sources[entry0 + e] < 0 ? row : ~row;
    }
    scale();
    __syncthreads();
  }

  // Nodes weigh over exp(lse), entries over the largest of it and all logits.
  __device__ __forceinline__ void scale() {
    const float* far_scale = p.scratch.far_scale + static_cast<std::int64_t>(x) * heads;
    const auto by = [&](int g) {
      return first_head + g < heads ? far_scale[first_head + g] : 0.0f;
    };
    values_of_heads.scale(by);
    const int tile = lane % Tiles * kHeadTile;
    sum.x *= by(tile);
    sum.y *= by(tile + 1);
    sum.z *= by(tile + 2);
    sum.w *= by(tile + 3);
  }

  __device__ __forceinline__ void copy_row(Stage& stage, int u, const T* from, bool there) const {
#pragma unroll
    for (int j = 0; j < Shape::kPerLane; ++j) {
      const int v = Shape::vector(within, j);
      copy_async(stage.vector(u * Shape::kRows + own, v),
                 vectors_of(from) +
                     (Shape::kVectors % Shape::kLanes == 0 ? v : min(v, Shape::kVectors - 1)),
                 there);
    }
  }
  __device__ __forceinline__ void copy_weights(Stage& stage, int first) const {
    if (lane >= kRows * Tiles) return;
    const int item = first + lane / Tiles, head = first_head + lane % Tiles * kHeadTile;
    const bool there = item < items && head < heads;
    copy_async(stage.weights + lane, weights + (there ? item * heads + head : 0), there);
  }
  // What is past the last is zeros.
  __device__ __forceinline__ void ask_means(Stage& stage, int first) const {
    const T* means = mean_of<T>(p.shape, p.layer, x, first_node + first, D);
#pragma unroll
    for (int u = 0; u < Stage::kUnroll; ++u) {
      const int row = u * Shape::kRows + own;
      copy_row(stage, u, means + row * D, first + row < items);
    }
    copy_weights(stage, first);
  }
  __device__ __forceinline__ void ask_entries(Stage& stage, int first) const {
    const StepShape& s = p.shape;
#pragma unroll 1
    for (int u = 0; u < Stage::kUnroll; ++u) {
      const int row = first + u * Shape::kRows + own;
      const int item = min(row, items - 1), entry = entries[item];
      const T* from =
          entry < 0 ? host_value<T>(p.shape, p.layer, x, p.scratch.entry_sources[entry0 + item], D)
          : entry < s.rows() ? row_values + static_cast<std::int64_t>(entry) * D
                             : mean_of<T>(s, p.layer, x, entry - s.rows(), D);
      copy_row(stage, u, from, row < items);
    }
    copy_weights(stage, first);
  }
  // Values that came from host memory stay.
  __device__ __forceinline__ void keep(const Stage& stage, int first) const {
    if (blockIdx.z != 0) return;
#pragma unroll 1
    for (int u = 0; u < Stage::kUnroll; ++u) {
      const int row = first + u * Shape::kRows + own;
      if (row >= items || entries[row] >= 0) continue;
      uint4* to =
          reinterpret_cast<uint4*>(row_values + static_cast<std::int64_t>(~entries[row]) * D);
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) to[v] = *stage.vector(u * Shape::kRows + own, v);
      }
    }
  }

  // Adds up the items; each warp takes every kWarps-th stage of them.
  __device__ __forceinline__ void add_items(bool of_entries) {
#pragma unroll 1
    for (int asked = 0;; ++asked) {
      // What is added up is kStages - 1 behind what is asked for.
      const int first = (warp + (asked - (kStages - 1)) * kWarps) * kRows;
      if (first >= items) break;
      wait_for_copies<kStages - 2>();
      __syncwarp();  // what other lanes copied is there; none reads the stage that is free
      const int next = (warp + asked * kWarps) * kRows;
      Stage& free = ring[asked % kStages];
      if (next < items) {
        if (of_entries) {
          ask_entries(free, next);
        } else {
          ask_means(free, next);
        }
      }
      end_copies();
      if (first < 0) continue;
      const Stage& stage = ring[(asked + 1) % kStages];
      values_of_heads.add(stage);
      if (lane < kRows * Tiles) sum += stage.weights[lane];
      if (of_entries) keep(stage, first);
    }
  }

  // The warp's sums: of values [kHeads, D], which take its stages' place, and of weights [kHeads].
  __device__ __forceinline__ void store(float* weights_of_heads) {
    wait_for_copies<0>();
    __syncwarp();
    for (int offset = Tiles; offset < kWarp; offset *= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, offset);
      sum.y += __shfl_xor_sync(~0u, sum.y, offset);
      sum.z += __shfl_xor_sync(~0u, sum.z, offset);
      sum.w += __shfl_xor_sync(~0u, sum.w, offset);
    }
    if (lane < Tiles) *reinterpret_cast<float4*>(weights_of_heads + lane * kHeadTile) = sum;
    values_of_heads.store(reinterpret_cast<float*>(ring));
  }
};

// Blocks that share a pair's rows and nodes: of the grid's as many as have enough to do.
__device__ __forceinline__ int attend_blocks_of(const StepParams& p, int x, int tokens, int nodes) {
  const int found = index_tokens(p.shape, tokens) > 0 ? static_cast<int>(p.scratch.found[x]) : 0;
  const int least_entries = near_count(p.shape, tokens) + min(p.shape.select_tokens, found);
  return max(1, min(static_cast<int>(gridDim.x),
                    (least_entries + nodes + kAttendLeast - 1) / kAttendLeast));
}

// 1. Blocks that have nothing to do, and pairs that answer without attention, end here.
// 2. Nodes are added up while pick still runs, then the entries that it writes.
// 3. The sums of the warps become the block's, in memory.
// 4. The last block of the pair merges them, in the order of the blocks, and the pair has one more
//    token.
template <typename T, int D, int Tiles>
__global__ void __launch_bounds__(kAttendBlock, attend_resident(Tiles))
    attend_kernel(const StepParams p) {
  using Share = AttendShare<T, D, Tiles>;
  using Stage = typename Share::Stage;
  constexpr int kHeads = Share::kHeads, kWarps = Share::kWarps, kStages = kAttendStages;
  static_assert(kHeads * D * sizeof(float) <= sizeof(Stage) * kStages);
  __shared__ Stage stages_of_warps[kWarps][kStages];
  __shared__ int entries[kMaxEntries];
  __shared__ float sums[kWarps][kHeads];
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int input = input_of(p, x), length = length_of(p, x);
  const int tokens = is_idle(length) ? -1 : length;
  const int heads = s.padded_group(), first_head = blockIdx.z * kHeads;
  const int nodes = s.tail ? (index_tokens(s, tokens) + s.far_node_tokens - 1) >> s.far_shift() : 0;
  const int block = blockIdx.x, blocks = attend_blocks_of(p, x, tokens, nodes);
  // The pair's input is read again where it is needed: it takes no register meanwhile.
  const auto output = [&] {
    return static_cast<T*>(p.out) + static_cast<std::int64_t>(input_of(p, x)) * s.group * D;
  };

  // 1.
  const bool takes_part = input >= 0 && block < blocks && length != kResident;
  if (!takes_part || is_idle(length)) {
    wait_for_earlier_kernel();
    if (!takes_part || blockIdx.z != 0) return;
    T* out = output();
    const T value = from_float<T>(length < 0 ? 0.0f : NAN);
    for (int i = thread; i < s.group * D; i += kAttendBlock) out[i] = value;
    return;
  }

  // 2. Loops over stages are not unrolled: code that is run once is slow to come.
  Share share{p, x, block, blocks, heads, first_head, stages_of_warps[warp], entries, lane, warp};
  share.take_nodes(nodes);
#pragma unroll 1
  for (int of_entries = 0; of_entries < 2; ++of_entries) {
    if (of_entries) share.take_entries();
    share.add_items(of_entries);
  }

  // 3.
  share.store(sums[warp]);
  __syncthreads();
  const std::int64_t block0 =
      (static_cast<std::int64_t>(x) * gridDim.x + block) * heads + first_head;
  const int own_heads = min(kHeads, heads - first_head);
  for (int i = thread; i < own_heads * D / 4; i += kAttendBlock) {
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total += reinterpret_cast<const float4*>(stages_of_warps[w])[i];
    }
    reinterpret_cast<float4*>(p.scratch.partial + block0 * D)[i] = total;
  }
  if (thread < own_heads) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[w][thread];
    p.scratch.partial_sum[block0 + thread] = total;
  }

  // 4.
  if (!is_last_block(p.scratch.blocks_done + x, blocks * gridDim.z)) return;
  merge_blocks<T, D>(p, static_cast<std::int64_t>(x) * gridDim.x, blocks, output(),
                     reinterpret_cast<AttendPart*>(stages_of_warps), [](int, int) { return 1.0f; });
  if (thread == 0) p.layer.lengths[x] = length_of(p, x) + 1;
}

}  // namespace icecache::gpu

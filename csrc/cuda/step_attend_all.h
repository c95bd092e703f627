// attend_all: full attention of resident sequences, over the keys and values in their extents,
// split over blocks (flash decoding). Device code.
#pragma once

#include "cuda/step_attend.h"

namespace icecache::gpu {

constexpr int kAttendAllStages = 2;  // of a warp: one is under way while the other is added up

// A stage of attend, with the keys that its weights come from.
template <typename T, int D, int Tiles>
struct AttendAllStage : AttendStage<T, D, Tiles> {
  using Base = AttendStage<T, D, Tiles>;
  uint4 keys[Base::kRows][Base::kRoom];
  __device__ __forceinline__ uint4* key(int row, int v) { return keys[row] + (v ^ row % 8); }
  __device__ __forceinline__ const uint4* key(int row, int v) const {
    return keys[row] + (v ^ row % 8);
  }
};

// Sums of each of N values over the Lanes lanes of a row, N <= Lanes. Lane `within` of them returns
// the sum of values[within / (Lanes / N)]. `values` is overwritten.
template <int N, int Lanes>
__device__ __forceinline__ float row_sums(float* values) {
  static_assert(N <= Lanes);
  return warp_sums<N, Lanes / 2>(values);
}

// Shared memory of a block. Tiles: fours of heads that it takes.
template <typename T, int D, int Tiles>
struct AttendAllMemory {
  using Stage = AttendAllStage<T, D, Tiles>;
  static constexpr int kHeads = Tiles * kHeadTile, kWarps = kAttendBlock / kWarp;
  Stage stages[kWarps][kAttendAllStages];
  float queries[kHeads * D];  // scaled, for logits in base 2
  // Of each warp; the largest become factors when all are known.
  float largest[kWarps][kHeads], sums[kWarps][kHeads], factors[kWarps][kHeads];
};

// The part of a pair's attention that one warp computes: a block's tokens are cut into stages, and
// each warp takes every kWarps-th of these. Its sums of weights and of values are relative to the
// largest logit that it has seen so far.
template <typename T, int D, int Tiles>
struct AttendAllWarp {
  using Shape = RowShape<T, D>;
  using Memory = AttendAllMemory<T, D, Tiles>;
  using Stage = typename Memory::Stage;
  static constexpr int kRows = Stage::kRows, kUnroll = Stage::kUnroll, kWarps = Memory::kWarps;
  static constexpr int kWeighed = kRows * Tiles;  // lanes with a row's four weights
  static_assert(kExtentTokens % kRows == 0, "a stage lies in one extent");

  const StepParams& p;
  Memory& shared;
  const int x, lane, warp;
  const int first_token, items;  // of the block
  const int own = lane / Shape::kLanes, within = lane % Shape::kLanes;
  float4 largest = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  float4 sum = make_float4(0, 0, 0, 0);  // of the weights that are this lane's
  AttendSums<T, D, Tiles> values_of_heads = {};

  // Asks for keys and values; those past the last are zeros.
  __device__ __forceinline__ void ask(Stage& stage, int first) const {
    const T* keys = extent_key<T>(p.shape, p.layer, x, first_token + first, D);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = u * Shape::kRows + own;
      const bool there = first + row < items;
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        const int from = Shape::kVectors % Shape::kLanes == 0 ? v : min(v, Shape::kVectors - 1);
        copy_async(stage.key(row, v), vectors_of(keys + row * D) + from, there);
        copy_async(stage.vector(row, v), vectors_of(keys + (kExtentTokens + row) * D) + from,
                   there);
      }
    }
  }

  // Logits of the stage's tokens, in place of their weights. A query's vector is read once for all
  // of a lane's rows.
  __device__ __forceinline__ void score(Stage& stage) const {
    constexpr int kSums = kUnroll * kHeadTile;
    constexpr int kAtOnce = kSums < Shape::kLanes ? kSums : Shape::kLanes;
    constexpr int kAlike = Shape::kLanes / kAtOnce;  // lanes that get the same sum
#pragma unroll 1
    for (int t = 0; t < Tiles; ++t) {
      float sums[kSums] = {};
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v >= Shape::kVectors) continue;
        float keys[kUnroll][Shape::kCount];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          Vector<T>{*stage.key(u * Shape::kRows + own, v)}.unpack(keys[u]);
        }
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) {
          const float* query = shared.queries + (t * kHeadTile + g) * D + v * Shape::kCount;
#pragma unroll
          for (int i = 0; i < Shape::kCount; ++i) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) sums[u * kHeadTile + g] += query[i] * keys[u][i];
          }
        }
      }
#pragma unroll
      for (int first = 0; first < kSums; first += kAtOnce) {
        const float logit = row_sums<kAtOnce, Shape::kLanes>(sums + first);
        const int at = first + within / kAlike, row = at / kHeadTile * Shape::kRows + own;
        if (within % kAlike == 0) {
          reinterpret_cast<float*>(stage.weights + row * Tiles + t)[at % kHeadTile] = logit;
        }
      }
    }
  }

  // Weights in place of the logits: a lane has four heads of a row. Where a logit is above all
  // before it, the sums so far are made relative to it.
  __device__ __forceinline__ void weigh(Stage& stage, int first) {
    const bool weighs = lane < kWeighed, there = weighs && first + lane / Tiles < items;
    const float4 none = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    const float4 logit = there ? stage.weights[lane] : none;
    float4 high = logit;
#pragma unroll
    for (int offset = Tiles; offset < kWeighed; offset *= 2) {
      high.x = fmaxf(high.x, __shfl_xor_sync(~0u, high.x, offset));
      high.y = fmaxf(high.y, __shfl_xor_sync(~0u, high.y, offset));
      high.z = fmaxf(high.z, __shfl_xor_sync(~0u, high.z, offset));
      high.w = fmaxf(high.w, __shfl_xor_sync(~0u, high.w, offset));
    }
    const bool rises = weighs && (high.x > largest.x || high.y > largest.y || high.z > largest.z ||
                                  high.w > largest.w);
    if (__ballot_sync(~0u, rises) != 0) {
      const float4 top = make_float4(fmaxf(high.x, largest.x), fmaxf(high.y, largest.y),
                                     fmaxf(high.z, largest.z), fmaxf(high.w, largest.w));
      const float4 by = make_float4(factor(largest.x, top.x), factor(largest.y, top.y),
                                    factor(largest.z, top.z), factor(largest.w, top.w));
      float* factors = shared.factors[warp];
      if (lane < Tiles) *reinterpret_cast<float4*>(factors + lane * kHeadTile) = by;
      __syncwarp();
      values_of_heads.scale([&](int g) { return factors[g]; });
      sum.x *= by.x;
      sum.y *= by.y;
      sum.z *= by.z;
      sum.w *= by.w;
      largest = top;
    }
    if (!weighs) return;
    const float4 weight =
        make_float4(power_of_two(logit.x - largest.x), power_of_two(logit.y - largest.y),
                    power_of_two(logit.z - largest.z), power_of_two(logit.w - largest.w));
    stage.weights[lane] = there ? weight : make_float4(0, 0, 0, 0);
    if (there) sum += weight;
  }

  // What sums that are relative to `from` are multiplied by to be so to `to`; where there are no
  // sums yet, `from` is -inf.
  __device__ __forceinline__ static float factor(float from, float to) {
    return from == -INFINITY ? 0.0f : power_of_two(from - to);
  }

  __device__ __forceinline__ void add_tokens() {
    Stage* const ring = shared.stages[warp];
#pragma unroll 1
    for (int asked = 0;; ++asked) {
      // What is added up is one stage behind what is asked for.
      const int first = (warp + (asked - 1) * kWarps) * kRows;
      if (first >= items) break;
      wait_for_copies<0>();
      __syncwarp();  // what other lanes copied is there; none reads the stage that is free
      const int next = (warp + asked * kWarps) * kRows;
      if (next < items) ask(ring[asked % kAttendAllStages], next);
      end_copies();
      if (first < 0) continue;
      Stage& stage = ring[(asked + 1) % kAttendAllStages];
      score(stage);
      __syncwarp();
      weigh(stage, first);
      __syncwarp();
      values_of_heads.add(stage);
    }
  }

  // The warp's sums: of values [kHeads, D], which take its stages' place, and of weights [kHeads].
  __device__ __forceinline__ void store() {
    wait_for_copies<0>();
    __syncwarp();
#pragma unroll
    for (int offset = Tiles; offset < kWarp; offset *= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, offset);
      sum.y += __shfl_xor_sync(~0u, sum.y, offset);
      sum.z += __shfl_xor_sync(~0u, sum.z, offset);
      sum.w += __shfl_xor_sync(~0u, sum.w, offset);
    }
    if (lane < Tiles) {
      *reinterpret_cast<float4*>(shared.sums[warp] + lane * kHeadTile) = sum;
      *reinterpret_cast<float4*>(shared.largest[warp] + lane * kHeadTile) = largest;
    }
    values_of_heads.store(reinterpret_cast<float*>(shared.stages[warp]));
  }
};

// The block's queries, of heads from first_head on; those beyond the group are 0.
template <typename T, int D, int Tiles>
__device__ __forceinline__ void load_attend_all_queries(const StepParams& p, int input,
                                                        int first_head, float* queries) {
  constexpr int kCount = Vector<T>::kCount, kVectors = D / kCount;
  constexpr float kLog2OfE = 1.44269504f;
  const StepShape& s = p.shape;
  const uint4* from =
      vectors_of(static_cast<const T*>(p.queries) + static_cast<std::int64_t>(input) * s.group * D);
  const float scale = s.scale * kLog2OfE;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tiles * kHeadTile * kVectors; i += kAttendBlock) {
    float query[kCount] = {};
    if (first_head + i / kVectors < s.group)
      Vector<T>{from[first_head * kVectors + i]}.unpack(query);
#pragma unroll
    for (int j = 0; j < kCount; ++j) queries[i * kCount + j] = query[j] * scale;
  }
}

// The warps' sums become the block's, in memory: number `own_sum` of all.
template <typename T, int D, int Tiles>
__device__ __forceinline__ void store_attend_all(const StepParams& p,
                                                 AttendAllMemory<T, D, Tiles>& shared,
                                                 std::int64_t own_sum, int first_head) {
  using Memory = AttendAllMemory<T, D, Tiles>;
  using Warp = AttendAllWarp<T, D, Tiles>;
  constexpr int kHeads = Memory::kHeads, kWarps = Memory::kWarps;
  const int thread = threadIdx.x, heads = p.shape.padded_group();
  const int own_heads = min(kHeads, heads - first_head);
  const std::int64_t at = own_sum * heads + first_head;
  if (thread < own_heads) {
    float top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.largest[w][thread]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float by = Warp::factor(shared.largest[w][thread], top);
      shared.factors[w][thread] = by;
      total += shared.sums[w][thread] * by;
    }
    p.scratch.partial_sum[at + thread] = total;
    p.scratch.partial_max[at + thread] = top;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < own_heads * D / 4; i += kAttendBlock) {
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = reinterpret_cast<const float4*>(shared.stages[w])[i];
      const float by = shared.factors[w][i * 4 / D];
      total += make_float4(part.x * by, part.y * by, part.z * by, part.w * by);
    }
    reinterpret_cast<float4*>(p.scratch.partial + at * D)[i] = total;
  }
}

// factors [blocks, H]: what the sums of each block of a pair, from number `first_sum` on, are
// multiplied by. A warp for each head; all threads of the block call it.
__device__ __forceinline__ void attend_all_factors(const StepParams& p, std::int64_t first_sum,
                                                   int blocks, float* factors) {
  static_assert(kAttendAllMost == 2 * kWarp, "two blocks to a lane");
  const int lane = threadIdx.x % kWarp, heads = p.shape.padded_group();
  const float* largest = p.scratch.partial_max + first_sum * heads;
#pragma unroll 1
  for (int g = threadIdx.x / kWarp; g < heads; g += kAttendBlock / kWarp) {
    float of_block[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int block = lane + k * kWarp;
      of_block[k] = block < blocks ? __ldcg(largest + block * heads + g) : -INFINITY;
    }
    const float top = warp_max(fmaxf(of_block[0], of_block[1]));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      factors[(lane + k * kWarp) * heads + g] =
          of_block[k] == -INFINITY ? 0.0f : power_of_two(of_block[k] - top);
    }
  }
  __syncthreads();
}

// 1. Blocks of sequences that are not resident, and those that have nothing to do, end here.
// 2. Each warp adds up its tokens, the new one among them.
// 3. The sums of the warps become the block's, in memory.
// 4. The last block of the token merges them, in the order of the blocks.
// 5. That of the step's last token says that the pair has all of them.
//
// Tokens of a step differ in their queries and in how many keys they see: blocks that read the same
// keys for them stand next to each other, so that one of them brings these keys to the second-level
// cache. How one token's keys are shared out to blocks depends on that token alone, so that its
// answer does, too.
template <typename T, int D, int Tiles>
__global__ void __launch_bounds__(kAttendBlock, attend_all_resident(Tiles, D))
    attend_all_kernel(const StepParams p) {
  using Memory = AttendAllMemory<T, D, Tiles>;
  using Stage = typename Memory::Stage;
  __shared__ Memory shared;
  static_assert(Memory::kHeads * D * sizeof(float) <= sizeof(Stage) * kAttendAllStages);
  static_assert(
      kAttendBlock * sizeof(AttendPart) + (kAttendAllMost + 1) * kMaxStepGroup * sizeof(float) <=
          sizeof(shared.stages),
      "the merge takes the stages' place");
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x;
  const int block = static_cast<int>(blockIdx.x) / p.tokens;
  const int token = static_cast<int>(blockIdx.x) - block * p.tokens;
  const int most = static_cast<int>(gridDim.x) / p.tokens;
  const std::int64_t place = static_cast<std::int64_t>(token) * s.pairs() + x;

  // 1.
  const int length = p.scratch.resident_lengths[place];
  if (length < 0) return;
  const int tokens = length + 1;
  const int blocks = min(most, (tokens + kAttendLeast - 1) / kAttendLeast);
  const int first_head = blockIdx.z * Memory::kHeads;
  if (block >= blocks) return;

  // 2. Each block gets a number of whole stages (as many tokens as a warp takes at once), which are
  // shorter than an extent and never cross from one to the next.
  const int stages = (tokens + Stage::kRows - 1) / Stage::kRows;
  const auto share = [&](int of) {
    return static_cast<int>(static_cast<std::int64_t>(stages) * of / blocks) * Stage::kRows;
  };
  const int first = share(block);
  load_attend_all_queries<T, D, Tiles>(p, p.scratch.inputs[place], first_head, shared.queries);
  __syncthreads();
  AttendAllWarp<T, D, Tiles> warp{
      p, shared, x, thread % kWarp, thread / kWarp, first, min(share(block + 1), tokens) - first};
  warp.add_tokens();

  // 3.
  warp.store();
  __syncthreads();
  store_attend_all(p, shared, place * most + block, first_head);

  // 4.
  if (!is_last_block(p.scratch.blocks_done + place, blocks * gridDim.z)) return;
  auto* room = reinterpret_cast<AttendPart*>(shared.stages);
  auto* factors = reinterpret_cast<float*>(room + kAttendBlock);
  attend_all_factors(p, place * most, blocks, factors);
  const int heads = s.padded_group();
  T* out =
      static_cast<T*>(p.out) + static_cast<std::int64_t>(p.scratch.inputs[place]) * s.group * D;
  merge_blocks<T, D>(p, place * most, blocks, out, room,
                     [&](int of, int head) { return factors[of * heads + head]; });

  // 5.
  if (thread != 0) return;
  for (int later = token + 1; later < p.tokens; ++later) {
    if (p.scratch.resident_lengths[static_cast<std::int64_t>(later) * s.pairs() + x] >= 0) return;
  }
  p.layer.counters[static_cast<std::int64_t>(x) * kCounters + 4] += tokens - p.layer.lengths[x];
  p.layer.lengths[x] = tokens;
  p.layer.resident[x] = tokens;
}

}  // namespace icecache::gpu

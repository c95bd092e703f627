// scan: a block for each chunk of kChunkTokens tokens of a pair. rank, choose: each pair has as
// many blocks as run at once, which take its chunks by turns. Device code.
#pragma once

#include <climits>

#include "cuda/step_common.h"

namespace icecache::gpu {

constexpr int kScanSteps = kChunkTokens / kBlock;
constexpr float kLog2E = 1.44269504f;
// Blocks that a multiprocessor of most devices holds at once.
constexpr int kRankBlocks = 8, kChooseBlocks = 4;

template <int Words>
__global__ void __launch_bounds__(kBlock) scan_kernel(const StepParams p) {
  constexpr int kWarps = kBlock / kWarp, kShift = Words == 4 ? 1 : 2;
  __shared__ int queries[kMaxGroup * Words * 2];
  __shared__ int room[kWarps][kHeadTile];
  __shared__ float sums[kWarps][kHeadTile];
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  // Asked for before it is known whether it is there: one wait less.
  const uint4* codes =
      reinterpret_cast<const uint4*>(chunk_part(s, p.layer, x, static_cast<int>(blockIdx.x)));
  if (is_idle(length)) return;
  const int count = index_tokens(s, length), begin = blockIdx.x * kChunkTokens;
  if (begin >= count) return;
  const int heads = s.padded_group();
  uint4 cells[kScanSteps][Words / 4];
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    const int in_chunk = k * kBlock + thread;
#pragma unroll
    for (int w = 0; w < Words / 4; ++w) {
      cells[k][w] =
          begin + in_chunk < count ? codes[in_chunk * (Words / 4) + w] : make_uint4(0, 0, 0, 0);
    }
  }
  const int* from = reinterpret_cast<const int*>(p.scratch.query_codes) +
                    static_cast<std::int64_t>(x) * heads * Words * 2;
  for (int i = thread; i < heads * Words * 2; i += kBlock) queries[i] = from[i];
  const float unit = p.scratch.unit[x] * kLog2E;
  __syncthreads();
  for (int tile = 0; tile < heads; tile += kHeadTile) {
    int scores[kScanSteps][kHeadTile] = {};
#pragma unroll
    for (int w = 0; w < Words; ++w) {
      int even_query[kHeadTile], odd_query[kHeadTile];
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        even_query[g] = queries[((tile + g) * Words + w) * 2];
        odd_query[g] = queries[((tile + g) * Words + w) * 2 + 1];
      }
#pragma unroll
      for (int k = 0; k < kScanSteps; ++k) {
        const uint4 cell = cells[k][w / 4];
        const unsigned word = w % 4 == 0   ? cell.x
                              : w % 4 == 1 ? cell.y
                              : w % 4 == 2 ? cell.z
                                           : cell.w;
        const int even = static_cast<int>(word & 0x0f0f0f0fu);
        const int odd = static_cast<int>(word >> 4 & 0x0f0f0f0fu);
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) {
          scores[k][g] = __dp4a(even, even_query[g], __dp4a(odd, odd_query[g], scores[k][g]));
        }
      }
    }
    int largest[kHeadTile] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN};
    short4* out =
        reinterpret_cast<short4*>(p.scratch.scores) +
        (static_cast<std::int64_t>(x) * (heads / kHeadTile) + tile / kHeadTile) * s.token_room;
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      const int token = begin + k * kBlock + thread;
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        scores[k][g] >>= kShift;
        if (token < count) largest[g] = max(largest[g], scores[k][g]);
      }
      if (token < count) {
        out[token] =
            make_short4(static_cast<short>(scores[k][0]), static_cast<short>(scores[k][1]),
                        static_cast<short>(scores[k][2]), static_cast<short>(scores[k][3]));
      }
    }
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      largest[g] = warp_max(largest[g]);
      if (lane == 0) room[warp][g] = largest[g];
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) largest[g] = max(largest[g], room[w][g]);
    }
    float sum[kHeadTile] = {};
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      const bool counts = begin + k * kBlock + thread < count;
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        const float weight = power_of_two(unit * small_to_float(scores[k][g] - largest[g]));
        sum[g] += counts ? weight : 0.0f;
      }
    }
    const float of_warp = warp_sum_of_four(sum);
    if (lane % 8 == 0) sums[warp][lane / 8] = of_warp;
    __syncthreads();
    if (thread < kHeadTile) {
      float total = 0.0f;
      int high = INT_MIN;
      for (int w = 0; w < kWarps; ++w) {
        total += sums[w][thread];
        high = max(high, room[w][thread]);
      }
      const std::int64_t at =
          (static_cast<std::int64_t>(x) * s.chunks() + blockIdx.x) * heads + tile + thread;
      p.scratch.chunk_max[at] = high;
      p.scratch.chunk_sum[at] = total;
    }
    __syncthreads();
  }
}

// The tokens of a thread in a chunk, as rank and choose read them: a warp has 128 in a row, so that
// a far-field node is one warp's.
__device__ __forceinline__ int token_of(int begin, int k) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return begin + (warp * kScanSteps + k) * kWarp + lane;
}

// Scores of a token in four heads, as scan wrote them.
struct FourScores {
  int2 raw;
  __device__ __forceinline__ int operator[](int g) const {
    const int pair = g < 2 ? raw.x : raw.y;
    return g % 2 == 0 ? static_cast<short>(pair) : pair >> 16;
  }
};

// Scores of a thread's tokens for one tile of heads: all loads are under way before one is used.
__device__ __forceinline__ void load_scores(const StepShape& s, const short4* scores, int begin,
                                            int count, int tile, FourScores* four) {
  const int2* of_tile = reinterpret_cast<const int2*>(
      scores + static_cast<std::int64_t>(tile / kHeadTile) * s.token_room);
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    four[k].raw = of_tile[static_cast<unsigned>(min(token_of(begin, k), count - 1))];
  }
}

// How far the head that sees each of a thread's tokens best is above everything: a score less that
// of everything, `offset` [H], which is beyond reach where there is no such head. `four`: scores of
// the last tile of heads. Tokens past the last have any score.
__device__ __forceinline__ void best_scores(const StepShape& s, const short4* scores, int begin,
                                            int count, const int* offset, int* best,
                                            FourScores* four) {
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) best[k] = INT_MIN;
  for (int tile = 0; tile < s.group; tile += kHeadTile) {
    load_scores(s, scores, begin, count, tile, four);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      best[k] =
          max(best[k], max(max(four[k][0] - offset[tile], four[k][1] - offset[tile + 1]),
                           max(four[k][2] - offset[tile + 2], four[k][3] - offset[tile + 3])));
    }
  }
}

// Steps of 1 / kRanksPerNat below everything; `scale`: ranks of one score.
__device__ __forceinline__ float ranks_below(int best, float scale) {
  return -scale * small_to_float(best);
}

__device__ __forceinline__ int score_offset(float lse, float bias, float unit) {
  constexpr float kReach = (1 << 22) - (1 << 16);  // differences of scores are small integers
  return static_cast<int>(fminf(fmaxf(rintf((lse - bias) / unit), -kReach), kReach));
}
constexpr int kNoHead = 1 << 22;

static __global__ void __launch_bounds__(kBlock) rank_kernel(const StepParams p) {
  constexpr int kOwn = kRanks / kBlock;
  __shared__ std::uint32_t histogram[kRanks];
  __shared__ int offset[kMaxGroup];
  __shared__ int room[kBlock / kWarp + 1];
  __shared__ int last_rank;
  __shared__ bool is_last;
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (is_idle(length)) return;
  const int count = index_tokens(s, length), heads = s.padded_group();
  const int chunks = (count + kChunkTokens - 1) / kChunkTokens;
  if (static_cast<int>(blockIdx.x) >= max(chunks, 1)) return;
  const float unit = p.scratch.unit[x];
  const std::int64_t first = static_cast<std::int64_t>(x) * s.chunks() * heads;
  for (int i = thread; i < kRanks; i += kBlock) histogram[i] = 0;
  for (int g = warp; g < heads; g += kBlock / kWarp) {
    int high = INT_MIN;
    for (int i = lane; i < chunks; i += kWarp) {
      high = max(high, p.scratch.chunk_max[first + i * heads + g]);
    }
    high = warp_max(high);
    float sum = 0.0f;
    for (int i = lane; i < chunks; i += kWarp) {
      sum += p.scratch.chunk_sum[first + i * heads + g] *
             expf(unit * static_cast<float>(p.scratch.chunk_max[first + i * heads + g] - high));
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const std::int64_t head = static_cast<std::int64_t>(x) * heads + g;
      const float bias = p.scratch.bias[head];
      const float indexed =
          chunks > 0 ? bias + unit * static_cast<float>(high) + logf(sum) : -INFINITY;
      const float lse = log_add(indexed, p.scratch.near_lse[head]);
      offset[g] = g < s.group ? score_offset(lse, bias, unit) : kNoHead;
      if (blockIdx.x == 0) p.scratch.lse[head] = lse;
    }
  }
  __syncthreads();
  if (chunks == 0) return;
  const short4* scores = reinterpret_cast<const short4*>(p.scratch.scores) +
                         static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  const float scale = unit * kRanksPerNat;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int begin = chunk * kChunkTokens;
    int best[kScanSteps];
    FourScores four[kScanSteps];
    best_scores(s, scores, begin, count, offset, best, four);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      // The last rank holds all that is too far to matter: nobody counts it.
      const float below = ranks_below(best[k], scale);
      if (token_of(begin, k) < count && below < kRanks - 1.0f) {
        atomicAdd(histogram + static_cast<int>(fmaxf(below, 0.0f)), 1u);
      }
    }
  }
  __syncthreads();
  std::uint32_t* all = p.scratch.histogram + static_cast<std::int64_t>(x) * kRanks;
  for (int i = thread; i < kRanks; i += kBlock) {
    if (histogram[i] != 0) atomicAdd(all + i, histogram[i]);
  }

  // The last block decides. Candidates stand at ranks up to last_rank: the first rank by which
  // there are enough, or the one before it where that would be too many (ties, which nothing tells
  // apart).
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    is_last = atomicAdd(p.scratch.blocks_ranked + x, 1u) + 1 ==
              min(gridDim.x, static_cast<unsigned>(chunks));
    last_rank = count <= kMaxCandidates ? kRanks - 1 : kRanks - 2;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  int own[kOwn], sum = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = static_cast<int>(__ldcg(all + thread * kOwn + i));
    sum += own[i];
  }
  int before = block_scan(sum, room, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int through = before + own[i];
    if (before < s.candidates && through >= s.candidates) {
      last_rank = thread * kOwn + i - (through > kMaxCandidates ? 1 : 0);
    }
    before = through;
  }
  __syncthreads();
  if (thread == 0) p.scratch.last_rank[x] = last_rank;
}

// Steps: of 32 tokens to a far-field node.
template <int Steps>
__global__ void __launch_bounds__(kBlock, kChooseBlocks) choose_kernel(const StepParams p) {
  __shared__ int offset[kMaxGroup];
  __shared__ float shift[kMaxGroup];
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (is_idle(length)) return;
  const int count = index_tokens(s, length);
  if (static_cast<int>(blockIdx.x) * kChunkTokens >= count) return;
  const int heads = s.padded_group(), last_rank = p.scratch.last_rank[x];
  const float unit = p.scratch.unit[x], scale = unit * kRanksPerNat, in_bits = unit * kLog2E;
  if (thread < heads) {
    const std::int64_t head = static_cast<std::int64_t>(x) * heads + thread;
    const float bias = p.scratch.bias[head], lse = p.scratch.lse[head];
    offset[thread] = thread < s.group ? score_offset(lse, bias, unit) : kNoHead;
    shift[thread] = thread < s.group ? (bias - lse) * kLog2E : -INFINITY;
  }
  __syncthreads();
  const short4* scores = reinterpret_cast<const short4*>(p.scratch.scores) +
                         static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  const float limit = last_rank < kRanks - 1 ? static_cast<float>(last_rank + 1) : INFINITY;
  for (int begin = blockIdx.x * kChunkTokens; begin < count; begin += gridDim.x * kChunkTokens) {
    int best[kScanSteps];
    bool weighs[kScanSteps];  // in its node: neither a candidate nor past the last token
    FourScores four[kScanSteps];
    best_scores(s, scores, begin, count, offset, best, four);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      const int token = token_of(begin, k);
      const bool chosen = ranks_below(best[k], scale) < limit;
      weighs[k] = token < count && !chosen;
      if (token < count && chosen) {
        const std::uint32_t at = atomicAdd(p.scratch.found + x, 1u);
        p.scratch.tokens[x * kMaxCandidates + at] = token;
      }
    }
    if (!s.tail) continue;
    const int of_warp = begin + warp * kScanSteps * kWarp;  // its first token
    float* mass = p.scratch.mass +
                  (static_cast<std::int64_t>(x) * s.nodes() + of_warp / (Steps * kWarp)) * heads;
    // From the last tile on, whose scores are at hand.
    for (int tile = heads - kHeadTile; tile >= 0; tile -= kHeadTile) {
      if (tile != heads - kHeadTile) load_scores(s, scores, begin, count, tile, four);
      float weight[kHeadTile] = {};
#pragma unroll
      for (int k = 0; k < kScanSteps; ++k) {
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) {
          const float w = power_of_two(in_bits * small_to_float(four[k][g]) + shift[tile + g]);
          weight[g] += weighs[k] ? w : 0.0f;
        }
        if ((k + 1) % Steps != 0) continue;
        const float of_node = warp_sum_of_four(weight);
        if (lane % 8 == 0 && of_warp + (k + 1 - Steps) * kWarp < count) {
          mass[k / Steps * heads + tile + lane / 8] = of_node;
        }
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) weight[g] = 0.0f;
      }
    }
  }
}

}  // namespace icecache::gpu

// The kernels of step.h. Device code: seen by cuda_step.cu alone.
#pragma once

#include <climits>

#include "cuda/gpu.h"
#include "cuda/step.h"

namespace icecache::gpu {

constexpr int kBlock = 256;                 // threads of append, scan, rank, choose, rescore
constexpr int kPickBlock = kMaxCandidates;  // of resolve and pick: a thread for each candidate
constexpr int kAttendBlock = 256;
constexpr int kScanSteps = kScanTokens / kBlock;
// Blocks of the widest kernels that a multiprocessor holds at once; fp32 rows take more registers.
template <typename T>
constexpr int kLeastBlocks = sizeof(T) == 4 ? 1 : 2;
constexpr float kLargestExponent = 80.0f;
constexpr float kLog2E = 1.44269504f;

// Tokens of pair x before this step; < 0: no sequence there.
__device__ __forceinline__ int length_of(const StepParams& p, int x) {
  return p.layer.lengths[x];
}
__device__ __forceinline__ bool is_full(const StepShape& s, int length) {
  return length >= s.near_rows() + s.token_room;
}
__device__ __forceinline__ bool is_idle(const StepShape& s, int length) {
  return length < 0 || is_full(s, length);
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

template <typename T>
__device__ __forceinline__ T* host_key(const StepParams& p, int x, int token, int d) {
  const int s = p.shape.page_size;
  std::byte* page = p.layer.pages[static_cast<std::int64_t>(x) * p.shape.pages() + token / s];
  return reinterpret_cast<T*>(page) + (token % s) * d;
}
template <typename T>
__device__ __forceinline__ T* host_value(const StepParams& p, int x, int token, int d) {
  return host_key<T>(p, x, token, d) + p.shape.page_size * d;
}

// --- append: three blocks for each pair, which do not wait for each other
// -------------------------

// The token that leaves the window goes to its host page, and the new one takes its place.
template <typename T, int D>
__device__ void store_token(const StepParams& p, int x, int length) {
  using Shape = RowShape<T, D>;
  constexpr int kMaxRank = 64;
  __shared__ float key[D];
  __shared__ float slices[kBlock];
  __shared__ float projected[kMaxRank];
  const StepShape& s = p.shape;
  const int thread = threadIdx.x, rank = s.rank, row = near_row(s, length);
  const std::int64_t at = (static_cast<std::int64_t>(x) * s.rows() + row) * D;
  T* row_key = static_cast<T*>(p.layer.row_keys) + at;
  T* row_value = static_cast<T*>(p.layer.row_values) + at;
  const int displaced = length - s.near_rows();
  if (displaced >= 0) {
    const float* mean_key = p.layer.mean_key + static_cast<std::int64_t>(x) * D;
    if (thread < Shape::kVectors) {
      reinterpret_cast<uint4*>(host_key<T>(p, x, displaced, D))[thread] =
          vectors_of(row_key)[thread];
    } else if (thread < 2 * Shape::kVectors) {
      const int v = thread - Shape::kVectors;
      reinterpret_cast<uint4*>(host_value<T>(p, x, displaced, D))[v] = vectors_of(row_value)[v];
    }
    for (int d = thread; d < D; d += kBlock) {
      key[d] = to_float(row_key[d]) - mean_key[d];
      const int in_node = displaced % s.far_node_tokens;
      float* open = p.layer.open_sum + static_cast<std::int64_t>(x) * D + d;
      const float sum = (in_node == 0 ? 0.0f : *open) + to_float(row_value[d]);
      *open = sum;
      const std::int64_t node =
          static_cast<std::int64_t>(x) * s.nodes() + displaced / s.far_node_tokens;
      static_cast<T*>(p.layer.means)[node * D + d] =
          from_float<T>(divide(sum, static_cast<float>(in_node + 1)));
    }
    __syncthreads();
    const int per_slice = D * rank / kBlock, r = thread % rank, slice = thread / rank;
    const float* basis = p.layer.from_key + static_cast<std::int64_t>(x) * D * rank;
    float sum = 0.0f;
#pragma unroll 4
    for (int d = slice * per_slice; d < (slice + 1) * per_slice; ++d) {
      sum += key[d] * basis[d * rank + r];
    }
    slices[thread] = sum;
    __syncthreads();
    if (thread < rank) {
      for (int other = thread + rank; other < kBlock; other += rank) sum += slices[other];
      projected[thread] = sum;
    }
    __syncthreads();
    if (thread < s.words()) {
      const std::int64_t first = static_cast<std::int64_t>(x) * rank + thread * kCodesPerWord;
      p.layer
          .codes[(static_cast<std::int64_t>(x) * s.token_room + displaced) * s.words() + thread] =
          pack_codes(projected + thread * kCodesPerWord, p.layer.low + first, p.layer.step + first);
    }
  }
  __syncthreads();
  const T* new_key = static_cast<const T*>(p.keys) + static_cast<std::int64_t>(x) * D;
  const T* new_value = static_cast<const T*>(p.values) + static_cast<std::int64_t>(x) * D;
  for (int d = thread; d < D; d += kBlock) {
    row_key[d] = new_key[d];
    row_value[d] = new_value[d];
  }
}

// Queries of the pair's group [H, D], scaled; heads beyond the group are 0.
template <typename T, int D, int Threads>
__device__ __forceinline__ void load_queries(const StepParams& p, int x, float* queries) {
  const StepShape& s = p.shape;
  const T* from = static_cast<const T*>(p.queries) + static_cast<std::int64_t>(x) * s.group * D;
  for (int i = threadIdx.x; i < s.padded_group() * D; i += Threads) {
    queries[i] = i < s.group * D ? to_float(from[i]) * s.scale : 0.0f;
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

// Logits of sink and window, the new token among them, and the sum of their weights.
template <typename T, int D>
__device__ void score_near(const StepParams& p, int x, int length) {
  using Shape = RowShape<T, D>;
  constexpr int kWarps = kBlock / kWarp;
  __shared__ float query[kMaxGroup * D];
  __shared__ float4 logits[kMaxNear];
  const StepShape& s = p.shape;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int heads = s.padded_group(), near = near_count(s, length), newest = near_row(s, length);
  const T* rows =
      static_cast<const T*>(p.layer.row_keys) + static_cast<std::int64_t>(x) * s.rows() * D;
  const T* new_key = static_cast<const T*>(p.keys) + static_cast<std::int64_t>(x) * D;
  load_queries<T, D, kBlock>(p, x, query);
  __syncthreads();
  const int own = lane / Shape::kLanes, within = lane % Shape::kLanes;
  for (int tile = 0; tile < heads; tile += kHeadTile) {
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
      for (int e = lane; e < near; e += kWarp) largest = fmaxf(largest, of_head[e * kHeadTile]);
      largest = warp_max(largest);
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

// The queries in sketch coordinates, in 8 bits on a scale that the heads share.
template <typename T, int D>
__device__ void project_queries(const StepParams& p, int x, int length) {
  constexpr int kMaxRank = 64, kWarps = kBlock / kWarp;
  __shared__ float query[kMaxGroup * D];
  __shared__ float slices[kHeadTile * kBlock];
  __shared__ float projected[kMaxGroup * kMaxRank];
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
  load_queries<T, D, kBlock>(p, x, query);
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
    for (int i = thread; i < kHeadTile * rank; i += kBlock) {
      float sum = 0.0f;
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
  // Kept for the metric of the next build.
  T* recent = static_cast<T*>(p.layer.recent_queries) +
              static_cast<std::int64_t>(x) * s.group * kRecentQueries * D +
              length % kRecentQueries * D;
  const T* from = static_cast<const T*>(p.queries) + static_cast<std::int64_t>(x) * s.group * D;
  for (int i = thread; i < s.group * D; i += kBlock) {
    recent[i / D * kRecentQueries * D + i % D] = from[i];
  }
  for (int g = warp; g < heads; g += kWarps) {
    float bias = 0.0f;
    for (int d = lane; d < D; d += kWarp) bias += query[g * D + d] * mean_key[d];
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
  const int x = blockIdx.x, length = length_of(p, x);
  if (blockIdx.y == 0) {
    for (int i = threadIdx.x; i < kRanks; i += kBlock) {
      p.scratch.histogram[static_cast<std::int64_t>(x) * kRanks + i] = 0;
    }
    if (threadIdx.x == 0) {
      p.scratch.found[x] = 0;
      p.scratch.blocks_ranked[x] = 0;
      p.scratch.blocks_done[x] = 0;
    }
  }
  if (is_idle(p.shape, length)) return;
  switch (blockIdx.y) {
    case 0:
      return store_token<T, D>(p, x, length);
    case 1:
      return score_near<T, D>(p, x, length);
    default:
      return project_queries<T, D>(p, x, length);
  }
}

// --- scan, rank, choose: a block for kScanTokens tokens of a pair
// ---------------------------------

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
  if (is_idle(s, length)) return;
  const int count = index_tokens(s, length), begin = blockIdx.x * kScanTokens;
  if (begin >= count) return;
  const int heads = s.padded_group();
  const uint4* codes = reinterpret_cast<const uint4*>(p.layer.codes) +
                       static_cast<std::int64_t>(x) * s.token_room * (Words / 4);
  uint4 cells[kScanSteps][Words / 4];
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    const int token = begin + k * kBlock + thread;
#pragma unroll
    for (int w = 0; w < Words / 4; ++w) {
      cells[k][w] = token < count ? codes[static_cast<std::int64_t>(token) * (Words / 4) + w]
                                  : make_uint4(0, 0, 0, 0);
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
          (static_cast<std::int64_t>(x) * s.scan_blocks() + blockIdx.x) * heads + tile + thread;
      p.scratch.block_max[at] = high;
      p.scratch.block_sum[at] = total;
    }
    __syncthreads();
  }
}

// Scores of a thread's tokens for one tile of heads: all loads are under way before one is used.
__device__ __forceinline__ void load_scores(const StepShape& s, const short4* scores, int begin,
                                            int count, int tile, short4* four) {
  const short4* of_tile = scores + static_cast<std::int64_t>(tile / kHeadTile) * s.token_room;
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    const int token = begin + k * kBlock + static_cast<int>(threadIdx.x);
    four[k] = of_tile[min(token, count - 1)];
  }
}

// The ranks of a thread's tokens begin + k * kBlock + thread: how far each is below everything, in
// the head that sees it best, in steps of 1 / kRanksPerNat. `offset` [H]: everything's score in
// each head, beyond reach where there is no such head. `scale`: ranks of one score. Tokens past the
// last have any rank.
__device__ __forceinline__ void rank_tokens(const StepShape& s, const short4* scores, int begin,
                                            int count, float scale, const int* offset, int* ranks) {
  int best[kScanSteps];
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) best[k] = INT_MIN;
  for (int tile = 0; tile < s.group; tile += kHeadTile) {
    short4 four[kScanSteps];
    load_scores(s, scores, begin, count, tile, four);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      best[k] = max(best[k], max(max(four[k].x - offset[tile], four[k].y - offset[tile + 1]),
                                 max(four[k].z - offset[tile + 2], four[k].w - offset[tile + 3])));
    }
  }
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    const float rank = fminf(fmaxf(-scale * static_cast<float>(best[k]), 0.0f), kRanks - 1.0f);
    ranks[k] = static_cast<int>(rank);
  }
}

__device__ __forceinline__ int score_offset(float lse, float bias, float unit) {
  constexpr float kReach = 1 << 28;
  return static_cast<int>(fminf(fmaxf(rintf((lse - bias) / unit), -kReach), kReach));
}
constexpr int kNoHead = 1 << 29;

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
  if (is_idle(s, length)) return;
  const int count = index_tokens(s, length), begin = blockIdx.x * kScanTokens;
  const int heads = s.padded_group(), blocks = (count + kScanTokens - 1) / kScanTokens;
  if (begin >= count && blockIdx.x > 0) return;
  const float unit = p.scratch.unit[x];
  const std::int64_t first = static_cast<std::int64_t>(x) * s.scan_blocks() * heads;
  for (int i = thread; i < kRanks; i += kBlock) histogram[i] = 0;
  for (int g = warp; g < heads; g += kBlock / kWarp) {
    int high = INT_MIN;
    for (int i = lane; i < blocks; i += kWarp) {
      high = max(high, p.scratch.block_max[first + i * heads + g]);
    }
    high = warp_max(high);
    float sum = 0.0f;
    for (int i = lane; i < blocks; i += kWarp) {
      sum += p.scratch.block_sum[first + i * heads + g] *
             expf(unit * static_cast<float>(p.scratch.block_max[first + i * heads + g] - high));
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const std::int64_t head = static_cast<std::int64_t>(x) * heads + g;
      const float bias = p.scratch.bias[head];
      const float indexed =
          blocks > 0 ? bias + unit * static_cast<float>(high) + logf(sum) : -INFINITY;
      const float lse = log_add(indexed, p.scratch.near_lse[head]);
      offset[g] = g < s.group ? score_offset(lse, bias, unit) : kNoHead;
      if (blockIdx.x == 0) p.scratch.lse[head] = lse;
    }
  }
  __syncthreads();
  if (begin >= count) return;
  const short4* scores = reinterpret_cast<const short4*>(p.scratch.scores) +
                         static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  const float scale = unit * kRanksPerNat;
  int ranks[kScanSteps];
  rank_tokens(s, scores, begin, count, scale, offset, ranks);
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    // The last rank holds all that is too far to matter: nobody counts it.
    if (begin + k * kBlock + thread < count && ranks[k] < kRanks - 1) {
      atomicAdd(histogram + ranks[k], 1u);
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
    is_last = atomicAdd(p.scratch.blocks_ranked + x, 1u) + 1 == static_cast<unsigned>(blocks);
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

static __global__ void __launch_bounds__(kBlock) choose_kernel(const StepParams p) {
  constexpr int kSegments = kScanTokens / kWarp;
  __shared__ int offset[kMaxGroup];
  __shared__ float shift[kMaxGroup];
  __shared__ float weights[kSegments * kMaxGroup];
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int count = index_tokens(s, length), begin = blockIdx.x * kScanTokens;
  if (begin >= count) return;
  const int heads = s.padded_group(), last_rank = p.scratch.last_rank[x];
  const float unit = p.scratch.unit[x], scale = unit * kRanksPerNat, in_bits = unit * kLog2E;
  if (thread < heads) {
    const std::int64_t head = static_cast<std::int64_t>(x) * heads + thread;
    const float bias = p.scratch.bias[head], lse = p.scratch.lse[head];
    offset[thread] = thread < s.group ? score_offset(lse, bias, unit) : kNoHead;
    shift[thread] = (bias - lse) * kLog2E;
  }
  __syncthreads();
  const short4* scores = reinterpret_cast<const short4*>(p.scratch.scores) +
                         static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  int ranks[kScanSteps];
  rank_tokens(s, scores, begin, count, scale, offset, ranks);
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    const int token = begin + k * kBlock + thread;
    if (token < count && ranks[k] <= last_rank) {
      const std::uint32_t at = atomicAdd(p.scratch.found + x, 1u);
      p.scratch.tokens[x * kMaxCandidates + at] = token;
    }
    if (token >= count) ranks[k] = last_rank;  // weighs nothing
  }
  for (int tile = 0; tile < heads && s.tail; tile += kHeadTile) {
    short4 four[kScanSteps];
    load_scores(s, scores, begin, count, tile, four);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      const int of_head[kHeadTile] = {four[k].x, four[k].y, four[k].z, four[k].w};
      float weight[kHeadTile];
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        const float w = power_of_two(in_bits * small_to_float(of_head[g]) + shift[tile + g]);
        weight[g] = ranks[k] > last_rank ? w : 0.0f;
      }
      const float of_warp = warp_sum_of_four(weight);
      if (lane % 8 == 0) {
        weights[(k * (kBlock / kWarp) + warp) * kMaxGroup + tile + lane / 8] = of_warp;
      }
    }
  }
  if (!s.tail) return;
  __syncthreads();
  const int segments = s.far_node_tokens / kWarp, nodes = kScanTokens / s.far_node_tokens;
  for (int i = thread; i < nodes * heads; i += kBlock) {
    const int node = i / heads, g = i % heads;
    if (begin + node * s.far_node_tokens >= count) continue;
    float mass = 0.0f;
    for (int j = 0; j < segments; ++j) mass += weights[(node * segments + j) * kMaxGroup + g];
    p.scratch.mass[(static_cast<std::int64_t>(x) * s.nodes() + begin / s.far_node_tokens + node) *
                       heads +
                   g] = g < s.group ? mass : 0.0f;
  }
}

// --- resolve, pick: one block for each pair, a thread for each candidate -------------------------

// Sorts kMaxCandidates shared integers, ascending.
__device__ __forceinline__ void sort_tokens(int* tokens) {
  const int i = threadIdx.x;
  for (int size = 2; size <= kMaxCandidates; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const int other = i ^ stride;
      if (other > i) {
        const int a = tokens[i], b = tokens[other];
        if ((a > b) == ((i & size) == 0)) {
          tokens[i] = b;
          tokens[other] = a;
        }
      }
      __syncthreads();
    }
  }
}

static __global__ void __launch_bounds__(kPickBlock) resolve_kernel(const StepParams p) {
  constexpr int kAges = 1024;
  __shared__ int tokens[kMaxCandidates];
  __shared__ int victims[kMaxCandidates];
  __shared__ int ages[kAges];
  __shared__ int room[kPickBlock / kWarp + 1];
  __shared__ int oldest, wanted_of_oldest;
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.x, thread = threadIdx.x;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int found = static_cast<int>(p.scratch.found[x]);  // <= kMaxCandidates
  const int now = length + 1;                              // stamps of this step; 0: never used
  tokens[thread] = thread < found ? p.scratch.tokens[x * kMaxCandidates + thread] : INT_MAX;
  for (int i = thread; i < kAges; i += kPickBlock) ages[i] = 0;
  __syncthreads();
  sort_tokens(tokens);

  std::int16_t* row_of = p.layer.row_of + static_cast<std::int64_t>(x) * s.token_room;
  std::int32_t* owner = p.layer.owner + static_cast<std::int64_t>(x) * s.cached_rows;
  std::int32_t* stamp = p.layer.stamp + static_cast<std::int64_t>(x) * s.cached_rows;
  const bool asked = thread < found;
  const int token = tokens[thread];
  int row = asked ? row_of[token] : -1;
  const bool missing = asked && row < 0;
  if (asked && !missing) stamp[row] = now;
  int misses = 0;
  const int mine = block_rank(missing, room, misses);  // has a barrier: stamps are seen

  // The rows longest unused, by a histogram of ages.
  if (misses > 0) {
    const auto age_of = [&](int r) {
      return stamp[r] == 0 ? kAges - 1 : min(now - stamp[r], kAges - 2);
    };
    for (int r = thread; r < s.cached_rows; r += kPickBlock) atomicAdd(ages + age_of(r), 1);
    __syncthreads();
    constexpr int kOwn = kAges / kPickBlock;
    int own[kOwn], sum = 0, all = 0;
    for (int i = 0; i < kOwn; ++i) sum += own[i] = ages[kAges - 1 - thread * kOwn - i];
    int older = block_scan(sum, room, all);
    for (int i = 0; i < kOwn; ++i) {
      if (older < misses && older + own[i] >= misses) {
        oldest = kAges - 1 - thread * kOwn - i;
        wanted_of_oldest = misses - older;
      }
      older += own[i];
    }
    __syncthreads();
    int taken = 0, alike = 0;
    for (int first = 0; first < s.cached_rows; first += kPickBlock) {
      const int r = first + thread;
      const int age = r < s.cached_rows ? age_of(r) : -1;
      int equal = 0, added = 0;
      const int order = alike + block_rank(age == oldest, room, equal);
      const bool taking = age > oldest || (age == oldest && order < wanted_of_oldest);
      const int at = taken + block_rank(taking, room, added);
      if (taking) victims[at] = r;
      alike += equal;
      taken += added;
    }
    __syncthreads();
    if (missing) {
      row = victims[mine];
      if (owner[row] >= 0) row_of[owner[row]] = -1;
      owner[row] = token;
      stamp[row] = now;
      p.layer.has_value[static_cast<std::int64_t>(x) * s.cached_rows + row] = 0;
      row_of[token] = static_cast<std::int16_t>(row);
    }
  }
  if (asked) {
    const int in_rows = s.near_rows() + row;
    p.scratch.tokens[x * kMaxCandidates + thread] = token;
    p.scratch.token_rows[x * kMaxCandidates + thread] = missing ? ~in_rows : in_rows;
  }
  if (thread == 0) {
    unsigned long long* counters = p.layer.counters + static_cast<std::int64_t>(x) * 4;
    counters[0] += found - misses;
    counters[1] += misses;
    counters[2] +=
        static_cast<unsigned long long>(misses) * s.head_dim * (s.dtype == DType::kFloat32 ? 4 : 2);
    counters[3] += 1;
  }
}

static __global__ void __launch_bounds__(kPickBlock) pick_kernel(const StepParams p) {
  constexpr int kWarps = kPickBlock / kWarp;
  __shared__ int tokens[kMaxCandidates];
  __shared__ int leader[kMaxCandidates];
  __shared__ std::uint8_t picked[kMaxCandidates];
  __shared__ float4 logits[kMaxCandidates];
  __shared__ float4 shares[kMaxCandidates];
  __shared__ float room[kWarps][kHeadTile];
  __shared__ int scan_room[kWarps + 1];
  __shared__ float references[kMaxGroup];
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.x, i = threadIdx.x, lane = i % kWarp, warp = i / kWarp;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int heads = s.padded_group(), near = near_count(s, length);
  const int count = index_tokens(s, length);
  const int found = static_cast<int>(p.scratch.found[x]);  // <= kMaxCandidates
  const std::int64_t head0 = static_cast<std::int64_t>(x) * heads;
  const bool is_candidate = i < found;
  __shared__ float near_lse[kMaxGroup], all_lse[kMaxGroup];
  if (i < heads) {
    near_lse[i] = p.scratch.near_lse[head0 + i];
    all_lse[i] = p.scratch.lse[head0 + i];
  }
  // Asked for before it is known whether they are there: one wait less.
  const int own_token = p.scratch.tokens[x * kMaxCandidates + i];
  const int own_row = p.scratch.token_rows[x * kMaxCandidates + i];
  tokens[i] = is_candidate ? own_token : INT_MAX;
  const int in_rows = own_row < 0 ? ~own_row : own_row;
  std::uint8_t* has_value = p.layer.has_value + static_cast<std::int64_t>(x) * s.cached_rows +
                            (is_candidate ? in_rows - s.near_rows() : 0);
  const bool has_own_value = *has_value != 0;
  const float4* own_logits = reinterpret_cast<const float4*>(
      p.scratch.logits + (static_cast<std::int64_t>(x) * kMaxCandidates + i) * heads);

  // A candidate is worth its mass beside sink, window and the other candidates, summed over heads.
  float mass = 0.0f;
  for (int tile = 0; tile < s.group; tile += kHeadTile) {
    const float4 four = is_candidate ? own_logits[tile / kHeadTile]
                                     : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    const float own[kHeadTile] = {four.x, four.y, four.z, four.w};
    float high[kHeadTile], sum[kHeadTile];
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      high[g] = warp_max(own[g]);
      if (lane == 0) room[warp][g] = high[g];
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      high[g] = near_lse[tile + g];
      for (int w = 0; w < kWarps; ++w) high[g] = fmaxf(high[g], room[w][g]);
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      sum[g] = warp_sum(expf(own[g] - high[g]));
      if (lane == 0) room[warp][g] = sum[g];
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      float total = expf(near_lse[tile + g] - high[g]);
      for (int w = 0; w < kWarps; ++w) total += room[w][g];
      if (tile + g < s.group) mass += expf(own[g] - high[g]) / total;
      if (i == 0) references[tile + g] = fmaxf(high[g], all_lse[tile + g]);
    }
    __syncthreads();
  }

  // The budget's best: the largest threshold that enough of them reach; ties by token.
  const unsigned bits = is_candidate ? __float_as_uint(mass) + 1 : 0;
  const int budget = min(s.select_tokens, found);
  unsigned threshold = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const unsigned tried = threshold | 1u << bit;
    if (__syncthreads_count(bits >= tried) >= budget) threshold = tried;
  }
  int better = 0, ties = 0, taken = 0;
  block_rank(bits > threshold, scan_room, better);
  const int order = block_rank(bits == threshold, scan_room, ties);
  const bool takes =
      is_candidate && (bits > threshold || (bits == threshold && order < budget - better));
  const int at = near + block_rank(takes, scan_room, taken);
  picked[i] = takes ? 1 : 0;
  const int node = is_candidate ? tokens[i] / s.far_node_tokens : -1;
  const std::int64_t entry0 = static_cast<std::int64_t>(x) * s.entries();
  if (takes) {
    p.scratch.entry_rows[entry0 + at] = in_rows;
    p.scratch.entry_sources[entry0 + at] = has_own_value ? -1 : tokens[i];
    if (!has_own_value) {
      atomicAdd(p.layer.counters + static_cast<std::int64_t>(x) * 4 + 2,
                static_cast<unsigned long long>(s.head_dim * (s.dtype == DType::kFloat32 ? 4 : 2)));
    }
    *has_value = 1;
  }
  for (int e = i; e < near; e += kPickBlock) {
    p.scratch.entry_rows[entry0 + e] = e;
    p.scratch.entry_sources[entry0 + e] = -1;
  }
  if (i == 0) p.scratch.entry_count[x] = near + taken;
  __syncthreads();

  // Coefficients. A node stands for its tokens that were not picked, with the mean of their values:
  // that is (tokens x mean - sum of the picked values) / left.
  const bool leads = is_candidate && (i == 0 || tokens[i - 1] / s.far_node_tokens != node);
  for (int tile = 0; tile < heads; tile += kHeadTile) {
    const float4 four = is_candidate ? own_logits[tile / kHeadTile] : make_float4(0, 0, 0, 0);
    logits[i] = four;
    const float* lse = all_lse + tile;
    float far_scale[kHeadTile], reference[kHeadTile];
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      const bool real = tile + g < s.group;
      reference[g] = real ? references[tile + g] : 0.0f;
      far_scale[g] = real ? expf(lse[g] - reference[g]) : 0.0f;
      if (i == 0) p.scratch.far_scale[head0 + tile + g] = far_scale[g];
    }
    __syncthreads();
    if (leads && s.tail) {
      float4* far = reinterpret_cast<float4*>(
          p.scratch.mass + (static_cast<std::int64_t>(x) * s.nodes() + node) * heads + tile);
      float4 sum = *far;
      int left = min(s.far_node_tokens, count - node * s.far_node_tokens);
      const float held = static_cast<float>(left);
      for (int j = i; j < found && tokens[j] / s.far_node_tokens == node; ++j) {
        leader[j] = i;
        if (picked[j] != 0) {
          --left;
        } else {
          sum.x += expf(fminf(logits[j].x - lse[0], kLargestExponent));
          sum.y += expf(fminf(logits[j].y - lse[1], kLargestExponent));
          sum.z += expf(fminf(logits[j].z - lse[2], kLargestExponent));
          sum.w += expf(fminf(logits[j].w - lse[3], kLargestExponent));
        }
      }
      const float each = left > 0 ? 1.0f / static_cast<float>(left) : 0.0f;
      shares[i] = make_float4(sum.x * each, sum.y * each, sum.z * each, sum.w * each);
      *far = make_float4(sum.x * each * held, sum.y * each * held, sum.z * each * held,
                         sum.w * each * held);
    }
    __syncthreads();
    if (takes) {
      const float own[kHeadTile] = {four.x, four.y, four.z, four.w};
      const float4 of_node = s.tail ? shares[leader[i]] : make_float4(0, 0, 0, 0);
      const float share[kHeadTile] = {of_node.x, of_node.y, of_node.z, of_node.w};
      float weight[kHeadTile];
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        weight[g] =
            tile + g < s.group ? expf(own[g] - reference[g]) - share[g] * far_scale[g] : 0.0f;
      }
      *reinterpret_cast<float4*>(p.scratch.entry_weights + (entry0 + at) * heads + tile) =
          make_float4(weight[0], weight[1], weight[2], weight[3]);
    }
    for (int e = i; e < near; e += kPickBlock) {
      const float4 logit = *reinterpret_cast<const float4*>(
          p.scratch.near_logits + (static_cast<std::int64_t>(x) * s.near_rows() + e) * heads +
          tile);
      *reinterpret_cast<float4*>(p.scratch.entry_weights + (entry0 + e) * heads + tile) =
          make_float4(expf(logit.x - reference[0]), expf(logit.y - reference[1]),
                      expf(logit.z - reference[2]), expf(logit.w - reference[3]));
    }
    __syncthreads();
  }
}

// --- rescore: exact logits of the candidates
// ------------------------------------------------------

constexpr int kRescoreUnroll = 4;  // rows in flight of each part of a warp

template <typename T, int D>
__global__ void __launch_bounds__(kBlock) rescore_kernel(const StepParams p) {
  using Shape = RowShape<T, D>;
  __shared__ float query[kMaxGroup * D];
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int found = static_cast<int>(p.scratch.found[x]);  // <= kMaxCandidates
  constexpr int kOfBlock = kBlock / kWarp * Shape::kRows * kRescoreUnroll;
  const int begin = blockIdx.x * kOfBlock;
  if (begin >= found) return;
  const int heads = s.padded_group();
  load_queries<T, D, kBlock>(p, x, query);
  T* rows = static_cast<T*>(p.layer.row_keys) + static_cast<std::int64_t>(x) * s.rows() * D;
  const int own = lane / Shape::kLanes, within = lane % Shape::kLanes;
  const int first = begin + (warp * Shape::kRows + own) * kRescoreUnroll;
  uint4 held[kRescoreUnroll][Shape::kPerLane] = {};
  int row[kRescoreUnroll];
#pragma unroll
  for (int u = 0; u < kRescoreUnroll; ++u) {
    const int c = first + u;
    row[u] = 0;
    if (c < found) {
      row[u] = p.scratch.token_rows[x * kMaxCandidates + c];
      const T* from = row[u] >= 0 ? rows + static_cast<std::int64_t>(row[u]) * D
                                  : host_key<T>(p, x, p.scratch.tokens[x * kMaxCandidates + c], D);
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) held[u][j] = vectors_of(from)[v];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kRescoreUnroll; ++u) {
    const int c = first + u;
    if (c < found && row[u] < 0) {
      uint4* to = reinterpret_cast<uint4*>(rows + static_cast<std::int64_t>(~row[u]) * D);
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) to[v] = held[u][j];
      }
    }
    for (int tile = 0; tile < heads; tile += kHeadTile) {
      const float4 four = row_products<T, D>(held[u], query + tile * D, within);
      if (c < found && within == 0) {
        *reinterpret_cast<float4*>(
            p.scratch.logits + (static_cast<std::int64_t>(x) * kMaxCandidates + c) * heads + tile) =
            four;
      }
    }
  }
}

// --- attend: rows and nodes, split over blocks
// ----------------------------------------------------

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
  T* out = static_cast<T*>(p.out) + static_cast<std::int64_t>(x) * s.group * D;
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

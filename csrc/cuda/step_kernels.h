// The kernels of step.h. Device code: seen by cuda_step.cu alone.
#pragma once

#include <climits>

#include "cuda/gpu.h"
#include "cuda/step.h"

namespace icecache::gpu {

constexpr int kBlock = 256;                 // threads of append, scan, rank, choose, rescore
constexpr int kPickBlock = kMaxCandidates;  // of resolve and pick: a thread for each candidate
constexpr int kAttendBlock = 128;
constexpr int kScanSteps = kScanTokens / kBlock;
constexpr float kLargestExponent = 80.0f;

// Tokens of pair x before this step; < 0: none to attend for. `full`: no room for another.
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

// The 4-bit codes of one word: nibble j of byte b holds dimension 8 w + 4 j + b.
__device__ __forceinline__ std::uint32_t pack_codes(const float* y, const float* low,
                                                    const float* step) {
  std::uint32_t word = 0;
  for (int i = 0; i < kCodesPerWord; ++i) {
    const float level = fminf(fmaxf(rintf((y[i] - low[i]) / step[i]), 0.0f), 15.0f);
    word |= static_cast<std::uint32_t>(level) << (8 * (i % 4) + 4 * (i / 4));
  }
  return word;
}

// --- append: one block for each pair ------------------------------------------------------------

template <typename T, int D>
__global__ void __launch_bounds__(kBlock) append_kernel(const StepParams p) {
  using Shape = RowShape<T, D>;
  constexpr int kMaxHeads = kMaxGroup, kMaxRank = 64, kWarps = kBlock / kWarp;
  __shared__ float query[kMaxHeads * D];
  __shared__ float key[D];
  __shared__ float slices[kBlock];
  __shared__ float projected[kMaxHeads * kMaxRank];
  __shared__ float logits[kMaxNear * kHeadTile];
  __shared__ float room[kWarps];
  const StepShape& s = p.shape;
  const int x = blockIdx.x, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (thread == 0) {
    p.scratch.found[x] = 0;
    p.scratch.blocks_done[x] = 0;
  }
  for (int i = thread; i < kRanks; i += kBlock) {
    p.scratch.histogram[static_cast<std::int64_t>(x) * kRanks + i] = 0;
  }
  if (is_idle(s, length)) return;
  const int heads = s.padded_group(), rank = s.rank;
  const int b = x / s.kv_heads, h = x % s.kv_heads;
  const std::int64_t row0 = static_cast<std::int64_t>(x) * s.rows();
  T* row_keys = static_cast<T*>(p.layer.row_keys) + row0 * D;
  T* row_values = static_cast<T*>(p.layer.row_values) + row0 * D;
  const int row = near_row(s, length);
  const float* mean_key = p.layer.mean_key + static_cast<std::int64_t>(x) * D;

  const T* q = static_cast<const T*>(p.queries) +
               (static_cast<std::int64_t>(b) * s.kv_heads * s.group + h * s.group) * D;
  for (int i = thread; i < heads * D; i += kBlock) {
    query[i] = i < s.group * D ? to_float(q[i]) * s.scale : 0.0f;
  }

  // The token that leaves the window.
  const int displaced = length - s.near_rows();
  if (displaced >= 0) {
    T* to_key = host_key<T>(p, x, displaced, D);
    T* to_value = host_value<T>(p, x, displaced, D);
    const uint4* from_key = vectors_of(row_keys + row * D);
    const uint4* from_value = vectors_of(row_values + row * D);
    if (thread < Shape::kVectors) {
      reinterpret_cast<uint4*>(to_key)[thread] = from_key[thread];
    } else if (thread < 2 * Shape::kVectors) {
      reinterpret_cast<uint4*>(to_value)[thread - Shape::kVectors] =
          from_value[thread - Shape::kVectors];
    }
    for (int d = thread; d < D; d += kBlock) {
      key[d] = to_float(row_keys[row * D + d]) - mean_key[d];
      const int in_node = displaced % s.far_node_tokens;
      float* open = p.layer.open_sum + static_cast<std::int64_t>(x) * D + d;
      const float sum = (in_node == 0 ? 0.0f : *open) + to_float(row_values[row * D + d]);
      *open = sum;
      const std::int64_t node =
          static_cast<std::int64_t>(x) * s.nodes() + displaced / s.far_node_tokens;
      static_cast<T*>(p.layer.means)[node * D + d] =
          from_float<T>(sum / static_cast<float>(in_node + 1));
    }
    __syncthreads();
    const int per_slice = D * rank / kBlock, r = thread % rank, slice = thread / rank;
    const float* basis = p.layer.from_key + static_cast<std::int64_t>(x) * D * rank;
    float sum = 0.0f;
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

  // The new token takes its place.
  const T* new_key = static_cast<const T*>(p.keys) + static_cast<std::int64_t>(x) * D;
  const T* new_value = static_cast<const T*>(p.values) + static_cast<std::int64_t>(x) * D;
  for (int d = thread; d < D; d += kBlock) {
    row_keys[row * D + d] = new_key[d];
    row_values[row * D + d] = new_value[d];
  }
  __syncthreads();

  // Logits of sink and window, and their sums.
  const int near = near_count(s, length);
  for (int tile = 0; tile < heads; tile += kHeadTile) {
    const int own = lane / Shape::kLanes, within = lane % Shape::kLanes;
    for (int first = warp * Shape::kRows; first < near; first += kWarps * Shape::kRows) {
      const int e = first + own;
      float sums[kHeadTile] = {};
      if (e < near) {
#pragma unroll
        for (int j = 0; j < Shape::kPerLane; ++j) {
          const int v = Shape::vector(within, j);
          if (v < Shape::kVectors) {
            float k[Shape::kCount];
            Vector<T>{vectors_of(row_keys + e * D)[v]}.unpack(k);
#pragma unroll
            for (int g = 0; g < kHeadTile; ++g) {
#pragma unroll
              for (int i = 0; i < Shape::kCount; ++i) {
                sums[g] += query[(tile + g) * D + v * Shape::kCount + i] * k[i];
              }
            }
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) sums[g] = warp_sum(sums[g], Shape::kLanes);
      if (e < near && within < kHeadTile) {
        float own_sum = sums[0];
#pragma unroll
        for (int g = 1; g < kHeadTile; ++g) own_sum = within == g ? sums[g] : own_sum;
        logits[e * kHeadTile + within] = own_sum;
        p.scratch.near_logits[(static_cast<std::int64_t>(x) * s.near_rows() + e) * heads + tile +
                              within] = own_sum;
      }
    }
    __syncthreads();
    if (warp < kHeadTile) {
      float largest = -INFINITY, sum = 0.0f;
      for (int e = lane; e < near; e += kWarp) {
        largest = fmaxf(largest, logits[e * kHeadTile + warp]);
      }
      largest = warp_max(largest);
      for (int e = lane; e < near; e += kWarp) sum += expf(logits[e * kHeadTile + warp] - largest);
      sum = warp_sum(sum);
      if (lane == 0) {
        p.scratch.near_lse[static_cast<std::int64_t>(x) * heads + tile + warp] =
            largest + logf(sum);
      }
    }
    __syncthreads();
  }

  // The query in sketch coordinates, in 8 bits on a scale that the heads share.
  const int slice_count = kBlock / rank, per_slice = D / slice_count;
  const int r = thread % rank, slice = thread / rank;
  const float* basis = p.layer.from_query + static_cast<std::int64_t>(x) * D * rank;
  const float* low = p.layer.low + static_cast<std::int64_t>(x) * rank;
  const float* step = p.layer.step + static_cast<std::int64_t>(x) * rank;
  float largest = 0.0f;
  for (int g = 0; g < s.group; ++g) {
    float sum = 0.0f;
    for (int d = slice * per_slice; d < (slice + 1) * per_slice; ++d) {
      sum += query[g * D + d] * basis[d * rank + r];
    }
    slices[thread] = sum;
    __syncthreads();
    if (thread < rank) {
      for (int other = thread + rank; other < kBlock; other += rank) sum += slices[other];
      sum *= step[thread];
      projected[g * rank + thread] = sum;
      largest = fmaxf(largest, fabsf(sum));
    }
    __syncthreads();
  }
  largest = warp_max(largest);
  if (lane == 0) room[warp] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, room[w]);
  const float scale = fmaxf(largest, 1e-20f) / 127.0f;
  const float unit = scale * static_cast<float>(s.rank / 16);  // scores lose log2(R / 16) bits
  if (thread == 0) p.scratch.unit[x] = unit;
  for (int g = warp; g < heads; g += kWarps) {
    float bias = 0.0f;
    for (int d = lane; d < D; d += kWarp) bias += query[g * D + d] * mean_key[d];
    for (int i = lane; i < rank; i += kWarp) {
      const float code = g < s.group ? rintf(projected[g * rank + i] / scale) : 0.0f;
      p.scratch.query_codes[(static_cast<std::int64_t>(x) * heads + g) * rank + i] =
          static_cast<std::int8_t>(code);
      bias += scale * code * (low[i] / step[i]);
    }
    bias = warp_sum(bias) + 0.5f * (unit - scale);  // shifting rounds down
    if (lane == 0) p.scratch.bias[static_cast<std::int64_t>(x) * heads + g] = bias;
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
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int count = index_tokens(s, length), begin = blockIdx.x * kScanTokens;
  if (begin >= count) return;
  const int heads = s.padded_group();
  const int* from = reinterpret_cast<const int*>(p.scratch.query_codes) +
                    static_cast<std::int64_t>(x) * heads * Words * 2;
  for (int i = thread; i < heads * Words * 2; i += kBlock) queries[i] = from[i];
  const float unit = p.scratch.unit[x] * 1.44269504f;
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
  __syncthreads();
  for (int tile = 0; tile < heads; tile += kHeadTile) {
    short4 scores[kScanSteps];
    int largest[kHeadTile] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN};
    short4* out =
        reinterpret_cast<short4*>(p.scratch.scores) +
        (static_cast<std::int64_t>(x) * (heads / kHeadTile) + tile / kHeadTile) * s.token_room;
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      const int token = begin + k * kBlock + thread;
      int sum[kHeadTile] = {};
#pragma unroll
      for (int w = 0; w < Words / 4; ++w) {
        const unsigned words[4] = {cells[k][w].x, cells[k][w].y, cells[k][w].z, cells[k][w].w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int even = static_cast<int>(words[c] & 0x0f0f0f0fu);
          const int odd = static_cast<int>(words[c] >> 4 & 0x0f0f0f0fu);
#pragma unroll
          for (int g = 0; g < kHeadTile; ++g) {
            const int* q = queries + ((tile + g) * Words + w * 4 + c) * 2;
            sum[g] = __dp4a(even, q[0], __dp4a(odd, q[1], sum[g]));
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        sum[g] >>= kShift;
        if (token < count) largest[g] = max(largest[g], sum[g]);
      }
      scores[k] = make_short4(static_cast<short>(sum[0]), static_cast<short>(sum[1]),
                              static_cast<short>(sum[2]), static_cast<short>(sum[3]));
      if (token < count) out[token] = scores[k];
    }
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      const int high = warp_max(largest[g]);
      if (lane == 0) room[warp][g] = high;
    }
    __syncthreads();
    float sum[kHeadTile] = {};
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      for (int w = 0; w < kWarps; ++w) largest[g] = max(largest[g], room[w][g]);
    }
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      if (begin + k * kBlock + thread < count) {
        sum[0] += exp2f(unit * static_cast<float>(scores[k].x - largest[0]));
        sum[1] += exp2f(unit * static_cast<float>(scores[k].y - largest[1]));
        sum[2] += exp2f(unit * static_cast<float>(scores[k].z - largest[2]));
        sum[3] += exp2f(unit * static_cast<float>(scores[k].w - largest[3]));
      }
    }
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      sum[g] = warp_sum(sum[g]);
      if (lane == 0) sums[warp][g] = sum[g];
    }
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

// Of a score: nats below everything, for head g of a tile. `offset` is bias - lse.
__device__ __forceinline__ float at_head(const short4& scores, int g) {
  return static_cast<float>(g == 0 ? scores.x : g == 1 ? scores.y : g == 2 ? scores.z : scores.w);
}

// The rank of a token: how far it is below everything in the head that sees it best.
__device__ __forceinline__ int rank_of(const StepShape& s, const short4* scores, int token,
                                       float unit, const float* offset) {
  float best = -INFINITY;
  for (int tile = 0; tile < s.group; tile += kHeadTile) {
    const short4 four = scores[static_cast<std::int64_t>(tile / kHeadTile) * s.token_room + token];
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      if (tile + g < s.group) best = fmaxf(best, unit * at_head(four, g) + offset[tile + g]);
    }
  }
  return static_cast<int>(fminf(fmaxf(-best * kRanksPerNat, 0.0f), kRanks - 1.0f));
}

static __global__ void __launch_bounds__(kBlock) rank_kernel(const StepParams p) {
  __shared__ std::uint32_t histogram[kRanks];
  __shared__ float offset[kMaxGroup];
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
      offset[g] = bias - lse;
      if (blockIdx.x == 0) p.scratch.lse[head] = lse;
    }
  }
  __syncthreads();
  if (begin >= count) return;
  const short4* scores = reinterpret_cast<const short4*>(p.scratch.scores) +
                         static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  for (int k = 0; k < kScanSteps; ++k) {
    const int token = begin + k * kBlock + thread;
    if (token < count) atomicAdd(histogram + rank_of(s, scores, token, unit, offset), 1u);
  }
  __syncthreads();
  for (int i = thread; i < kRanks; i += kBlock) {
    if (histogram[i] != 0) {
      atomicAdd(p.scratch.histogram + static_cast<std::int64_t>(x) * kRanks + i, histogram[i]);
    }
  }
}

static __global__ void __launch_bounds__(kBlock) choose_kernel(const StepParams p) {
  constexpr int kOwn = kRanks / kBlock, kSegments = kScanTokens / kWarp;
  __shared__ int room[kBlock / kWarp + 1];
  __shared__ int last_rank;
  __shared__ float offset[kMaxGroup];
  __shared__ float weights[kSegments * kMaxGroup];
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int count = index_tokens(s, length), begin = blockIdx.x * kScanTokens;
  if (begin >= count) return;
  const int heads = s.padded_group();
  if (thread < heads) {
    const std::int64_t head = static_cast<std::int64_t>(x) * heads + thread;
    offset[thread] = p.scratch.bias[head] - p.scratch.lse[head];
  }
  // Candidates stand at ranks up to last_rank: the first rank by which there are enough, or the one
  // before it where that would be too many (ties, which nothing tells apart).
  if (thread == 0) last_rank = kRanks - 1;
  const std::uint32_t* histogram =
      p.scratch.histogram + static_cast<std::int64_t>(x) * kRanks + thread * kOwn;
  int own[kOwn], sum = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = static_cast<int>(histogram[i]);
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
  const float unit = p.scratch.unit[x];
  const short4* scores = reinterpret_cast<const short4*>(p.scratch.scores) +
                         static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  for (int k = 0; k < kScanSteps; ++k) {
    const int token = begin + k * kBlock + thread;
    const bool counts = token < count;
    bool rest = false;
    if (counts) {
      rest = rank_of(s, scores, token, unit, offset) > last_rank;
      if (!rest) {
        const std::uint32_t at = atomicAdd(p.scratch.found + x, 1u);
        // More than the room only where more tie at the best rank of all.
        if (at < kMaxCandidates) p.scratch.tokens[x * kMaxCandidates + at] = token;
      }
    }
    for (int tile = 0; tile < heads && s.tail; tile += kHeadTile) {
      const short4 four =
          counts ? scores[static_cast<std::int64_t>(tile / kHeadTile) * s.token_room + token]
                 : make_short4(0, 0, 0, 0);
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        const float weight =
            rest && tile + g < s.group ? expf(unit * at_head(four, g) + offset[tile + g]) : 0.0f;
        const float sum_of_warp = warp_sum(weight);
        if (lane == 0) {
          weights[(k * (kBlock / kWarp) + warp) * kMaxGroup + tile + g] = sum_of_warp;
        }
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
                   g] = mass;
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
  const StepShape& s = p.shape;
  const int x = blockIdx.x, thread = threadIdx.x;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int found = min(static_cast<int>(p.scratch.found[x]), kMaxCandidates);
  const int now = length + 1;  // stamps of this step; 0: never used
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
  const int mine = block_scan(missing ? 1 : 0, room, misses);  // has a barrier: stamps are seen

  // The rows longest unused, by a histogram of ages.
  if (misses > 0) {
    const auto age_of = [&](int r) {
      return stamp[r] == 0 ? kAges - 1 : min(now - stamp[r], kAges - 2);
    };
    for (int r = thread; r < s.cached_rows; r += kPickBlock) atomicAdd(ages + age_of(r), 1);
    __syncthreads();
    if (thread == 0) {
      int age = kAges - 1, older = 0;
      while (older + ages[age] < misses) older += ages[age--];
      oldest = age;
      wanted_of_oldest = misses - older;
    }
    __syncthreads();
    int taken = 0, alike = 0;
    for (int first = 0; first < s.cached_rows; first += kPickBlock) {
      const int r = first + thread;
      const int age = r < s.cached_rows ? age_of(r) : -1;
      int equal = 0, added = 0;
      const int order = alike + block_scan(age == oldest ? 1 : 0, room, equal);
      const bool taking = age > oldest || (age == oldest && order < wanted_of_oldest);
      const int at = taken + block_scan(taking ? 1 : 0, room, added);
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
  const StepShape& s = p.shape;
  const int x = blockIdx.x, i = threadIdx.x, lane = i % kWarp, warp = i / kWarp;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int heads = s.padded_group(), near = near_count(s, length);
  const int count = index_tokens(s, length);
  const int found = min(static_cast<int>(p.scratch.found[x]), kMaxCandidates);
  const std::int64_t head0 = static_cast<std::int64_t>(x) * heads;
  const bool is_candidate = i < found;
  tokens[i] = is_candidate ? p.scratch.tokens[x * kMaxCandidates + i] : INT_MAX;
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
      high[g] = p.scratch.near_lse[head0 + tile + g];
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
      float total = expf(p.scratch.near_lse[head0 + tile + g] - high[g]);
      for (int w = 0; w < kWarps; ++w) total += room[w][g];
      if (tile + g < s.group) mass += expf(own[g] - high[g]) / total;
      if (i == 0) references[tile + g] = fmaxf(high[g], p.scratch.lse[head0 + tile + g]);
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
  block_scan(bits > threshold ? 1 : 0, scan_room, better);
  const int order = block_scan(bits == threshold ? 1 : 0, scan_room, ties);
  const bool takes =
      is_candidate && (bits > threshold || (bits == threshold && order < budget - better));
  const int at = near + block_scan(takes ? 1 : 0, scan_room, taken);
  picked[i] = takes ? 1 : 0;
  const int node = is_candidate ? tokens[i] / s.far_node_tokens : -1;
  const std::int64_t entry0 = static_cast<std::int64_t>(x) * s.entries();
  if (takes) {
    const int row = p.scratch.token_rows[x * kMaxCandidates + i];
    const int in_rows = row < 0 ? ~row : row;
    std::uint8_t* has_value =
        p.layer.has_value + static_cast<std::int64_t>(x) * s.cached_rows + in_rows - s.near_rows();
    p.scratch.entry_rows[entry0 + at] = in_rows;
    p.scratch.entry_sources[entry0 + at] = *has_value != 0 ? -1 : tokens[i];
    if (*has_value == 0) {
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
    const float* lse = p.scratch.lse + head0 + tile;
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
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  if (is_idle(s, length)) return;
  const int found = min(static_cast<int>(p.scratch.found[x]), kMaxCandidates);
  constexpr int kOfBlock = kBlock / kWarp * Shape::kRows * kRescoreUnroll;
  const int begin = blockIdx.x * kOfBlock;
  if (begin >= found) return;
  const int heads = s.padded_group(), b = x / s.kv_heads, h = x % s.kv_heads;
  const T* q = static_cast<const T*>(p.queries) +
               (static_cast<std::int64_t>(b) * s.kv_heads * s.group + h * s.group) * D;
  for (int i = thread; i < heads * D; i += kBlock) {
    query[i] = i < s.group * D ? to_float(q[i]) * s.scale : 0.0f;
  }
  T* rows = static_cast<T*>(p.layer.row_keys) + static_cast<std::int64_t>(x) * s.rows() * D;
  const int own = lane / Shape::kLanes, within = lane % Shape::kLanes;
  const int first = begin + (warp * Shape::kRows + own) * kRescoreUnroll;
  uint4 held[kRescoreUnroll][Shape::kPerLane];
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
      float sums[kHeadTile] = {};
      if (c < found) {
#pragma unroll
        for (int j = 0; j < Shape::kPerLane; ++j) {
          const int v = Shape::vector(within, j);
          if (v < Shape::kVectors) {
            float k[Shape::kCount];
            Vector<T>{held[u][j]}.unpack(k);
#pragma unroll
            for (int g = 0; g < kHeadTile; ++g) {
#pragma unroll
              for (int i = 0; i < Shape::kCount; ++i) {
                sums[g] += query[(tile + g) * D + v * Shape::kCount + i] * k[i];
              }
            }
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) sums[g] = warp_sum(sums[g], Shape::kLanes);
      if (c < found && within == 0) {
        *reinterpret_cast<float4*>(
            p.scratch.logits + (static_cast<std::int64_t>(x) * kMaxCandidates + c) * heads + tile) =
            make_float4(sums[0], sums[1], sums[2], sums[3]);
      }
    }
  }
}

// --- attend: rows and nodes, split over blocks
// ----------------------------------------------------

constexpr int kAttendUnroll = 4;

// Tiles: fours of heads that one block takes.
template <typename T, int D, int Tiles>
__global__ void __launch_bounds__(kAttendBlock) attend_kernel(const StepParams p) {
  using Shape = RowShape<T, D>;
  constexpr int kHeads = Tiles * kHeadTile, kWarps = kAttendBlock / kWarp;
  constexpr int kParts = kWarps * Shape::kRows;  // rows that the block reads at once
  __shared__ float sums[kWarps][kHeads];
  __shared__ float room[kWarps][kHeads * D / 2];
  __shared__ bool is_last;
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int length = length_of(p, x);
  const int heads = s.padded_group(), first_head = blockIdx.z * kHeads;
  const int b = x / s.kv_heads, h = x % s.kv_heads;
  T* out = static_cast<T*>(p.out) +
           (static_cast<std::int64_t>(b) * s.kv_heads * s.group + h * s.group) * D;
  if (is_idle(s, length)) {
    const T value = from_float<T>(length < 0 ? 0.0f : NAN);
    if (blockIdx.x == 0 && blockIdx.z == 0) {
      for (int i = thread; i < s.group * D; i += kAttendBlock) out[i] = value;
    }
    return;
  }
  const int rows = p.scratch.entry_count[x], count = index_tokens(s, length);
  const int nodes = s.tail ? (count + s.far_node_tokens - 1) / s.far_node_tokens : 0;
  const int blocks = (rows + nodes + kAttendRows - 1) / kAttendRows;
  const int begin = blockIdx.x * kAttendRows, end = min(begin + kAttendRows, rows + nodes);
  if (begin >= end) return;

  T* row_values = static_cast<T*>(p.layer.row_values) + static_cast<std::int64_t>(x) * s.rows() * D;
  const T* means =
      static_cast<const T*>(p.layer.means) + static_cast<std::int64_t>(x) * s.nodes() * D;
  const std::int64_t entry0 = static_cast<std::int64_t>(x) * s.entries();
  const std::int64_t node0 = static_cast<std::int64_t>(x) * s.nodes();
  const int part = warp * Shape::kRows + lane / Shape::kLanes, within = lane % Shape::kLanes;
  float far_scale[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    far_scale[g] = first_head + g < heads
                       ? p.scratch.far_scale[static_cast<std::int64_t>(x) * heads + first_head + g]
                       : 0.0f;
  }
  float sum[kHeads] = {};
  float acc[kHeads][Shape::kElements] = {};
  for (int first = begin + part; first < end; first += kParts * kAttendUnroll) {
    uint4 held[kAttendUnroll][Shape::kPerLane];
    float weights[kAttendUnroll][kHeads];
    int keep[kAttendUnroll];
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      const int e = first + u * kParts;
      keep[u] = -1;
      if (e >= end) continue;
      const bool is_row = e < rows;
      const T* from;
      const float* weight;
      if (is_row) {
        const int row = p.scratch.entry_rows[entry0 + e];
        const int source = p.scratch.entry_sources[entry0 + e];
        from = source < 0 ? row_values + static_cast<std::int64_t>(row) * D
                          : host_value<T>(p, x, source, D);
        if (source >= 0 && blockIdx.z == 0) keep[u] = row;
        weight = p.scratch.entry_weights + (entry0 + e) * heads + first_head;
      } else {
        from = means + static_cast<std::int64_t>(e - rows) * D;
        weight = p.scratch.mass + (node0 + e - rows) * heads + first_head;
      }
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) held[u][j] = vectors_of(from)[v];
      }
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const float4 four = first_head + t * kHeadTile < heads
                                ? reinterpret_cast<const float4*>(weight)[t]
                                : make_float4(0, 0, 0, 0);
        weights[u][t * 4] = is_row ? four.x : four.x * far_scale[t * 4];
        weights[u][t * 4 + 1] = is_row ? four.y : four.y * far_scale[t * 4 + 1];
        weights[u][t * 4 + 2] = is_row ? four.z : four.z * far_scale[t * 4 + 2];
        weights[u][t * 4 + 3] = is_row ? four.w : four.w * far_scale[t * 4 + 3];
      }
    }
#pragma unroll
    for (int u = 0; u < kAttendUnroll; ++u) {
      if (first + u * kParts >= end) continue;
#pragma unroll
      for (int g = 0; g < kHeads; ++g) sum[g] += weights[u][g];
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(within, j);
        if (v < Shape::kVectors) {
          float value[Shape::kCount];
          Vector<T>{held[u][j]}.unpack(value);
#pragma unroll
          for (int g = 0; g < kHeads; ++g) {
#pragma unroll
            for (int i = 0; i < Shape::kCount; ++i)
              acc[g][j * Shape::kCount + i] += weights[u][g] * value[i];
          }
          if (keep[u] >= 0) {
            reinterpret_cast<uint4*>(row_values + static_cast<std::int64_t>(keep[u]) * D)[v] =
                held[u][j];
          }
        }
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
  for (int i = thread; i < s.group * D; i += kAttendBlock) {
    const int g = i / D;
    float total = 0.0f, weight = 0.0f;
    for (int block = 0; block < blocks; ++block) {
      const std::int64_t at = first_block + static_cast<std::int64_t>(block) * heads + g;
      total += __ldcg(p.scratch.partial + at * D + i % D);
      weight += __ldcg(p.scratch.partial_sum + at);
    }
    out[i] = from_float<T>(total / weight);
  }
  if (thread == 0) p.layer.lengths[x] = length + 1;
}

}  // namespace icecache::gpu

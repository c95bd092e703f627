// The kernels scan, rank and choose. Device code.
//
// Each (sequence, KV head) pair gets as many CUDA blocks as the device runs at once. They take the
// pair's chunks of kChunkTokens tokens in turn. scan adds up the weights of all tokens of a chunk,
// relative to the chunk's best score; choose subtracts the weights of those that become candidates.
#pragma once

#include <climits>

#include "cuda/step_common.h"

namespace icecache::gpu {

constexpr int kScanSteps = kChunkTokens / kBlock;
constexpr float kLog2E = 1.44269504f;
// Blocks that a multiprocessor of most devices holds at once.
constexpr int kScanBlocks = 4, kRankBlocks = 8, kChooseBlocks = 4;

// The tokens of a thread in a chunk, as scan and rank take them: a warp has 128 in a row, so that a
// far-field node is one warp's.
constexpr int kWarpTokens = kScanSteps * kWarp;
__device__ __forceinline__ int token_of(int begin, int k) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return begin + warp * kWarpTokens + k * kWarp + lane;
}

// Shared memory of a scan. Words: of a token's sketch. Nodes: far-field nodes of a chunk.
template <int Words, int Nodes>
struct ScanMemory {
  static constexpr int kMaxTiles = kMaxStepGroup / kHeadTile;
  uint4 cells[kScanSteps][Words / 4][kBlock];
  int queries[kMaxTiles][Words][2][kHeadTile];  // even dimensions of a word, then odd
  // Of a chunk; the next one's are others, while some warps still read these.
  int4 highest[2][kMaxTiles][kBlock / kWarp];
  float sums[2][kMaxTiles][Nodes][kHeadTile];
};

// What a block scans: chunks of one pair. Wide: a far-field node has 64 tokens, else 32.
template <int Words, bool Wide>
struct ScanBlock {
  static constexpr int kWarps = kBlock / kWarp, kShift = Words == 4 ? 1 : 2;
  static constexpr int kSteps = Wide ? 2 : 1, kNodes = kScanSteps / kSteps;  // of a node; of a warp
  using Memory = ScanMemory<Words, kWarps * kNodes>;

  const StepParams& p;
  Memory& shared;
  const int x, thread, lane, warp, count, tiles;

  // Asks for the codes of a chunk, which `part` holds. They come to shared memory while what is
  // made of those before them is computed; a thread reads what it asked for itself.
  __device__ __forceinline__ void ask(const std::byte* part, int chunk) const {
    const uint4* codes = reinterpret_cast<const uint4*>(part + p.layer.in_chunk);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
#pragma unroll
      for (int w = 0; w < Words / 4; ++w) {
        copy_async(&shared.cells[k][w][thread], codes + token_of(0, k) * (Words / 4) + w,
                   token_of(chunk * kChunkTokens, k) < count);
      }
    }
    end_copies();
  }

  __device__ __forceinline__ void load_queries() const {
    const int values = tiles * kHeadTile * Words * 2;
    const int* from =
        reinterpret_cast<const int*>(p.scratch.query_codes) + static_cast<std::int64_t>(x) * values;
#pragma unroll 1
    for (int i = thread; i < values; i += kBlock) {
      const int head = i / (Words * 2);
      shared.queries[head / kHeadTile][i / 2 % Words][i % 2][head % kHeadTile] = from[i];
    }
  }

  // Products of the thread's tokens with the queries of four heads.
  __device__ __forceinline__ void multiply(int tile, int (&scores)[kScanSteps][kHeadTile]) const {
#pragma unroll
    for (int w = 0; w < Words; ++w) {
      const int4 even4 = *reinterpret_cast<const int4*>(shared.queries[tile][w][0]);
      const int4 odd4 = *reinterpret_cast<const int4*>(shared.queries[tile][w][1]);
      const int even_query[kHeadTile] = {even4.x, even4.y, even4.z, even4.w};
      const int odd_query[kHeadTile] = {odd4.x, odd4.y, odd4.z, odd4.w};
#pragma unroll
      for (int k = 0; k < kScanSteps; ++k) {
        const uint4 cell = shared.cells[k][w / 4][thread];
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
  }

  // Stores them as scores; `largest` becomes the best of the warp, also where it has no token.
  __device__ __forceinline__ void store_scores(int tile, int begin,
                                               int (&scores)[kScanSteps][kHeadTile],
                                               int (&largest)[kHeadTile]) const {
    short4* out = reinterpret_cast<short4*>(p.scratch.scores) +
                  (static_cast<std::int64_t>(x) * tiles + tile) * p.shape.token_room;
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) largest[g] = INT_MIN;
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      const int token = token_of(begin, k);
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
    for (int g = 0; g < kHeadTile; ++g) largest[g] = max(warp_max(largest[g]), SHRT_MIN);
  }

  // Sums of the weights of each node over the warp's best score. A node is one warp's.
  __device__ __forceinline__ void sum_nodes(int begin, float unit,
                                            const int (&scores)[kScanSteps][kHeadTile],
                                            const int (&largest)[kHeadTile],
                                            float (*sums)[kHeadTile]) const {
    float weights[kNodes * kHeadTile] = {};
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      const bool counts = token_of(begin, k) < count;
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        const float weight = power_of_two(unit * small_to_float(scores[k][g] - largest[g]));
        weights[k / kSteps * kHeadTile + g] += counts ? weight : 0.0f;
      }
    }
    constexpr int kLanes = kWarp / (kNodes * kHeadTile);  // that get the same sum
    const float sum = warp_sums<kNodes * kHeadTile>(weights);
    const int at = lane / kLanes;
    if (lane % kLanes == 0) sums[warp * kNodes + at / kHeadTile][at % kHeadTile] = sum;
  }

  // All of the chunk, over its best score: a warp for each four heads, a lane for each node.
  __device__ __forceinline__ void store_chunk(int chunk, float unit, const int4* highest,
                                              const float (*sums)[kHeadTile]) const {
    const StepShape& s = p.shape;
    const int node_begin = chunk * kChunkTokens + lane * kSteps * kWarp;
    const bool has_node = lane < kWarps * kNodes && node_begin < count;
    const int4 of_warp =
        has_node ? highest[lane / kNodes] : int4{INT_MIN, INT_MIN, INT_MIN, INT_MIN};
    const int4 high = {warp_max(of_warp.x), warp_max(of_warp.y), warp_max(of_warp.z),
                       warp_max(of_warp.w)};
    float node[kHeadTile] = {};
    if (has_node) {
      const float* sum = sums[lane];
      node[0] = sum[0] * power_of_two(unit * small_to_float(of_warp.x - high.x));
      node[1] = sum[1] * power_of_two(unit * small_to_float(of_warp.y - high.y));
      node[2] = sum[2] * power_of_two(unit * small_to_float(of_warp.z - high.z));
      node[3] = sum[3] * power_of_two(unit * small_to_float(of_warp.w - high.w));
      if (s.tail) {
        const std::int64_t at =
            static_cast<std::int64_t>(x) * s.nodes() + node_begin / (kSteps * kWarp);
        reinterpret_cast<float4*>(p.scratch.mass)[at * tiles + warp] =
            make_float4(node[0], node[1], node[2], node[3]);
      }
    }
    const std::int64_t at =
        ((static_cast<std::int64_t>(x) * s.chunks() + chunk) * tiles + warp) * kHeadTile;
    const float sum = warp_sums<kHeadTile>(node);
    if (lane % 8 == 0) p.scratch.chunk_sum[at + lane / 8] = sum;
    if (lane == 0) *reinterpret_cast<int4*>(p.scratch.chunk_max + at) = high;
  }
};

// 1. The block asks for the codes of its first chunk, and reads the queries.
// 2. Of each chunk, each warp scores its tokens and sums up their weights. Warps have nothing to do
//    with each other until then. The next chunk is asked for when the codes have been read.
// 3. The sums of the warps become the chunk's.
template <int Words, bool Wide>
__global__ void __launch_bounds__(kBlock, kScanBlocks) scan_kernel(const StepParams p) {
  using Block = ScanBlock<Words, Wide>;
  __shared__ typename Block::Memory shared;
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const std::byte* const* parts = p.layer.chunks + static_cast<std::int64_t>(x) * s.chunks();
  // Asked for before it is known whether there is one, beside the length: one wait less.
  const std::byte* part = load_now(parts + blockIdx.x);
  const int length = length_of(p, x);
  if (is_idle(length)) return;
  const int count = index_tokens(s, length), blocks = gridDim.x;
  const int chunks = (count + kChunkTokens - 1) / kChunkTokens;
  int chunk = blockIdx.x;
  if (chunk >= chunks) return;
  const int tiles = s.padded_group() / kHeadTile;
  const Block block{p, shared, x, thread, lane, warp, count, tiles};

  // 1.
  block.ask(part, chunk);
  block.load_queries();
  const float unit = p.scratch.unit[x] * kLog2E;
  __syncthreads();
#pragma unroll 1
  for (int turn = 0; chunk < chunks; chunk += blocks, turn ^= 1) {
    const int begin = chunk * kChunkTokens, next = chunk + blocks;
    auto& highest = shared.highest[turn];
    auto& sums = shared.sums[turn];

    // 2.
    if (next < chunks) part = load_now(parts + next);
    wait_for_copies<0>();
    for (int tile = 0; tile < tiles; ++tile) {
      int scores[kScanSteps][kHeadTile] = {};
      block.multiply(tile, scores);
      if (tile == tiles - 1 && next < chunks) block.ask(part, next);
      int largest[kHeadTile];
      block.store_scores(tile, begin, scores, largest);
      if (lane == 0) highest[tile][warp] = {largest[0], largest[1], largest[2], largest[3]};
      block.sum_nodes(begin, unit, scores, largest, sums[tile]);
    }
    __syncthreads();

    // 3.
    if (warp < tiles) block.store_chunk(chunk, unit, highest[warp], sums[warp]);
  }
}

// Scores of a token in four heads, as scan wrote them.
struct FourScores {
  int2 raw;
  __device__ __forceinline__ int operator[](int g) const {
    const int pair = g < 2 ? raw.x : raw.y;
    return g % 2 == 0 ? static_cast<short>(pair) : pair >> 16;
  }
};

// How far the head that sees each of a thread's tokens best is above everything: a score less that
// of everything, `offset` [H], which is beyond reach where there is no such head. Tokens past the
// last have any score. All loads of a tile are under way before one is used.
__device__ __forceinline__ void best_scores(const StepShape& s, const int2* scores, int begin,
                                            int count, const int* offset, int* best) {
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) best[k] = INT_MIN;
  for (int tile = 0; tile < s.group; tile += kHeadTile, scores += s.token_room) {
    FourScores four[kScanSteps];
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      four[k].raw = scores[static_cast<unsigned>(min(token_of(begin, k), count - 1))];
    }
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
  __shared__ int offset[kMaxStepGroup];
  __shared__ int room[kBlock / kWarp];
  __shared__ int last_rank;
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
#pragma unroll 2
    for (int i = lane; i < chunks; i += kWarp) {
      high = max(high, p.scratch.chunk_max[first + i * heads + g]);
    }
    high = warp_max(high);
    float sum = 0.0f;
#pragma unroll 2
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
  const int2* scores = reinterpret_cast<const int2*>(p.scratch.scores) +
                       static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  std::uint16_t* ranks = p.scratch.ranks + static_cast<std::int64_t>(x) * s.token_room;
  const float scale = unit * kRanksPerNat;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int begin = chunk * kChunkTokens;
    int best[kScanSteps];
    best_scores(s, scores, begin, count, offset, best);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      // The last rank holds all that is too far to matter, and NaN: nobody counts it.
      const float below = ranks_below(best[k], scale);
      const int token = token_of(begin, k);
      const bool near = below < kRanks - 1.0f;
      const int rank = near ? static_cast<int>(fmaxf(below, 0.0f)) : kRanks - 1;
      if (token < count && near) atomicAdd(histogram + rank, 1u);
      if (token < (count + 7) / 8 * 8) {  // choose reads eight at a time
        ranks[token] = static_cast<std::uint16_t>(token < count ? rank : 0xffff);
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
  if (thread == 0) last_rank = count <= kMaxCandidates ? kRanks - 1 : kRanks - 2;
  if (!is_last_block(p.scratch.blocks_ranked + x, min(gridDim.x, static_cast<unsigned>(chunks)))) {
    return;
  }
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

// A warp takes 256 tokens at a time, a lane eight of them; nearly all warps find no candidate.
static __global__ void __launch_bounds__(kBlock, kChooseBlocks) choose_kernel(const StepParams p) {
  constexpr int kWarps = kBlock / kWarp, kOwn = 8, kTokens = kOwn * kWarp;
  constexpr unsigned kTop = 0x80008000u;  // of the two ranks of a word
  __shared__ float4 chosen_weights[kWarps][kWarp];
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int length = length_of(p, x);
  if (is_idle(length)) return;
  const int count = index_tokens(s, length), heads = s.padded_group();
  const unsigned beyond = static_cast<unsigned>(p.scratch.last_rank[x] + 1) * 0x00010001u;
  const float in_bits = p.scratch.unit[x] * kLog2E;
  const auto* ranks =
      reinterpret_cast<const uint4*>(p.scratch.ranks + static_cast<std::int64_t>(x) * s.token_room);
  const int2* scores = reinterpret_cast<const int2*>(p.scratch.scores) +
                       static_cast<std::int64_t>(x) * (heads / kHeadTile) * s.token_room;
  const std::int32_t* chunk_max =
      p.scratch.chunk_max + static_cast<std::int64_t>(x) * s.chunks() * heads;
  // A lane has the masses of one node and four heads.
  const int node_tokens = s.far_node_tokens;
  const int lanes = node_tokens / kOwn;  // of a node
  const int tiles = heads / kHeadTile, tile = lane % tiles, node = lane / tiles;
  float4* mass =
      reinterpret_cast<float4*>(p.scratch.mass) + static_cast<std::int64_t>(x) * s.nodes() * tiles;
  float shift[kHeadTile];
#pragma unroll
  for (int g = 0; g < kHeadTile; ++g) {
    const std::int64_t head = static_cast<std::int64_t>(x) * heads + tile * kHeadTile + g;
    shift[g] = tile * kHeadTile + g < s.group
                   ? (p.scratch.bias[head] - p.scratch.lse[head]) * kLog2E
                   : -INFINITY;
  }
  for (int first = (blockIdx.x * kWarps + warp) * kTokens; first < count;
       first += gridDim.x * kWarps * kTokens) {
    const int token = first + lane * kOwn;
    const uint4 eight = token < count ? ranks[token / kOwn] : make_uint4(~0u, ~0u, ~0u, ~0u);
    const std::int32_t* highest = chunk_max + first / kChunkTokens * heads;
    const bool has_node =
        s.tail && node < kTokens >> s.far_shift() && first + node * node_tokens < count;
    float4* own_mass = mass + (first >> s.far_shift()) * tiles + lane;
    float4 left = has_node ? *own_mass : make_float4(0, 0, 0, 0);
    const int4 high = *reinterpret_cast<const int4*>(highest + tile * kHeadTile);
    // Bits that are set: ranks past the last.
    const unsigned past[kOwn / 2] = {
        ((eight.x | kTop) - beyond) & kTop, ((eight.y | kTop) - beyond) & kTop,
        ((eight.z | kTop) - beyond) & kTop, ((eight.w | kTop) - beyond) & kTop};
    const bool any = (past[0] & past[1] & past[2] & past[3]) != kTop;
    if (__ballot_sync(~0u, any) != 0) {
      unsigned chosen_bits = 0;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        chosen_bits |= (~past[k / 2] >> (k % 2 * 16 + 15) & 1u) << k;
      }
      for (unsigned bits = chosen_bits; bits != 0; bits &= bits - 1) {
        const std::uint32_t at = atomicAdd(p.scratch.found + x, 1u);
        p.scratch.tokens[x * kMaxCandidates + at] = token + __ffs(static_cast<int>(bits)) - 1;
      }
      for (int t = 0; t < tiles; ++t) {
        const int* best = highest + t * kHeadTile;
        float weight[kHeadTile] = {};
        for (unsigned bits = chosen_bits; bits != 0; bits &= bits - 1) {
          const int of_token = token + __ffs(static_cast<int>(bits)) - 1;
          const FourScores score = {scores[static_cast<std::int64_t>(t) * s.token_room + of_token]};
#pragma unroll
          for (int g = 0; g < kHeadTile; ++g) {
            weight[g] += power_of_two(in_bits * small_to_float(score[g] - best[g]));
          }
        }
#pragma unroll
        for (int g = 0; g < kHeadTile; ++g) weight[g] = warp_sum(weight[g], lanes);
        if (lane % lanes == 0) {
          chosen_weights[warp][lane / lanes * tiles + t] =
              make_float4(weight[0], weight[1], weight[2], weight[3]);
        }
      }
      __syncwarp();
      const float4 chosen = chosen_weights[warp][lane];
      left.x = fmaxf(left.x - chosen.x, 0.0f);
      left.y = fmaxf(left.y - chosen.y, 0.0f);
      left.z = fmaxf(left.z - chosen.z, 0.0f);
      left.w = fmaxf(left.w - chosen.w, 0.0f);
      __syncwarp();
    }
    if (has_node) {
      *own_mass = make_float4(left.x * power_of_two(in_bits * small_to_float(high.x) + shift[0]),
                              left.y * power_of_two(in_bits * small_to_float(high.y) + shift[1]),
                              left.z * power_of_two(in_bits * small_to_float(high.z) + shift[2]),
                              left.w * power_of_two(in_bits * small_to_float(high.w) + shift[3]));
    }
  }
}

}  // namespace icecache::gpu

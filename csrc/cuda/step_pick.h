// resolve, pick: a block for each pair, a thread for each candidate. Device code.
#pragma once

#include <climits>

#include "cuda/step_common.h"

namespace icecache::gpu {

constexpr int kPickBlock = kMaxCandidates;
constexpr float kLargestExponent = 80.0f;

// Sorts the integers of a block of kMaxCandidates threads, ascending (bitonic): thread i gets the
// i-th. `room`: shared, an integer of each; only warps that exchange meet a barrier.
__device__ __forceinline__ int sort_tokens(int token, int* room) {
  const int i = threadIdx.x;
#pragma unroll 1
  for (int size = 2; size <= kMaxCandidates; size *= 2) {
#pragma unroll 1
    for (int stride = size / 2; stride > 0; stride /= 2) {
      int other;
      if (stride >= kWarp) {
        room[i] = token;
        __syncthreads();
        other = room[i ^ stride];
        __syncthreads();
      } else {
        other = __shfl_xor_sync(~0u, token, stride);
      }
      const bool takes_low = ((i & size) == 0) == ((i & stride) == 0);
      token = takes_low ? min(token, other) : max(token, other);
    }
  }
  return token;
}

static __global__ void __launch_bounds__(kPickBlock) resolve_kernel(const StepParams p) {
  constexpr int kAges = 1024;
  __shared__ int victims[kMaxCandidates];  // first the tokens, while they are sorted
  __shared__ int ages[kAges];
  __shared__ int room[kPickBlock / kWarp];
  __shared__ int oldest, wanted_of_oldest;
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.x, thread = threadIdx.x;
  const int length = length_of(p, x);
  if (is_idle(length)) return;
  const int found = static_cast<int>(p.scratch.found[x]);  // <= kMaxCandidates
  const int now = length + 1;                              // stamps of this step; 0: never used
  for (int i = thread; i < kAges; i += kPickBlock) ages[i] = 0;
  const int token = sort_tokens(
      thread < found ? p.scratch.tokens[x * kMaxCandidates + thread] : INT_MAX, victims);

  std::int32_t* owner = p.layer.owner + static_cast<std::int64_t>(x) * s.cached_rows;
  std::int32_t* stamp = p.layer.stamp + static_cast<std::int64_t>(x) * s.cached_rows;
  const bool asked = thread < found;
  int row = asked ? row_of(s, p.layer, x, token) : -1;
  const bool missing = asked && row < 0;
  if (asked && !missing) stamp[row] = now;
  int misses = 0;
  const int mine = block_rank(missing, room, misses);  // has a barrier: stamps are seen

  // The rows longest unused, by a histogram of ages.
  if (misses > 0) {
    const auto age_of = [&](int r) {
      return stamp[r] == 0 ? kAges - 1 : min(now - stamp[r], kAges - 2);
    };
#pragma unroll 2
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
#pragma unroll 1
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
      if (owner[row] >= 0) row_of(s, p.layer, x, owner[row]) = -1;
      owner[row] = token;
      stamp[row] = now;
      p.layer.has_value[static_cast<std::int64_t>(x) * s.cached_rows + row] = 0;
      row_of(s, p.layer, x, token) = static_cast<std::int16_t>(row);
    }
  }
  if (asked) {
    const int in_rows = s.near_rows() + row;
    p.scratch.tokens[x * kMaxCandidates + thread] = token;
    p.scratch.token_rows[x * kMaxCandidates + thread] = missing ? ~in_rows : in_rows;
  }
  if (thread == 0) {
    unsigned long long* counters = p.layer.counters + static_cast<std::int64_t>(x) * kCounters;
    counters[0] += found - misses;
    counters[1] += misses;
    counters[2] +=
        static_cast<unsigned long long>(misses) * s.head_dim * (s.dtype == DType::kFloat32 ? 4 : 2);
    counters[3] += 1;
  }
}

// A multiprocessor has registers for three blocks: the one of pick leaves room for attend's, which
// begin before it ends.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kPickResident = 2;  // as many threads as there may be
#else
constexpr int kPickResident = 3;
#endif

struct PickMemory {
  int nodes[kMaxCandidates];
  short leader[kMaxCandidates];  // the first candidate of a candidate's node
  std::uint8_t picked[kMaxCandidates];
  float4 left_weights[kMaxCandidates];  // of candidates that are not picked
  float4 shares[kMaxCandidates];
  float4 of_warps[kPickBlock / kWarp];
  int scan_room[kPickBlock / kWarp];
  float references[kMaxStepGroup], far_scales[kMaxStepGroup], near_lse[kMaxStepGroup],
      all_lse[kMaxStepGroup];
};

// A thread's candidate, and what it has in common with the others of the pair.
struct PickCandidate {
  const StepParams& p;
  PickMemory& shared;
  const int x, i, lane, warp, heads, near, found;
  const bool is_candidate;
  const float4* const logits;  // [heads / kHeadTile]
  const std::int64_t entry0;   // of the pair
  int at = 0, node_at = 0;     // its entry, and its node's, where there are any
  bool takes = false, leads = false;

  __device__ __forceinline__ float4& entry_weights(int entry, int tile) const {
    return *reinterpret_cast<float4*>(p.scratch.entry_weights + (entry0 + entry) * heads + tile);
  }
  __device__ __forceinline__ float4 logits_or(int tile, float none) const {
    return is_candidate ? logits[tile / kHeadTile] : make_float4(none, none, none, none);
  }

  // What it is worth: its mass beside sink, window and the other candidates, summed over heads.
  // The heads' references become the largest of all logarithms.
  __device__ __forceinline__ float mass() const {
    float mass = 0.0f;
    for (int tile = 0; tile < p.shape.group; tile += kHeadTile) {
      const float4 four = logits_or(tile, -INFINITY);
      const float own[kHeadTile] = {four.x, four.y, four.z, four.w};
      float high[kHeadTile], sum[kHeadTile];
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) high[g] = warp_max(own[g]);
      if (lane == 0) shared.of_warps[warp] = make_float4(high[0], high[1], high[2], high[3]);
      __syncthreads();
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) high[g] = shared.near_lse[tile + g];
#pragma unroll 2
      for (int w = 0; w < kPickBlock / kWarp; ++w) {
        const float4 of_warp = shared.of_warps[w];
        high[0] = fmaxf(high[0], of_warp.x);
        high[1] = fmaxf(high[1], of_warp.y);
        high[2] = fmaxf(high[2], of_warp.z);
        high[3] = fmaxf(high[3], of_warp.w);
      }
      __syncthreads();
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        sum[g] = warp_sum(expf(own[g] - high[g]));
      }
      if (lane == 0) shared.of_warps[warp] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      __syncthreads();
      float4 total = make_float4(
          expf(shared.near_lse[tile] - high[0]), expf(shared.near_lse[tile + 1] - high[1]),
          expf(shared.near_lse[tile + 2] - high[2]), expf(shared.near_lse[tile + 3] - high[3]));
#pragma unroll 2
      for (int w = 0; w < kPickBlock / kWarp; ++w) total += shared.of_warps[w];
      const float totals[kHeadTile] = {total.x, total.y, total.z, total.w};
#pragma unroll
      for (int g = 0; g < kHeadTile; ++g) {
        if (tile + g < p.shape.group) mass += expf(own[g] - high[g]) / totals[g];
        if (i == 0) shared.references[tile + g] = fmaxf(high[g], shared.all_lse[tile + g]);
      }
      __syncthreads();
    }
    return mass;
  }

  // Whether it is among the budget's best: those above the largest threshold that enough of them
  // reach; ties by token. Returns how many are.
  __device__ __forceinline__ int choose(float mass) {
    const unsigned bits = is_candidate ? __float_as_uint(mass) + 1 : 0;
    const int budget = min(p.shape.select_tokens, found);
    unsigned threshold = 0;
#pragma unroll 1
    for (int bit = 31; bit >= 0; --bit) {
      const unsigned tried = threshold | 1u << bit;
      if (__syncthreads_count(bits >= tried) >= budget) threshold = tried;
    }
    int better = 0, ties = 0, taken = 0;
    block_rank(bits > threshold, shared.scan_room, better);
    const int order = block_rank(bits == threshold, shared.scan_room, ties);
    takes = is_candidate && (bits > threshold || (bits == threshold && order < budget - better));
    at = near + block_rank(takes, shared.scan_room, taken);
    shared.picked[i] = takes ? 1 : 0;
    return taken;
  }

  // A node stands for its tokens that were not picked, with the mean of their values: that is
  // (tokens x mean - sum of the picked values) / left. The entry of a node is what that weighs more
  // than choose said: attend has begun with the nodes. `count`: tokens of the index.
  __device__ __forceinline__ void weigh_node(int tile, int count) const {
    const StepShape& s = p.shape;
    const float* scale = shared.far_scales + tile;
    const int node = shared.nodes[i];
    const float4 others = *reinterpret_cast<const float4*>(
        p.scratch.mass + (static_cast<std::int64_t>(x) * s.nodes() + node) * heads + tile);
    float4 sum = others;
    const int held = min(s.far_node_tokens, count - node * s.far_node_tokens);
    int left = held;
    for (int j = i; j < found && shared.nodes[j] == node; ++j) {
      shared.leader[j] = static_cast<short>(i);
      left -= shared.picked[j];
      sum += shared.left_weights[j];
    }
    const float each = left > 0 ? 1.0f / static_cast<float>(left) : 0.0f;
    shared.shares[i] = make_float4(sum.x * each, sum.y * each, sum.z * each, sum.w * each);
    const float all = each * static_cast<float>(held);
    entry_weights(node_at, tile) =
        make_float4((sum.x * all - others.x) * scale[0], (sum.y * all - others.y) * scale[1],
                    (sum.z * all - others.z) * scale[2], (sum.w * all - others.w) * scale[3]);
  }

  // Weights of the candidates and their nodes, for four heads.
  __device__ __forceinline__ void weigh(int tile, int count) const {
    const StepShape& s = p.shape;
    const float4 own = logits_or(tile, 0.0f);
    const float *lse = shared.all_lse + tile, *scale = shared.far_scales + tile;
    shared.left_weights[i] = is_candidate && !takes
                                 ? make_float4(expf(fminf(own.x - lse[0], kLargestExponent)),
                                               expf(fminf(own.y - lse[1], kLargestExponent)),
                                               expf(fminf(own.z - lse[2], kLargestExponent)),
                                               expf(fminf(own.w - lse[3], kLargestExponent)))
                                 : make_float4(0, 0, 0, 0);
    __syncthreads();
    if (leads) weigh_node(tile, count);
    __syncthreads();
    const float* reference = shared.references + tile;
    if (takes) {
      const float4 share = s.tail ? shared.shares[shared.leader[i]] : make_float4(0, 0, 0, 0);
      const auto weight = [&](int g, float logit, float of_node) {
        return tile + g < s.group ? expf(logit - reference[g]) - of_node * scale[g] : 0.0f;
      };
      entry_weights(at, tile) = make_float4(weight(0, own.x, share.x), weight(1, own.y, share.y),
                                            weight(2, own.z, share.z), weight(3, own.w, share.w));
    }
  }

  // Weights of sink and window, for four heads.
  __device__ __forceinline__ void weigh_near(int tile) const {
    const StepShape& s = p.shape;
    const float* reference = shared.references + tile;
#pragma unroll 1
    for (int e = i; e < near; e += kPickBlock) {
      const float4 logit = *reinterpret_cast<const float4*>(
          p.scratch.near_logits + (static_cast<std::int64_t>(x) * s.near_rows() + e) * heads +
          tile);
      entry_weights(e, tile) =
          make_float4(expf(logit.x - reference[0]), expf(logit.y - reference[1]),
                      expf(logit.z - reference[2]), expf(logit.w - reference[3]));
    }
  }
};

// 1. Each thread reads its candidate.
// 2. What the candidates are worth, and which of them the budget takes.
// 3. Entries: sink and window, then what was picked, then nodes that have candidates. Each node's
//    first candidate leads it.
// 4. Their weights, which need all of that.
static __global__ void __launch_bounds__(kPickBlock, kPickResident)
    pick_kernel(const StepParams p) {
  __shared__ PickMemory shared;
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.x, i = threadIdx.x, lane = i % kWarp, warp = i / kWarp;
  const int length = length_of(p, x);
  if (is_idle(length)) return;
  const int heads = s.padded_group(), near = near_count(s, length);
  const int count = index_tokens(s, length);
  const int found = static_cast<int>(p.scratch.found[x]);  // <= kMaxCandidates
  const std::int64_t head0 = static_cast<std::int64_t>(x) * heads;

  // 1. Asked for before it is known whether they are there: one wait less.
  const bool is_candidate = i < found;
  if (i < heads) {
    shared.near_lse[i] = p.scratch.near_lse[head0 + i];
    shared.all_lse[i] = p.scratch.lse[head0 + i];
  }
  const int own_token = p.scratch.tokens[x * kMaxCandidates + i];
  const int own_row = p.scratch.token_rows[x * kMaxCandidates + i];
  const int node = is_candidate ? own_token >> s.far_shift() : INT_MAX;
  shared.nodes[i] = node;
  const int in_rows = own_row < 0 ? ~own_row : own_row;
  std::uint8_t* has_value = p.layer.has_value + static_cast<std::int64_t>(x) * s.cached_rows +
                            (is_candidate ? in_rows - s.near_rows() : 0);
  const bool has_own_value = *has_value != 0;
  const float4* own_logits = reinterpret_cast<const float4*>(
      p.scratch.logits + (static_cast<std::int64_t>(x) * kMaxCandidates + i) * heads);
  const std::int64_t entry0 = static_cast<std::int64_t>(x) * s.entries();
  PickCandidate own{p,     shared,       x,          i,     lane, warp, heads, near,
                    found, is_candidate, own_logits, entry0};

  // 2.
  const int taken = own.choose(own.mass());

  // 3.
  if (own.takes) {
    p.scratch.entry_rows[entry0 + own.at] = in_rows;
    p.scratch.entry_sources[entry0 + own.at] = has_own_value ? -1 : own_token;
    if (!has_own_value) {
      atomicAdd(p.layer.counters + static_cast<std::int64_t>(x) * kCounters + 2,
                static_cast<unsigned long long>(s.head_dim * (s.dtype == DType::kFloat32 ? 4 : 2)));
    }
    *has_value = 1;
  }
#pragma unroll 1
  for (int e = i; e < near; e += kPickBlock) {
    p.scratch.entry_rows[entry0 + e] = e;
    p.scratch.entry_sources[entry0 + e] = -1;
  }
  if (i < heads) {
    shared.far_scales[i] = i < s.group ? expf(shared.all_lse[i] - shared.references[i]) : 0.0f;
    p.scratch.far_scale[head0 + i] = shared.far_scales[i];
  }
  own.leads = is_candidate && s.tail && (i == 0 || shared.nodes[i - 1] != node);
  int leaders = 0;
  own.node_at = near + taken + block_rank(own.leads, shared.scan_room, leaders);
  if (own.leads) {
    p.scratch.entry_rows[entry0 + own.node_at] = s.rows() + node;
    p.scratch.entry_sources[entry0 + own.node_at] = -1;
  }
  if (i == 0) p.scratch.entry_count[x] = near + taken + leaders;

  // 4.
  for (int tile = 0; tile < heads; tile += kHeadTile) own.weigh(tile, count);
  for (int tile = 0; tile < heads; tile += kHeadTile) own.weigh_near(tile);
}

}  // namespace icecache::gpu

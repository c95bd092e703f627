// append_all: all tokens of a step of several, for sequences that are resident. Device code.
#pragma once

#include "cuda/step_append.h"

namespace icecache::gpu {

// Two blocks for each pair: keys and values, and queries.
// 1. Each token in turn, while the pair is resident: it holds all tokens so far, and has capacity
//    for one more. Later tokens are the chain's.
// 2. What attend_all, and the chain, have to know of the tokens.
template <typename T, int D>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<T>) append_all_kernel(const StepParams p) {
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.x, heads = s.kv_heads, pairs = s.pairs();
  const bool stores = blockIdx.y == 0, notes = stores && threadIdx.x == 0;
  const int capacity = min(s.near_rows() + p.layer.room[x], p.layer.extent_room[x]);
  int length = p.layer.lengths[x], taken = 0;
  bool is_resident = length >= 0 && length == p.layer.resident[x];
#pragma unroll 1
  for (int token = 0; token < p.tokens; ++token) {
    // 1.
    const int row = p.rows[token * s.batch + x / heads];
    const int input = row < 0 ? -1 : row * heads + x % heads;
    if (row >= 0 && length >= capacity) is_resident = false;
    if (is_resident) taken = token + 1;
    const bool takes = is_resident && row >= 0;
    if (notes) {  // 2.
      const std::int64_t place = static_cast<std::int64_t>(token) * pairs + x;
      p.scratch.inputs[place] = input;
      p.scratch.resident_lengths[place] = takes ? length : -1;
      p.scratch.blocks_done[place] = 0;
    }
    if (!takes) continue;
    if (stores) {
      store_token<T, D>(p, x, input, length, true);
      __syncthreads();  // the next token may displace this one
    } else {
      keep_queries<T, D>(p, x, input, length);
    }
    ++length;
  }
  if (notes) p.scratch.taken[x] = taken;
}

}  // namespace icecache::gpu

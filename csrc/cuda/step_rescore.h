// rescore: exact logits of the candidates. Device code.
#pragma once

#include "cuda/step_common.h"

namespace icecache::gpu {

constexpr int kRescoreUnroll = 4;  // rows in flight of each part of a warp

template <typename T, int D>
__global__ void __launch_bounds__(kBlock) rescore_kernel(const StepParams p) {
  using Shape = RowShape<T, D>;
  __shared__ float query[kMaxStepGroup * D];
  wait_for_earlier_kernel();
  const StepShape& s = p.shape;
  const int x = blockIdx.y, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  if (is_idle(length_of(p, x))) return;
  const int found = static_cast<int>(p.scratch.found[x]);  // <= kMaxCandidates
  constexpr int kOfBlock = kBlock / kWarp * Shape::kRows * kRescoreUnroll;
  const int begin = blockIdx.x * kOfBlock;
  if (begin >= found) return;
  load_queries<T, D, kBlock>(p, input_of(p, x), query);
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
                                  : host_key<T>(p.shape, p.layer, x,
                                                p.scratch.tokens[x * kMaxCandidates + c], D);
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
    const int heads = s.padded_group();
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

}  // namespace icecache::gpu

// What a warp of attend adds up: sum over rows of weight times value, for each head. Two ways of
// the same interface: by lanes, and by tensor cores. Device code.
#pragma once

#include <type_traits>

#include "cuda/gpu.h"
#include "cuda/step.h"

namespace icecache::gpu {

constexpr int kAttendVectors = 4;  // 16-byte parts of values of a lane in a stage

// What a warp adds up at once: values of some rows and their weights. Vectors of a row stand in an
// order of their own, so that the same vectors of eight rows lie in different banks.
template <typename T, int D, int Tiles>
struct AttendStage {
  using Shape = RowShape<T, D>;
  static constexpr int kUnroll = kAttendVectors / Shape::kPerLane;
  static constexpr int kRows = kUnroll * Shape::kRows;           // divides the nodes of a chunk
  static constexpr int kRoom = Shape::kLanes * Shape::kPerLane;  // of a row, in vectors
  static_assert(kRows * Tiles <= kWarp, "a lane copies one weight at most");
  static_assert(kRoom % 8 == 0);
  uint4 values[kRows][kRoom];
  float4 weights[kRows * Tiles];

  __device__ __forceinline__ uint4* vector(int row, int v) { return values[row] + (v ^ row % 8); }
  __device__ __forceinline__ const uint4* vector(int row, int v) const {
    return values[row] + (v ^ row % 8);
  }
};

// Each lane has its vectors of some rows, all heads of them.
template <typename T, int D, int Tiles>
class LaneSums {
  using Shape = RowShape<T, D>;
  using Stage = AttendStage<T, D, Tiles>;
  static constexpr int kHeads = Tiles * kHeadTile;

 public:
  __device__ __forceinline__ void add(const Stage& stage) {
    const int lane = threadIdx.x % kWarp, own = lane / Shape::kLanes, within = lane % Shape::kLanes;
#pragma unroll
    for (int u = 0; u < Stage::kUnroll; ++u) {
      const int row = u * Shape::kRows + own;
      float weight[kHeads];
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const float4 four = stage.weights[row * Tiles + t];
        weight[t * 4] = four.x;
        weight[t * 4 + 1] = four.y;
        weight[t * 4 + 2] = four.z;
        weight[t * 4 + 3] = four.w;
      }
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        float value[Shape::kCount];
        Vector<T>{*stage.vector(row, Shape::vector(within, j))}.unpack(value);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
#pragma unroll
          for (int i = 0; i < Shape::kCount; ++i) {
            sums_[g][j * Shape::kCount + i] += weight[g] * value[i];
          }
        }
      }
    }
  }

  // `by`: of a head, what its sums so far are multiplied by.
  template <typename Scale>
  __device__ __forceinline__ void scale(const Scale& by) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const float factor = by(g);
#pragma unroll
      for (int i = 0; i < Shape::kElements; ++i) sums_[g][i] *= factor;
    }
  }

  // The warp's sums [kHeads, D].
  __device__ __forceinline__ void store(float* to) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      for (int offset = Shape::kLanes; offset < kWarp; offset *= 2) {
#pragma unroll
        for (int i = 0; i < Shape::kElements; ++i) {
          sums_[g][i] += __shfl_xor_sync(~0u, sums_[g][i], offset);
        }
      }
      if (lane >= Shape::kLanes) continue;
#pragma unroll
      for (int j = 0; j < Shape::kPerLane; ++j) {
        const int v = Shape::vector(lane, j);
        if (v >= Shape::kVectors) continue;
#pragma unroll
        for (int i = 0; i < Shape::kCount; ++i) {
          to[g * D + v * Shape::kCount + i] = sums_[g][j * Shape::kCount + i];
        }
      }
    }
  }

 private:
  float sums_[kHeads][Shape::kElements] = {};
};

// A tenth of the instructions: products [16 dimensions, 8 rows] x [8 rows, 8], where the last eight
// are four heads twice. A weight is two bfloat16, its rounded value and what that leaves, which is
// 16 bits of it and its whole range; products and sums are fp32.
template <int D, int Tiles>
class TensorSums {
  using Stage = AttendStage<BFloat16, D, Tiles>;
  static constexpr int kAtOnce = 8, kPieces = D / 16;  // rows; of D
  static constexpr int kSteps = (Stage::kRows + kAtOnce - 1) / kAtOnce;
  static constexpr bool kHalf = Stage::kRows < kAtOnce;  // then the other rows weigh nothing
  static_assert(Stage::kRows % kAtOnce == 0 || (kHalf && Stage::kRows * 2 == kAtOnce));

 public:
  __device__ __forceinline__ void add(const Stage& stage) {
    const int lane = threadIdx.x % kWarp;
    const int head = lane / 4 % kHeadTile;
    const bool rest = lane >= kWarp / 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int first = step * kAtOnce + lane % 4 * 2;
      std::uint32_t weights[Tiles];
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        weights[t] = 0;
        if (kHalf && first >= Stage::kRows) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float weight =
              reinterpret_cast<const float*>(stage.weights + (first + i) * Tiles + t)[head];
          BFloat16 part = from_float<BFloat16>(weight);
          if (rest) part = from_float<BFloat16>(weight - to_float(part));
          weights[t] |= static_cast<std::uint32_t>(part.bits) << (16 * i);
        }
      }
      const int row = (step * kAtOnce + lane % 8) % Stage::kRows;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += 2) {
        const uint4 values = load_transposed(stage.vector(row, piece * 2 + lane / 8));
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          multiply_add(sums_[t][piece], values.x, values.y, weights[t]);
          multiply_add(sums_[t][piece + 1], values.z, values.w, weights[t]);
        }
      }
    }
  }

  template <typename Scale>
  __device__ __forceinline__ void scale(const Scale& by) {
    const int head = threadIdx.x % 2 * 2;  // and the next
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const float factors[2] = {by(t * kHeadTile + head), by(t * kHeadTile + head + 1)};
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[t][piece][i] *= factors[i % 2];
      }
    }
  }

  __device__ __forceinline__ void store(float* to) {
    const int lane = threadIdx.x % kWarp;
    const int head = lane % 2 * 2, dimension = lane / 4;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sum =
              sums_[t][piece][i] + __shfl_xor_sync(~0u, sums_[t][piece][i], 2);  // both parts
          if (lane % 4 < 2) {
            to[(t * kHeadTile + head + i % 2) * D + piece * 16 + i / 2 * 8 + dimension] = sum;
          }
        }
      }
    }
  }

 private:
  float sums_[Tiles][kPieces][4] = {};
};

// Tensor cores where they take the values as they are and weights of any size.
template <typename T, int D, int Tiles>
using AttendSums = std::conditional_t<kHasTensorCores && std::is_same_v<T, BFloat16>,
                                      TensorSums<D, Tiles>, LaneSums<T, D, Tiles>>;

}  // namespace icecache::gpu

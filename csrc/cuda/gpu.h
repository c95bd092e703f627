// What every kernel is written against: CUDA itself, or, with ICECACHE_EMULATE_CUDA, the emulator
// of tests/cpp/emulator, which runs the same sources on a CPU thread, a fibre for each CUDA thread.
#pragma once

#include <cstdint>

#ifdef ICECACHE_EMULATE_CUDA
#include <emulator.h>
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "cuda/device.h"
#include "icecache/types.h"

namespace icecache::gpu {

constexpr int kWarp = 32;

// Elements of the cache as stored; arithmetic is in fp32.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// 16 bytes of a row.
template <typename T>
struct Vector {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  uint4 raw;

  __device__ __forceinline__ void unpack(float* out) const {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        out[i] = __uint_as_float(words[i]);
      } else {
        out[2 * i] = to_float(T{static_cast<std::uint16_t>(words[i] & 0xffffu)});
        out[2 * i + 1] = to_float(T{static_cast<std::uint16_t>(words[i] >> 16)});
      }
    }
  }
};

// How a warp reads rows of D elements: kLanes lanes to a row, kPerLane vectors to a lane.
template <typename T, int D>
struct RowShape {
  static constexpr int kCount = Vector<T>::kCount;
  static constexpr int kVectors = D / kCount;
  static constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;
  static constexpr int kPerLane = (kVectors + kLanes - 1) / kLanes;
  static constexpr int kRows = kWarp / kLanes;  // a warp reads at once
  static constexpr int kElements = kPerLane * kCount;
  // The vector that lane l reads as its j-th; >= kVectors: none.
  __device__ __forceinline__ static int vector(int lane, int j) { return lane + j * kLanes; }
};

template <typename T>
__device__ __forceinline__ const uint4* vectors_of(const T* row) {
  return reinterpret_cast<const uint4*>(row);
}

// *from, loaded at this point of the program. The compiler would move an ordinary load behind a
// later branch, and its latency would no longer overlap with what comes before the branch.
template <typename T>
__device__ __forceinline__ T* load_now(T* const* from) {
#ifdef __CUDA_ARCH__
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from));
  return reinterpret_cast<T*>(value);
#else
  return *from;
#endif
}

// Copies 16 bytes from global or mapped host memory to shared memory, where they arrive later, or
// writes zeros and reads nothing where they are not `there`. Copies are waited for in groups, each
// ended by end_copies(): all but a thread's last `Left` groups have arrived behind the wait, for
// that thread. Compute capability 7.5 copies at once.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int Left>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#endif
}

__device__ __forceinline__ float4& operator+=(float4& a, float4 b) {
  a.x += b.x;
  a.y += b.y;
  a.z += b.z;
  a.w += b.w;
  return a;
}

// Of bfloat16, with sums in fp32.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;
#else
constexpr bool kHasTensorCores = true;
#endif

// Four matrices [8, 8] of 2-byte elements from shared memory, transposed. Lane l says where row
// l % 8 of matrix l / 8 stands, and gets of each matrix rows 2 (l % 4) and the next, column l / 4.
__device__ __forceinline__ uint4 load_transposed(const uint4* row) {
#ifdef ICECACHE_EMULATE_CUDA
  return emulator::load_transposed(row);
#else
  uint4 result = make_uint4(0, 0, 0, 0);
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
  return result;
#endif
}

// sums += a b, of matrices a [16, 8], b [8, 8] of bfloat16. Lane l has a[l / 4, k..] in a0,
// a[l / 4 + 8, k..] in a1, b[k.., l / 4] in b, with k = 2 (l % 4) and the next, and of the sums
// [16, 8] rows l / 4 and l / 4 + 8 of columns k.. (PTX, mma.m16n8k8).
__device__ __forceinline__ void multiply_add(float (&sums)[4], std::uint32_t a0, std::uint32_t a1,
                                             std::uint32_t b) {
#ifdef ICECACHE_EMULATE_CUDA
  emulator::multiply_add(sums, a0, a1, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(b));
#endif
}

__device__ __forceinline__ float warp_sum(float x, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
}
__device__ __forceinline__ int warp_max(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, x);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = max(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
#endif
}

__device__ __forceinline__ int warp_sum(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(~0u, x);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
#endif
}

// What the block's warps put into `room` [warps]: the sum over the warps before this one; `total`
// becomes the sum over all. All threads of the block call it, which have at most 32 warps.
__device__ __forceinline__ int warps_scan(const int* room, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();
  const int of_warp = lane < warps ? room[lane] : 0;
  __syncthreads();
  total = warp_sum(of_warp);
  return warp_sum(lane < warp ? of_warp : 0);
}

// Sum over the block's threads before this one; `total` becomes the sum over all. `room`: shared,
// one int for each warp. All threads of the block call it.
__device__ __forceinline__ int block_scan(int x, int* room, int& total) {
  const int lane = threadIdx.x % kWarp;
  int sum = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += below;
  }
  if (lane == kWarp - 1) room[threadIdx.x / kWarp] = sum;
  return warps_scan(room, total) + sum - x;
}

// How many of the block's threads before this one have their flag set; `total`: how many have.
// `room` as for block_scan.
__device__ __forceinline__ int block_rank(bool flag, int* room, int& total) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned flags = __ballot_sync(~0u, flag);
  if (lane == 0) room[threadIdx.x / kWarp] = __popc(flags);
  return warps_scan(room, total) + __popc(flags & ((1u << lane) - 1));
}

// Adds up each of N values over the 32 lanes of a warp, N a power of two. Lane l returns the sum of
// values[l / (32 / N)] over all lanes. `values` is overwritten.
template <int N, int Offset = kWarp / 2>
__device__ __forceinline__ float warp_sums(float* values) {
  if constexpr (N == 1) {
    return warp_sum(values[0], 2 * Offset);
  } else {
    const bool upper = (threadIdx.x & Offset) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float sent = upper ? values[i] : values[i + N / 2];
      values[i] = (upper ? values[i + N / 2] : values[i]) + __shfl_xor_sync(~0u, sent, Offset);
    }
    return warp_sums<N / 2, Offset / 2>(values);
  }
}

// Of an integer within +-2^22: an addition, where a conversion takes four times as long.
__device__ __forceinline__ float small_to_float(int x) {
  return __uint_as_float(0x4b400000u + static_cast<unsigned>(x)) - 12582912.0f;
}

// 2^x, to about 2 ulp; below 2^-126 it is 0.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// a / b to 2 ulp, for b within 2^-126..2^126: an exact division calls a subroutine.
__device__ __forceinline__ float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// The 4-bit codes of one word of a sketch: nibble j of byte b holds dimension 8 w + 4 j + b. `y`,
// `low`, `step`: those of the word's eight dimensions.
__device__ __forceinline__ std::uint32_t pack_codes(const float* y, const float* low,
                                                    const float* step) {
  std::uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    const float level = fminf(fmaxf(rintf(divide(y[i] - low[i], step[i])), 0.0f), 15.0f);
    word |= static_cast<std::uint32_t>(level) << (8 * (i % 4) + 4 * (i / 4));
  }
  return word;
}

// Acquires and releases on the whole device: __threadfence() without a total order of all fences.
__device__ __forceinline__ void device_fence() {
#ifdef __CUDA_ARCH__
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// Waits until the kernel ahead on the stream has ended, where this one was launched before that,
// and lets the one behind it be launched. Every block of every kernel of a step calls it: then all
// that kernels before the one ahead wrote is there at a block's first line, before it waits.
__device__ __forceinline__ void wait_for_earlier_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// log(exp(a) + exp(b)); -inf is the empty sum.
__device__ __forceinline__ float log_add(float a, float b) {
  const float high = fmaxf(a, b), low = fminf(a, b);
  if (high == -INFINITY) return high;
  return high + log1pf(expf(low - high));
}

}  // namespace icecache::gpu

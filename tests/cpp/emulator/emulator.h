// CUDA on a CPU thread, for tests: the kernels' own sources run with a fibre for each CUDA thread
// of a block, and the few calls of the runtime that the engine makes act at once on host memory.
//
// Blocks run one after the other. Threads of a block take turns: a thread runs until it meets a
// barrier or a shuffle, so whatever only works by luck of timing on a GPU is found there, by
// compute-sanitizer; wrong indices, wrong results and memory errors are found here.
// Launches are immediate; streams and events do nothing.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) short4 {
  short x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline short4 make_short4(short x, short y, short z, short w) {
  return {x, y, z, w};
}

namespace emulator {

// Of the running thread.
extern constinit thread_local dim3 thread_index, block_index, block_size, grid_size;

void run(dim3 grid, int threads, const std::function<void()>& kernel);

// Waits for the block's threads; returns how many of them came with `predicate`.
int barrier(bool predicate);
// Gives 8 bytes to the warp and gets those of all lanes [32]; valid until the next but one
// exchange.
const std::uint64_t* exchange(std::uint64_t value);

template <typename T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  return std::bit_cast<T>(static_cast<Bits>(exchange(std::bit_cast<Bits>(value))[lane]));
}

// As the functions of these names in cuda/gpu.h say, for the running lane.
uint4 load_transposed(const uint4* row);
void multiply_add(float (&sums)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b);

}  // namespace emulator

#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define blockDim ::emulator::block_size
#define gridDim ::emulator::grid_size

inline void __syncthreads() {
  emulator::barrier(false);
}
inline int __syncthreads_count(bool predicate) {
  return emulator::barrier(predicate);
}
inline void __syncwarp() {
  emulator::exchange(0);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const std::uint64_t* flags = emulator::exchange(predicate ? 1 : 0);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(flags[lane]) << lane;
  return result;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::shuffle(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return emulator::shuffle(value, lane < delta ? lane : lane - delta);
}
template <typename T, typename U>
T atomicAdd(T* address, U value) {
  const T before = *address;
  *address += static_cast<T>(value);
  return before;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T before = *address;
  *address = std::min(before, value);
  return before;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<std::int8_t>(static_cast<unsigned>(a) >> (8 * i)) *
           static_cast<std::int8_t>(static_cast<unsigned>(b) >> (8 * i));
  }
  return sum;
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
using std::max;
using std::min;

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) {
  return static_cast<float>(x.value);
}
inline __half __float2half_rn(float x) {
  return {static_cast<_Float16>(x)};
}
inline __half __ushort_as_half(std::uint16_t bits) {
  __half result;
  std::memcpy(&result.value, &bits, sizeof bits);
  return result;
}
inline std::uint16_t __half_as_ushort(__half x) {
  std::uint16_t bits;
  std::memcpy(&bits, &x.value, sizeof bits);
  return bits;
}

// The runtime.
using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
constexpr unsigned cudaStreamNonBlocking = 0, cudaEventDisableTiming = 0, cudaHostAllocPortable = 0,
                   cudaHostAllocMapped = 0;

namespace emulator {
// Bytes that may still be allocated on the device; lowered by tests.
extern std::size_t device_room;
// Of the device: how many blocks a kernel is launched with follows from it; set by tests.
extern int multiprocessors;
cudaError_t allocate(void** memory, std::size_t bytes);
void release(void* memory);
}  // namespace emulator

inline const char* cudaGetErrorName(cudaError_t) {
  return "cudaErrorMemoryAllocation";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "out of memory";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t) {
  return emulator::allocate(memory, bytes);
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  emulator::release(memory);
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = *total = emulator::device_room;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors : 8;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) {
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int byte, std::size_t bytes, cudaStream_t) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}

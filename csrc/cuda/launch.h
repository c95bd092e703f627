// Starting a kernel: one function for CUDA and for the emulator.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/gpu.h"
#include "icecache/types.h"

namespace icecache::gpu {

// Throws CudaError naming the call.
void check(cudaError_t status, const char* call);

// Whether the current device starts chained kernels.
bool can_chain();

// Blocks for kernels whose blocks take several items each.
inline unsigned blocks_for(std::int64_t items, int per_block) {
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((items + per_block - 1) / per_block, 1, 1024));
}

// Calls body with the element type.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kInt8:  // of pages on the host alone
      return;
  }
}

// Calls body with the head dimension, one of those that there are kernels for, as a constant.
template <typename Body>
void with_head_dim(int head_dim, const Body& body) {
  switch (head_dim) {
    case 64:
      return body(std::integral_constant<int, 64>{});
    case 96:
      return body(std::integral_constant<int, 96>{});
    case 128:
      return body(std::integral_constant<int, 128>{});
    default:
      return body(std::integral_constant<int, 256>{});
  }
}

// Programmatic dependent launch: whether a kernel may start before the kernel ahead of it on the
// stream has ended. Such a kernel calls wait_for_earlier_kernel() before it reads what that one
// wrote. Devices below compute capability 9 ignore this.
//   kNone    it starts when the one ahead has ended
//   kBehind  it may start earlier
//   kBeside  it may start earlier, and blocks of both may run on one multiprocessor at a time. Both
//            kernels then ask for the largest shared memory: a multiprocessor changes the size of
//            its shared memory only when it runs no block.
enum class Chain { kNone, kBehind, kBeside };

// kernel(params).
template <typename Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, Stream stream,
            const Params& params, Chain chain = Chain::kNone) {
#ifdef ICECACHE_EMULATE_CUDA
  (void)name, (void)stream, (void)chain;
  emulator::run(grid, threads, [&] { kernel(params); });
#else
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[1].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = chain == Chain::kNone ? 0 : chain == Chain::kBehind ? 1 : 2;
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), name);
#endif
}

}  // namespace icecache::gpu

// Starting a kernel: one function for CUDA and for the emulator.
#pragma once

#include "cuda/gpu.h"

namespace icecache::gpu {

// Throws CudaError naming the call.
void check(cudaError_t status, const char* call);

template <typename Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, Stream stream,
            const Params& params) {
#ifdef ICECACHE_EMULATE_CUDA
  (void)stream;
  emulator::run(grid, threads, [&] { kernel(params); });
  (void)name;
#else
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                         dim3(static_cast<unsigned>(threads)), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        name);
#endif
}

}  // namespace icecache::gpu

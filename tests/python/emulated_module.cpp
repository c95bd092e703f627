// DeviceCache on the CUDA emulator, for Python; tensors are those of the CPU.
#include "bindings/core_bindings.h"
#include "bindings/dlpack.h"

PYBIND11_MODULE(_emulated, module) {
  module.doc() = "icecache._core.DeviceCache on the emulator of tests/cpp/emulator.";
  icecache::bindings::bind_errors();
  icecache::bindings::bind_device_cache(module, icecache::bindings::dlpack::kCpu);
}

#include "bindings/core_bindings.h"
#include "bindings/dlpack.h"

PYBIND11_MODULE(_core, module) {
  using namespace icecache::bindings;
  module.doc() = "The C++ engine; use it through icecache.Engine, which takes tensors.";
  bind_errors();
  bind_config(module);
  bind_telemetry(module);
  bind_engine(module);
  bind_prefix_table(module);
  bind_device_cache(module, dlpack::kCuda);
}

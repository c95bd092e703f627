// What the translation units of `_core` share. No header of torch here: core_tensors.h reads
// tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace icecache::bindings {

// "HeadStats(steps=3, ...)"
inline std::string describe(const pybind11::object& record, const std::vector<const char*>& names) {
  std::string text = pybind11::str(pybind11::type::of(record).attr("__name__"));
  const char* separator = "(";
  for (const char* name : names) {
    text += separator + std::string(name) + "=" + std::string(pybind11::repr(record.attr(name)));
    separator = ", ";
  }
  return text + ")";
}

void bind_errors();
void bind_config(pybind11::module_& module);
void bind_telemetry(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_prefix_table(pybind11::module_& module);
// Of a cache whose tensors are on devices of this type (dlpack::DeviceType).
void bind_device_cache(pybind11::module_& module, std::int32_t device_type);

}  // namespace icecache::bindings

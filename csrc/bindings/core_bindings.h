// What the translation units of `_core` share. No torch here: tensors come as TensorTuple, made by
// python/icecache/engine.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "icecache/types.h"

namespace icecache::bindings {

// (address, dtype, heads, tokens, dim, head stride, token stride); strides in elements. The caller
// keeps the memory alive for the length of the call.
using TensorTuple = std::tuple<std::uintptr_t, DType, std::int64_t, std::int64_t, std::int64_t,
                               std::int64_t, std::int64_t>;

inline TensorView view(const TensorTuple& tensor) {
  const auto& [address, dtype, heads, tokens, dim, head_stride, token_stride] = tensor;
  return {reinterpret_cast<void*>(address), dtype, heads, tokens, dim, head_stride, token_stride};
}

// "HeadStats(steps=3, ...)"
template <typename... Names>
std::string describe(const pybind11::object& record, const Names&... names) {
  std::string text = pybind11::str(pybind11::type::of(record).attr("__name__"));
  const char* separator = "(";
  for (const char* name : {names...}) {
    text += separator + std::string(name) + "=" + std::string(pybind11::repr(record.attr(name)));
    separator = ", ";
  }
  return text + ")";
}

void bind_errors();
void bind_config(pybind11::module_& module);
void bind_telemetry(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_device_cache(pybind11::module_& module);

}  // namespace icecache::bindings

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

void bind_errors();
void bind_config(pybind11::module_& module);
void bind_telemetry(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace icecache::bindings

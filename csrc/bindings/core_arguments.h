// Arguments of `_core` as they come from Python: converted with the GIL held, each by one function
// that names the parameter. A value of another type raises TypeError, one out of range
// InvalidArgument.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "icecache/error.h"
#include "icecache/types.h"

namespace icecache::bindings {

std::int64_t integer(std::string_view name, pybind11::handle value);  // anything with __index__
int narrow_integer(std::string_view name, pybind11::handle value);    // of 32 bits
// Of any iterable.
std::vector<std::int64_t> integers(std::string_view name, pybind11::handle values);
std::string text(std::string_view name, pybind11::handle value);
// What a cache is for; `dtype` is "float32", "bfloat16" or "float16". 0 stands for a scale of
// 1 / sqrt(head_dim), and for no softcap; throws for others that float cannot hold.
CacheShape shape_of(pybind11::handle num_layers, pybind11::handle num_q_heads,
                    pybind11::handle num_kv_heads, pybind11::handle head_dim,
                    pybind11::handle dtype, pybind11::handle scale, pybind11::handle logit_softcap);

std::string type_name(pybind11::handle value);

// `self`, and any other argument of a class of `_core`: an instance whose __init__ has run.
// pybind11 by itself takes one that came from __new__ for an object in uninitialised memory.
template <typename Class>
struct Live {
  Class* object = nullptr;
  Class& operator*() const { return *object; }
  Class* operator->() const { return object; }
};

// Instances of this class come from C++ only: __new__ raises TypeError, and so do copy and pickle.
inline void forbid_new(pybind11::handle python_class) {
  auto* type = reinterpret_cast<PyTypeObject*>(python_class.ptr());
  type->tp_new = nullptr;
  PyType_Modified(type);
}

}  // namespace icecache::bindings

template <typename Class>
struct pybind11::detail::type_caster<icecache::bindings::Live<Class>> {
  PYBIND11_TYPE_CASTER(icecache::bindings::Live<Class>, make_caster<Class>::name);

  bool load(handle source, bool) {
    const type_info* type = get_type_info(typeid(Class));
    if (type == nullptr || !isinstance(source, handle(reinterpret_cast<PyObject*>(type->type)))) {
      return false;
    }
    auto* python = reinterpret_cast<instance*>(source.ptr());
    const value_and_holder place = python->get_value_and_holder(type);
    if (!place.holder_constructed()) {
      throw icecache::InvalidArgument("a " + icecache::bindings::type_name(source) +
                                      " must be made by calling its class, got one whose "
                                      "__init__ has not run");
    }
    value.object = place.template value_ptr<Class>();
    return true;
  }
};

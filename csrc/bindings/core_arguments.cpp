#include "bindings/core_arguments.h"

#include <cmath>
#include <limits>

namespace py = pybind11;

namespace icecache::bindings {

std::string type_name(py::handle value) {
  const std::string_view whole = Py_TYPE(value.ptr())->tp_name;
  return std::string(whole.substr(whole.rfind('.') + 1));
}

std::int64_t integer(std::string_view name, py::handle value) {
  if (PyIndex_Check(value.ptr()) == 0) {
    throw py::type_error(message(name, " must be an integer, got ", type_name(value)));
  }
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) {
    throw InvalidArgument(message(name, " must fit 64 bits, got a number ",
                                  overflow > 0 ? "above 2^63 - 1" : "below -2^63"));
  }
  return result;
}

int narrow_integer(std::string_view name, py::handle value) {
  const std::int64_t wide = integer(name, value);
  if (wide < std::numeric_limits<int>::min() || wide > std::numeric_limits<int>::max()) {
    throw InvalidArgument(message(name, " must fit 32 bits, got ", wide));
  }
  return static_cast<int>(wide);
}

std::vector<std::int64_t> integers(std::string_view name, py::handle values) {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(values.ptr(), ""));
  if (!items) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(message(name, " must be a list of integers, got ", type_name(values)));
  }
  std::vector<std::int64_t> result;
  result.reserve(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.ptr())));
  // __index__ of an item may change the list: neither its size nor its items are taken for granted.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i));
    result.push_back(integer(name, item));
  }
  return result;
}

std::string text(std::string_view name, py::handle value) {
  if (PyUnicode_Check(value.ptr()) == 0) {
    throw py::type_error(message(name, " must be a str, got ", type_name(value)));
  }
  Py_ssize_t size = 0;
  const char* characters = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
  if (characters == nullptr) throw py::error_already_set();  // UnicodeEncodeError, a ValueError
  return {characters, static_cast<std::size_t>(size)};
}

namespace {

// `zero`: what 0 stands for.
float real_of(std::string_view name, std::string_view zero, py::handle value) {
  if (PyUnicode_Check(value.ptr()) != 0) {
    throw py::type_error(message(name, " must be a number, got str"));
  }
  const double wide = PyFloat_AsDouble(value.ptr());
  if (wide == -1.0 && PyErr_Occurred() != nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(message(name, " must be a number, got ", type_name(value)));
  }
  const float narrow = static_cast<float>(wide);
  if (wide != 0.0 && !std::isnormal(narrow)) {
    throw InvalidArgument(message(name, " must be 0 for ", zero, ", or from ",
                                  std::numeric_limits<float>::min(), " to ",
                                  std::numeric_limits<float>::max(), ", got ", wide));
  }
  return narrow;
}

DType dtype_of(py::handle name) {
  const std::string given = text("dtype", name);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (given == name_of(dtype)) return dtype;
  }
  throw InvalidArgument(message("dtype must be float32, bfloat16 or float16, got ", given));
}

}  // namespace

CacheShape shape_of(py::handle num_layers, py::handle num_q_heads, py::handle num_kv_heads,
                    py::handle head_dim, py::handle dtype, py::handle scale,
                    py::handle logit_softcap) {
  CacheShape shape;
  shape.num_layers = narrow_integer("num_layers", num_layers);
  shape.num_q_heads = narrow_integer("num_q_heads", num_q_heads);
  shape.num_kv_heads = narrow_integer("num_kv_heads", num_kv_heads);
  shape.head_dim = narrow_integer("head_dim", head_dim);
  shape.dtype = dtype_of(dtype);
  shape.scale = real_of("scale", "1 / sqrt(head_dim)", scale);
  shape.logit_softcap = real_of("logit_softcap", "none", logit_softcap);
  return shape;
}

}  // namespace icecache::bindings

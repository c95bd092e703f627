// C++ errors become the classes of python/icecache/errors.py.
#include "bindings/core_bindings.h"
#include "icecache/error.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

// Python classes, in the order in which they are tried: most derived first. Never freed: an error
// may be raised while the interpreter shuts down.
struct Classes {
  py::object invalid_argument, out_of_pages, integrity_error, unavailable, cuda_error, error;
};

const Classes* classes = nullptr;

void raise(const py::object& type, const std::exception& error) {
  PyErr_SetString(type.ptr(), error.what());
}

void translate(std::exception_ptr pending) {
  if (!pending) return;
  try {
    std::rethrow_exception(pending);
  } catch (const InvalidArgument& error) {
    raise(classes->invalid_argument, error);
  } catch (const OutOfPages& error) {
    raise(classes->out_of_pages, error);
  } catch (const IntegrityError& error) {
    raise(classes->integrity_error, error);
  } catch (const Unavailable& error) {
    raise(classes->unavailable, error);
  } catch (const CudaError& error) {
    raise(classes->cuda_error, error);
  } catch (const Error& error) {
    raise(classes->error, error);
  }
}

}  // namespace

void bind_errors() {
  const py::module_ errors = py::module_::import("icecache.errors");
  classes = new Classes{errors.attr("InvalidArgument"), errors.attr("OutOfPages"),
                        errors.attr("IntegrityError"),  errors.attr("Unavailable"),
                        errors.attr("CudaError"),       errors.attr("Error")};
  py::register_local_exception_translator(translate);
}

}  // namespace icecache::bindings

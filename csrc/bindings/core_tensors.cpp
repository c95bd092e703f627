#include "bindings/core_tensors.h"

#include "bindings/core_arguments.h"
#include "icecache/error.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

// What is needed of torch. Never freed: arguments may be converted while the interpreter ends.
struct Torch {
  py::object tensor, parameter, empty, empty_like, no_dispatch, cpu, contiguous;
  py::object empty_names, empty_like_names;
  py::object inference_is_on, grad_is_on;
  const dlpack::ExchangeApi* api = nullptr;
};

py::object interned(const char* text) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
}

const Torch& torch() {
  static const Torch* loaded = nullptr;  // guarded by the GIL
  if (loaded != nullptr) return *loaded;
  const py::module_ module = py::module_::import("torch");
  auto found = std::make_unique<Torch>();
  found->tensor = module.attr("Tensor");
  found->parameter = module.attr("nn").attr("Parameter");
  found->empty = module.attr("empty");
  found->no_dispatch = found->tensor.attr("__torch_dispatch__");
  found->cpu = module.attr("device")("cpu");
  found->empty_like = module.attr("empty_like");
  found->contiguous = module.attr("contiguous_format");
  found->empty_like_names = py::make_tuple("memory_format");
  found->empty_names = py::make_tuple("dtype", "device");
  found->inference_is_on = module.attr("is_inference_mode_enabled");
  found->grad_is_on = module.attr("is_grad_enabled");
  const py::object capsule = found->tensor.attr(dlpack::kAttribute);
  found->api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (found->api == nullptr) throw py::error_already_set();
  if (found->api->header.major != dlpack::kMajor || found->api->borrow == nullptr) {
    throw Unavailable(message("torch's DLPack exchange API must be version ", dlpack::kMajor,
                              ".x, got ", found->api->header.major, ".", found->api->header.minor));
  }
  if (loaded == nullptr) loaded = found.release();  // another thread may have been faster
  return *loaded;
}

py::object call_method(py::handle object, const py::object& name) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), name.ptr());
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

std::uint64_t call_number(py::handle object, const py::object& name) {
  const std::uint64_t value = PyLong_AsUnsignedLongLong(call_method(object, name).ptr());
  if (value == static_cast<std::uint64_t>(-1) && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return value;
}

bool call_flag(py::handle object, const py::object& name) {
  return call_method(object, name).is(py::handle(Py_True));
}

std::string attribute_text(py::handle object, const char* name) {
  return py::str(object.attr(name));
}

std::string dtype_text(const TensorForm& form) {
  return std::string("torch.") + (form.is_int32 ? "int32" : name_of(form.dtype));
}

std::size_t element_bytes(const TensorForm& form) {
  return form.is_int32 ? 4 : size_of(form.dtype);
}

bool has_dtype(const dlpack::Tensor& tensor, const TensorForm& form) {
  const std::uint8_t code = form.is_int32                    ? dlpack::kInt
                            : form.dtype == DType::kBFloat16 ? dlpack::kBfloat
                                                             : dlpack::kFloat;
  return tensor.dtype.code == code && tensor.dtype.lanes == 1 &&
         tensor.dtype.bits == 8 * element_bytes(form);
}

// Names what is wrong with a tensor; `reason` where nothing of the usual is.
[[noreturn]] void refuse(const TensorForm& form, py::handle tensor, std::string_view reason) {
  const bool on_cpu = form.device_type == dlpack::kCpu;
  const std::string name = form.title();
  const std::string layout = attribute_text(tensor, "layout");
  if (layout != "torch.strided") {
    throw InvalidArgument(message(name, " must be a dense tensor, got one of layout ", layout));
  }
  const std::string device = attribute_text(tensor, "device");
  const std::string wanted = on_cpu ? "cpu" : message("cuda:", form.device);
  if (device != wanted) {
    throw InvalidArgument(
        message(name, " must be on ", on_cpu ? "the CPU" : wanted, ", got ", device));
  }
  const std::string dtype = attribute_text(tensor, "dtype");
  if (dtype != dtype_text(form)) {
    throw InvalidArgument(message(name, " must be ", dtype_text(form),
                                  form.is_int32 || !form.has_dim ? "" : " as the cache", ", got ",
                                  dtype));
  }
  throw InvalidArgument(message(name, " must be a tensor with memory of its own, got ", reason));
}

// Runs `body` and names the tensor where torch refuses it.
template <typename Body>
auto naming(const TensorForm& form, py::handle tensor, const Body& body) {
  try {
    return body();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt
    const std::string reason = py::str(error.value());
    refuse(form, tensor, reason.substr(0, reason.find('\n')));
  }
}

// Of no class of the caller's.
bool is_torchs_own(py::handle tensor) {
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())));
  return type.is(torch().tensor) || type.is(torch().parameter);
}

void check_type(const TensorForm& form, py::handle tensor) {
  const Torch& used = torch();
  if (is_torchs_own(tensor)) return;
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())));
  if (!py::isinstance(tensor, used.tensor)) {
    throw InvalidArgument(
        message(form.title(), " must be a tensor ", form.dims, ", got ", type_name(tensor)));
  }
  // A subclass that computes by itself has memory that is not what it stands for.
  if (!py::object(type.attr("__torch_dispatch__")).is(used.no_dispatch)) {
    throw InvalidArgument(message(form.title(), " must be a plain tensor, got a ",
                                  type_name(tensor), ", which has its own __torch_dispatch__"));
  }
}

void check_written(const TensorForm& form, py::handle tensor) {
  static const py::object& inference_name = *new py::object(interned("is_inference"));
  const Torch& used = torch();
  if (call_flag(tensor, inference_name) && !used.inference_is_on().cast<bool>()) {
    throw InvalidArgument(
        message(form.title(), " must not be an inference tensor outside of inference mode"));
  }
  if (tensor.attr("requires_grad").cast<bool>() && used.grad_is_on().cast<bool>()) {
    throw InvalidArgument(
        message(form.title(), " must not require a gradient: it is written in place"));
  }
}

// Throws unless all elements lie within the tensor's storage: torch lets a storage shrink under its
// tensors, and gives some tensors none.
void check_storage(const TensorForm& form, py::handle tensor) {
  static const py::object& storage_name = *new py::object(interned("untyped_storage"));
  static const py::object& bytes_name = *new py::object(interned("nbytes"));
  static const py::object& pointer_name = *new py::object(interned("data_ptr"));
  struct Storage {
    std::uint64_t bytes, address;
  };
  const Storage storage = naming(form, tensor, [&] {
    const py::object object = call_method(tensor, storage_name);
    return Storage{call_number(object, bytes_name), call_number(object, pointer_name)};
  });
  dlpack::Tensor borrowed;
  if (torch().api->borrow(tensor.ptr(), &borrowed) != 0) throw py::error_already_set();
  __int128 elements = 1;
  for (int i = 0; i < borrowed.dims; ++i) {
    elements += static_cast<__int128>(borrowed.shape[i] - 1) * borrowed.strides[i];
  }
  const auto begin = reinterpret_cast<std::uint64_t>(borrowed.data);
  const __int128 end =
      static_cast<__int128>(begin) + elements * static_cast<__int128>(element_bytes(form));
  if (storage.address == 0 || begin < storage.address ||
      end > static_cast<__int128>(storage.address) + storage.bytes) {
    refuse(form, tensor,
           message("one whose storage has ", storage.bytes, " bytes, of which it takes more"));
  }
}

// The tensor itself, or a copy where it must be read in another form.
py::object readable(const TensorForm& form, py::handle tensor) {
  static const py::object& negative_name = *new py::object(interned("is_neg"));
  auto result = py::reinterpret_borrow<py::object>(tensor);
  if (call_flag(result, negative_name)) {
    if (form.use != Use::kRead) {
      throw InvalidArgument(message(form.title(), " must not be a negative view"));
    }
    result = result.attr("resolve_neg")();
  }
  return result;
}

}  // namespace

int TensorForm::num_dims() const {
  int letters = 1;
  for (const char c : dims) letters += c == ',';
  return letters;
}

std::string TensorForm::title() const {
  return index < 0 ? std::string(name) : message(name, "[", index, "]");
}

TensorMemory::TensorMemory(const TensorForm& form, py::handle tensor)
    : dtype_(form.dtype), dims_(form.num_dims()) {
  check_type(form, tensor);
  if (form.use == Use::kWritten) check_written(form, tensor);
  held_ =
      form.use == Use::kMade ? py::reinterpret_borrow<py::object>(tensor) : readable(form, tensor);
  dlpack::Tensor borrowed;
  const auto borrow = [&] {
    naming(form, held_, [&] {
      if (torch().api->borrow(held_.ptr(), &borrowed) != 0) throw py::error_already_set();
      return 0;
    });
  };
  borrow();
  const bool on_cpu =
      borrowed.device.type == dlpack::kCpu || borrowed.device.type == dlpack::kCudaHost;
  const bool is_there =
      form.device_type == dlpack::kCpu
          ? on_cpu
          : borrowed.device.type == form.device_type && borrowed.device.index == form.device;
  if (!is_there || !has_dtype(borrowed, form)) refuse(form, held_, "one of another kind");
  if (borrowed.dims != dims_) {
    throw InvalidArgument(message(form.title(), " must be a tensor ", form.dims,
                                  ", got one of shape ",
                                  std::string(py::str(py::list(held_.attr("shape"))))));
  }
  bool is_empty = false;
  for (int i = 0; i < dims_; ++i) is_empty = is_empty || borrowed.shape[i] == 0;
  if (!is_empty) {
    check_storage(form, held_);
    if (form.has_dim && borrowed.strides[dims_ - 1] != 1 && borrowed.shape[dims_ - 1] != 1) {
      if (form.use != Use::kRead) {
        throw InvalidArgument(message(form.title(), " must have unit stride in D, got ",
                                      borrowed.strides[dims_ - 1]));
      }
      held_ = held_.attr("contiguous")();
    }
    borrow();
  }
  data_ = borrowed.data;
  for (int i = 0; i < dims_; ++i) {
    shape_[i] = borrowed.shape[i];
    strides_[i] = borrowed.strides[i];
  }
}

std::byte* TensorMemory::element(std::int64_t offset) const {
  if (data_ == nullptr) return nullptr;  // a tensor of no elements
  return static_cast<std::byte*>(data_) + offset * static_cast<std::int64_t>(size_of(dtype_));
}

bool TensorMemory::is_contiguous() const {
  std::int64_t expected = 1;
  for (int i = dims_ - 1; i >= 0; --i) {
    if (shape_[i] == 0) return true;
    if (shape_[i] != 1 && strides_[i] != expected) return false;
    expected *= shape_[i];
  }
  return true;
}

std::byte* TensorMemory::end() const {
  std::int64_t count = 1;
  for (int i = 0; i < dims_; ++i) count *= shape_[i];
  return element(count);
}

std::string TensorMemory::shape_text() const {
  std::string text = "[";
  for (int i = 0; i < dims_; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape_[i]);
  return text + "]";
}

bool is_tensor(py::handle value) {
  return py::isinstance(value, torch().tensor);
}

namespace {

const char* batch_dims(const TensorForm& form) {
  return form.has_dim ? "[B, H, T, D]" : "[B, H, T]";
}
const char* list_dims(const TensorForm& form) {
  return form.has_dim ? "[H, T, D]" : "[H, T]";
}

}  // namespace

Rows batch_rows(TensorForm form, py::handle tensor, std::size_t sequences) {
  form.dims = batch_dims(form);
  Rows rows;
  const TensorMemory& memory = rows.held.emplace_back(form, tensor);
  if (memory.size(0) != static_cast<std::int64_t>(sequences)) {
    throw InvalidArgument(message(form.name, " must have one entry per sequence (", sequences,
                                  "), got ", memory.size(0)));
  }
  rows.views.reserve(static_cast<std::size_t>(memory.size(0)));
  for (std::int64_t b = 0; b < memory.size(0); ++b) {
    rows.views.push_back({memory.element(b * memory.stride(0)), form.dtype, memory.size(1),
                          memory.size(2), form.has_dim ? memory.size(3) : 1, memory.stride(1),
                          memory.stride(2)});
  }
  return rows;
}

Rows batch_or_list_rows(TensorForm form, py::handle tensors, std::size_t sequences) {
  if (is_tensor(tensors)) {
    // A nested tensor has no shape.
    const std::size_t dims = form.has_dim ? 4 : 3;
    if (naming(form, tensors, [&] { return py::len(tensors.attr("shape")); }) != dims) {
      throw InvalidArgument(message(form.name, " must be ", batch_dims(form), " or a list of ",
                                    list_dims(form), ", got a tensor of shape ",
                                    std::string(py::str(py::list(tensors.attr("shape"))))));
    }
    return batch_rows(form, tensors, sequences);
  }
  const auto items = py::reinterpret_steal<py::object>(PySequence_Tuple(tensors.ptr()));
  if (!items) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw InvalidArgument(message(form.name, " must be ", batch_dims(form), " or a list of ",
                                  list_dims(form), ", got ", type_name(tensors)));
  }
  form.dims = list_dims(form);
  Rows rows;
  for (const py::handle item : items) {
    ++form.index;
    const TensorMemory& memory = rows.held.emplace_back(form, item);
    rows.views.push_back({memory.element(0), form.dtype, memory.size(0), memory.size(1),
                          form.has_dim ? memory.size(2) : 1, memory.stride(0), memory.stride(1)});
  }
  return rows;
}

Rows packed_rows(TensorForm form, py::handle tensor, std::span<const std::int64_t> firsts,
                 std::span<const std::int64_t> counts) {
  form.dims = form.has_dim ? "[N, H, D]" : "[N, H]";
  Rows rows;
  const TensorMemory& memory = rows.held.emplace_back(form, tensor);
  rows.views.reserve(firsts.size());
  for (std::size_t b = 0; b < firsts.size(); ++b) {
    const std::int64_t first = firsts[b], count = counts[b], all = memory.size(0);
    // No sum of the two: it may not fit.
    if (first < 0 || first > all || count < 0 || count > all - first) {
      throw InvalidArgument(message(form.name, " must hold ", count, " rows from row ", first,
                                    " on, got ", memory.shape_text()));
    }
    rows.views.push_back({memory.element(first * memory.stride(0)), form.dtype, memory.size(1),
                          count, form.has_dim ? memory.size(2) : 1, memory.stride(1),
                          memory.stride(0)});
  }
  return rows;
}

py::object new_like(py::handle like) {
  const Torch& used = torch();
  PyObject* made = nullptr;
  if (is_torchs_own(like)) {  // in less than half of the time that torch.empty() takes
    PyObject* arguments[] = {like.ptr(), used.contiguous.ptr()};
    made = PyObject_Vectorcall(used.empty_like.ptr(), arguments, 1, used.empty_like_names.ptr());
  } else {
    const py::object shape = like.attr("shape"), dtype = like.attr("dtype");
    PyObject* arguments[] = {shape.ptr(), dtype.ptr(), used.cpu.ptr()};
    made = PyObject_Vectorcall(used.empty.ptr(), arguments, 1, used.empty_names.ptr());
  }
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

void* current_stream(std::int32_t device_type, int device) {
  if (device_type == dlpack::kCpu) return nullptr;
  void* stream = nullptr;
  if (torch().api->current_stream(device_type, device, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

}  // namespace icecache::bindings

// Work is launched on torch's current stream of the cache's device. Classes are local to their
// module: tests bind them a second time, on an emulator.
#include <utility>

#include "bindings/core_arguments.h"
#include "bindings/core_bindings.h"
#include "bindings/core_tensors.h"
#include "icecache/device_cache.h"
#include "icecache/error.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

using Self = Live<DeviceCache>;
using Unlocked = py::gil_scoped_release;

// What runs on a CUDA device ends before its cache does: other Python threads go on meanwhile.
struct UnlockedDelete {
  void operator()(DeviceCache* cache) const {
    const Unlocked unlocked;
    delete cache;
  }
};
using Class = py::class_<DeviceCache, std::unique_ptr<DeviceCache, UnlockedDelete>>;

std::int32_t device_type = dlpack::kCuda;  // of this module

void bind_memory(py::module_& module) {
  forbid_new(py::class_<DeviceCacheMemory>(module, "DeviceCacheMemory", py::module_local(),
                                           py::is_final(), "Bytes held.")
                 .def_readonly("device_bytes", &DeviceCacheMemory::device_bytes)
                 .def_readonly("rows_bytes", &DeviceCacheMemory::rows_bytes)
                 .def_readonly("index_bytes", &DeviceCacheMemory::index_bytes)
                 .def_readonly("scratch_bytes", &DeviceCacheMemory::scratch_bytes)
                 .def_readonly("resident_bytes", &DeviceCacheMemory::resident_bytes)
                 .def_readonly("resident_sequences", &DeviceCacheMemory::resident_sequences)
                 .def_readonly("sparse_sequences", &DeviceCacheMemory::sparse_sequences)
                 .def_readonly("host_bytes", &DeviceCacheMemory::host_bytes)
                 .def_readonly("token_bytes", &DeviceCacheMemory::token_bytes)
                 .def_readonly("free_bytes", &DeviceCacheMemory::free_bytes)
                 .def_readonly("total_bytes", &DeviceCacheMemory::total_bytes)
                 .def("__repr__", [](const py::object& self) {
                   return describe(self,
                                   {"device_bytes", "rows_bytes", "index_bytes", "scratch_bytes",
                                    "resident_bytes", "resident_sequences", "sparse_sequences",
                                    "host_bytes", "token_bytes", "free_bytes", "total_bytes"});
                 }));
}

std::unique_ptr<DeviceCache, UnlockedDelete> make_cache(
    py::handle num_layers, py::handle num_q_heads, py::handle num_kv_heads, py::handle head_dim,
    py::handle dtype, py::handle scale, py::handle logit_softcap, Live<Config> config,
    py::handle sequences, py::handle tokens, py::handle number) {
  const CacheShape shape =
      shape_of(num_layers, num_q_heads, num_kv_heads, head_dim, dtype, scale, logit_softcap);
  const int batch = narrow_integer("batch", sequences);
  const std::int64_t max_tokens = integer("max_tokens", tokens);
  const int device = narrow_integer("device", number);
  const Config values = *config;  // another thread may change it meanwhile
  const Unlocked unlocked;
  return std::unique_ptr<DeviceCache, UnlockedDelete>(
      new DeviceCache(shape, values, batch, max_tokens, device));
}

void* stream_of(Self self) {
  return current_stream(device_type, self->device());
}

TensorForm form_of(Self self, const char* name, const char* dims, Use use = Use::kInPlace) {
  TensorForm form;
  form.name = name;
  form.dims = dims;
  form.dtype = self->shape().dtype;
  form.use = use;
  form.device_type = device_type;
  form.device = self->device();
  return form;
}

// A tensor of this shape that kernels take as it stands.
TensorMemory contiguous(const TensorForm& form, py::handle tensor,
                        std::initializer_list<std::int64_t> shape) {
  TensorMemory memory(form, tensor);
  std::string expected;
  bool fits = memory.is_contiguous();
  int dim = 0;
  for (const std::int64_t size : shape) {
    fits = fits && memory.size(dim++) == size;
    expected += (expected.empty() ? "[" : ", ") + std::to_string(size);
  }
  if (!fits) {
    throw InvalidArgument(message(form.title(), " must be a contiguous ", expected, "], got ",
                                  memory.shape_text(),
                                  memory.is_contiguous() ? "" : " with other strides"));
  }
  return memory;
}

// REQUIRES: both are contiguous.
bool share_memory(const TensorMemory& a, const TensorMemory& b) {
  return a.element(0) < b.end() && b.element(0) < a.end();
}

// DeviceCache::prefill or extend, which take the same arguments.
using Fill = void (DeviceCache::*)(int, int, const TensorView&, const TensorView&,
                                   const TensorView&, void*);
template <Fill fill>
void fill_with(Self self, py::handle layer_number, py::handle sequence_number, py::handle keys,
               py::handle values, py::handle queries) {
  const int layer = narrow_integer("layer", layer_number);
  const int sequence = narrow_integer("sequence", sequence_number);
  const auto view = [&](const char* name, py::handle tensor) {
    const TensorMemory memory(form_of(self, name, "[H, T, D]"), tensor);
    return TensorView{memory.element(0), self->shape().dtype, memory.size(0),  memory.size(1),
                      memory.size(2),    memory.stride(0),    memory.stride(1)};
  };
  const TensorView k = view("keys", keys), v = view("values", values), q = view("queries", queries);
  void* const stream = stream_of(self);
  const Unlocked unlocked;
  ((*self).*fill)(layer, sequence, k, v, q, stream);
}

void step(Self self, py::handle layer_number, py::handle queries, py::handle keys,
          py::handle values, py::handle out, const py::object& rows) {
  const int layer = narrow_integer("layer", layer_number);
  const CacheShape& shape = self->shape();
  const char* const dims = "[A, H, 1, D]";
  std::int64_t count = self->batch();
  if (!rows.is_none()) count = TensorMemory(form_of(self, "queries", dims), queries).size(0);
  const std::int64_t d = shape.head_dim;
  const auto q =
      contiguous(form_of(self, "queries", dims), queries, {count, shape.num_q_heads, 1, d});
  const auto k = contiguous(form_of(self, "keys", dims), keys, {count, shape.num_kv_heads, 1, d});
  const auto v =
      contiguous(form_of(self, "values", dims), values, {count, shape.num_kv_heads, 1, d});
  const auto o =
      contiguous(form_of(self, "out", dims, Use::kWritten), out, {count, shape.num_q_heads, 1, d});
  const std::int32_t* row_of_sequence = nullptr;
  std::int64_t tokens = 1;
  std::vector<TensorMemory> held;
  if (!rows.is_none()) {
    TensorForm form = form_of(self, "rows", "[T, B]");
    form.is_int32 = true;
    tokens = TensorMemory(form, rows).size(0);
    if (tokens < 1 || tokens > DeviceCache::kStepTokens) {
      throw InvalidArgument(message("rows must be [T, B] with T from 1 to ",
                                    DeviceCache::kStepTokens, ", got ", tokens));
    }
    held.push_back(contiguous(form, rows, {tokens, self->batch()}));
    row_of_sequence = reinterpret_cast<const std::int32_t*>(held.back().element(0));
  }
  const std::pair<const char*, const TensorMemory*> inputs[] = {
      {"queries", &q}, {"keys", &k}, {"values", &v}};
  for (const auto& [name, memory] : inputs) {
    if (share_memory(o, *memory)) {
      throw InvalidArgument(message("out must not share memory with ", name));
    }
  }
  void* const stream = stream_of(self);
  const Unlocked unlocked;
  self->step(layer, q.element(0), k.element(0), v.element(0), o.element(0), stream, row_of_sequence,
             static_cast<int>(tokens));
}

void gather(Self self, py::handle layer_number, py::handle sequence_number, py::handle keys,
            py::handle values) {
  const int layer = narrow_integer("layer", layer_number);
  const int sequence = narrow_integer("sequence", sequence_number);
  void* const stream = stream_of(self);
  std::int64_t length = 0;
  {
    const Unlocked unlocked;
    length = self->length(layer, sequence, stream);
  }
  const std::int64_t heads = self->shape().num_kv_heads, d = self->shape().head_dim;
  const auto k =
      contiguous(form_of(self, "keys", "[H, T, D]", Use::kWritten), keys, {heads, length, d});
  const auto v =
      contiguous(form_of(self, "values", "[H, T, D]", Use::kWritten), values, {heads, length, d});
  if (share_memory(k, v)) throw InvalidArgument("values must not share memory with keys");
  const Unlocked unlocked;
  self->gather(layer, sequence, k.element(0), v.element(0), stream);
}

// Calls of one sequence.
template <void (DeviceCache::*method)(int, void*)>
void with_sequence(Self self, py::handle sequence_number) {
  const int sequence = narrow_integer("sequence", sequence_number);
  void* const stream = stream_of(self);
  const Unlocked unlocked;
  ((*self).*method)(sequence, stream);
}

// Calls of one sequence and a number of tokens, by the name of the argument.
template <void (DeviceCache::*method)(int, std::int64_t, void*)>
auto with_tokens(const char* name) {
  return [name](Self self, py::handle sequence_number, py::handle number) {
    const int sequence = narrow_integer("sequence", sequence_number);
    const std::int64_t tokens = integer(name, number);
    void* const stream = stream_of(self);
    const Unlocked unlocked;
    ((*self).*method)(sequence, tokens, stream);
  };
}

void bind_sequences(Class& cache) {
  cache
      .def("limit_tokens",
           [](Self self, py::handle tokens) {
             const std::int64_t most = integer("tokens", tokens);
             const Unlocked unlocked;
             self->limit_tokens(most);
           })
      .def("reserve", with_tokens<&DeviceCache::reserve>("tokens"))
      .def("rebuild",
           [](Self self, py::handle layer_number, py::handle sequence_number) {
             const int layer = narrow_integer("layer", layer_number);
             const int sequence = narrow_integer("sequence", sequence_number);
             void* const stream = stream_of(self);
             const Unlocked unlocked;
             self->rebuild(layer, sequence, stream);
           })
      .def("fork",
           [](Self self, py::handle sequence_number, py::handle source) {
             const int sequence = narrow_integer("sequence", sequence_number);
             const int from = narrow_integer("source", source);
             void* const stream = stream_of(self);
             const Unlocked unlocked;
             self->fork(sequence, from, stream);
           })
      .def("truncate", with_tokens<&DeviceCache::truncate>("length"))
      .def("take_back", with_tokens<&DeviceCache::take_back>("length"))
      .def("evict", &with_sequence<&DeviceCache::evict>)
      .def("release", &with_sequence<&DeviceCache::release>)
      .def("length", [](Self self, py::handle layer_number, py::handle sequence_number) {
        const int layer = narrow_integer("layer", layer_number);
        const int sequence = narrow_integer("sequence", sequence_number);
        void* const stream = stream_of(self);
        const Unlocked unlocked;
        return self->length(layer, sequence, stream);
      });
}

}  // namespace

void bind_device_cache(py::module_& module, std::int32_t tensors_on) {
  device_type = tensors_on;
  bind_memory(module);
  Class cache(module, "DeviceCache", py::module_local(), "See icecache.DeviceCache.");
  cache
      .def_property_readonly_static("room_step",
                                    [](const py::object&) { return DeviceCache::kRoomStep; })
      .def_property_readonly_static("step_tokens",
                                    [](const py::object&) { return DeviceCache::kStepTokens; })
      .def(py::init(&make_cache))
      .def("prefill", &fill_with<&DeviceCache::prefill>)
      .def("extend", &fill_with<&DeviceCache::extend>)
      .def("built",
           [](Self self, py::handle layer_number) {
             const int layer = narrow_integer("layer", layer_number);
             const Unlocked unlocked;
             return self->built(layer);
           })
      .def("wait",
           [](Self self, py::handle layer_number) {
             const int layer = narrow_integer("layer", layer_number);
             const Unlocked unlocked;
             self->wait(layer);
           })
      .def("step", &step)
      .def("gather", &gather)
      .def("stats",
           [](Self self, py::handle layer_number, py::handle kv_head) {
             const int layer = narrow_integer("layer", layer_number);
             const int head = narrow_integer("kv_head", kv_head);
             void* const stream = stream_of(self);
             const Unlocked unlocked;
             return self->stats(layer, head, stream);
           })
      .def("memory",
           [](Self self) {
             const Unlocked unlocked;
             return self->memory();
           })
      .def("config", [](Self self) { return self->config(); });
  bind_sequences(cache);
}

}  // namespace icecache::bindings

// Tensors come as TensorTuple or, where they are contiguous, as addresses; streams as the integers
// that torch.cuda.Stream.cuda_stream gives. Classes are local to their module: tests bind them a
// second time, on an emulator.
#include "bindings/core_bindings.h"
#include "icecache/device_cache.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

using Address = std::uintptr_t;

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

}  // namespace

void bind_device_cache(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<DeviceCacheStats>(module, "DeviceCacheStats", py::module_local(),
                               "Sums over steps of one layer.")
      .def_readonly("steps", &DeviceCacheStats::steps)
      .def_readonly("hits", &DeviceCacheStats::hits)
      .def_readonly("misses", &DeviceCacheStats::misses)
      .def_readonly("bytes_moved", &DeviceCacheStats::bytes_moved)
      .def("__repr__", [](const py::object& self) {
        return describe(self, "steps", "hits", "misses", "bytes_moved");
      });
  py::class_<DeviceCacheMemory>(module, "DeviceCacheMemory", py::module_local(), "Bytes held.")
      .def_readonly("device_bytes", &DeviceCacheMemory::device_bytes)
      .def_readonly("rows_bytes", &DeviceCacheMemory::rows_bytes)
      .def_readonly("index_bytes", &DeviceCacheMemory::index_bytes)
      .def_readonly("scratch_bytes", &DeviceCacheMemory::scratch_bytes)
      .def_readonly("host_bytes", &DeviceCacheMemory::host_bytes)
      .def_readonly("token_bytes", &DeviceCacheMemory::token_bytes)
      .def_readonly("free_bytes", &DeviceCacheMemory::free_bytes)
      .def_readonly("total_bytes", &DeviceCacheMemory::total_bytes)
      .def("__repr__", [](const py::object& self) {
        return describe(self, "device_bytes", "rows_bytes", "index_bytes", "scratch_bytes",
                        "host_bytes", "token_bytes", "free_bytes", "total_bytes");
      });
  py::class_<DeviceCache>(module, "DeviceCache", py::module_local(), "See icecache.DeviceCache.")
      .def_property_readonly_static("room_step",
                                    [](const py::object&) { return DeviceCache::kRoomStep; })
      .def(py::init([](int num_layers, int num_q_heads, int num_kv_heads, int head_dim, DType dtype,
                       float scale, const Config& config, int batch, std::int64_t max_tokens,
                       int device) {
             const CacheShape shape{num_layers, num_q_heads, num_kv_heads, head_dim, dtype, scale};
             return std::make_unique<DeviceCache>(shape, config, batch, max_tokens, device);
           }),
           Release())
      .def(
          "prefill",
          [](DeviceCache& self, int layer, int sequence, const TensorTuple& keys,
             const TensorTuple& values, const TensorTuple& queries, Address stream) {
            self.prefill(layer, sequence, view(keys), view(values), view(queries), pointer(stream));
          },
          Release())
      .def("limit_tokens", &DeviceCache::limit_tokens, Release())
      .def(
          "reserve",
          [](DeviceCache& self, int sequence, std::int64_t tokens, Address stream) {
            self.reserve(sequence, tokens, pointer(stream));
          },
          Release())
      .def("built", &DeviceCache::built, Release())
      .def("wait", &DeviceCache::wait, Release())
      .def(
          "step",
          [](DeviceCache& self, int layer, Address queries, Address keys, Address values,
             Address out, Address stream, Address rows) {
            self.step(layer, pointer(queries), pointer(keys), pointer(values), pointer(out),
                      pointer(stream), static_cast<const std::int32_t*>(pointer(rows)));
          },
          Release())
      .def(
          "rebuild",
          [](DeviceCache& self, int layer, int sequence, Address stream) {
            self.rebuild(layer, sequence, pointer(stream));
          },
          Release())
      .def(
          "fork",
          [](DeviceCache& self, int sequence, int from, Address stream) {
            self.fork(sequence, from, pointer(stream));
          },
          Release())
      .def(
          "truncate",
          [](DeviceCache& self, int sequence, std::int64_t length, Address stream) {
            self.truncate(sequence, length, pointer(stream));
          },
          Release())
      .def(
          "release",
          [](DeviceCache& self, int sequence, Address stream) {
            self.release(sequence, pointer(stream));
          },
          Release())
      .def(
          "length",
          [](DeviceCache& self, int layer, int sequence, Address stream) {
            return self.length(layer, sequence, pointer(stream));
          },
          Release())
      .def(
          "gather",
          [](DeviceCache& self, int layer, int sequence, Address keys, Address values,
             Address stream) {
            self.gather(layer, sequence, pointer(keys), pointer(values), pointer(stream));
          },
          Release())
      .def(
          "stats",
          [](DeviceCache& self, int layer, int kv_head, Address stream) {
            return self.stats(layer, kv_head, pointer(stream));
          },
          Release())
      .def("memory", &DeviceCache::memory, Release())
      .def("config", [](const DeviceCache& self) { return self.config(); });
}

}  // namespace icecache::bindings

#include <pybind11/stl.h>

#include "bindings/core_bindings.h"
#include "icecache/engine.h"
#include "icecache/parallel.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

std::vector<TensorView> views(const std::vector<TensorTuple>& tensors) {
  std::vector<TensorView> result;
  result.reserve(tensors.size());
  for (const TensorTuple& tensor : tensors) result.push_back(view(tensor));
  return result;
}

using Ids = std::vector<SeqId>;
using Tensors = std::vector<TensorTuple>;

}  // namespace

void bind_engine(py::module_& module) {
  module.def(
      "use_parallel_for",
      [](std::uintptr_t function) { use_parallel_for(reinterpret_cast<ParallelFor>(function)); },
      "Address of an icecache::ParallelFor that runs the engine's calls; 0: own threads.");
  py::enum_<DType>(module, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  py::enum_<Phase>(module, "Phase", "See icecache.Phase.")
      .value("auto", Phase::kAuto)
      .value("prefill", Phase::kPrefill)
      .value("prompt_end", Phase::kPromptEnd);

  // Arguments are converted while the GIL is held; it is released for the call itself.
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Engine>(module, "Engine", "See icecache.Engine.")
      .def(py::init([](int num_layers, int num_q_heads, int num_kv_heads, int head_dim, DType dtype,
                       float scale, const Config& config) {
             CacheShape shape;
             shape.num_layers = num_layers;
             shape.num_q_heads = num_q_heads;
             shape.num_kv_heads = num_kv_heads;
             shape.head_dim = head_dim;
             shape.dtype = dtype;
             shape.scale = scale;
             return std::make_unique<Engine>(shape, config);
           }),
           Release())
      .def("new_sequence", &Engine::new_sequence, Release())
      .def("fork", &Engine::fork, Release())
      .def("truncate", &Engine::truncate, Release())
      .def("release", &Engine::release, Release())
      .def("length", &Engine::length, Release())
      .def(
          "append",
          [](Engine& self, const Ids& ids, int layer, const Tensors& keys, const Tensors& values) {
            self.append(ids, layer, views(keys), views(values));
          },
          Release())
      .def(
          "attend",
          [](Engine& self, const Ids& ids, int layer, const Tensors& queries,
             const Tensors& outputs) { self.attend(ids, layer, views(queries), views(outputs)); },
          Release())
      .def(
          "step",
          [](Engine& self, const Ids& ids, int layer, const Tensors& keys, const Tensors& values,
             const Tensors& queries, const Tensors& outputs, const std::vector<Phase>& phases) {
            self.step(ids, layer, views(keys), views(values), views(queries), views(outputs),
                      phases);
          },
          py::arg("sequences"), py::arg("layer"), py::arg("keys"), py::arg("values"),
          py::arg("queries"), py::arg("outputs"), py::arg("phases") = std::vector<Phase>{},
          Release())
      .def(
          "observe",
          [](Engine& self, const Ids& ids, int layer, const Tensors& queries) {
            self.observe(ids, layer, views(queries));
          },
          Release())
      .def(
          "gather",
          [](const Engine& self, SeqId id, int layer, const TensorTuple& keys,
             const TensorTuple& values) { self.gather(id, layer, view(keys), view(values)); },
          Release())
      .def("address", [](const Engine& self) { return reinterpret_cast<std::uintptr_t>(&self); })
      .def("synchronize", &Engine::synchronize, Release())
      .def("stats", &Engine::stats, Release())
      .def("reset_stats", &Engine::reset_stats, Release())
      .def("memory", &Engine::memory, Release())
      .def("pool_bytes", &Engine::pool_bytes)
      .def("trace", &Engine::trace, Release())
      .def("check_integrity", &Engine::check_integrity, Release())
      .def("config", [](const Engine& self) { return self.config(); })
      .def("scale", [](const Engine& self) { return self.shape().softmax_scale(); });
}

}  // namespace icecache::bindings

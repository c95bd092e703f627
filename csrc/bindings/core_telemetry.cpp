// Plain records: statistics, traces, build information.
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/core_arguments.h"
#include "bindings/core_bindings.h"
#include "config/machine.h"
#include "icecache/engine.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

HeadStats sum_of(const HeadStats& one, const HeadStats& other) {
  HeadStats sum = one;
  for (const auto field :
       {&HeadStats::steps, &HeadStats::dense_steps, &HeadStats::tokens_selected,
        &HeadStats::pages_selected, &HeadStats::widened_steps, &HeadStats::doubtful_steps,
        &HeadStats::seals, &HeadStats::merges, &HeadStats::bytes_read, &HeadStats::hits,
        &HeadStats::misses, &HeadStats::bytes_moved}) {
    sum.*field += other.*field;
  }
  for (const auto field : {&HeadStats::mass, &HeadStats::select_seconds, &HeadStats::attend_seconds,
                           &HeadStats::index_seconds}) {
    sum.*field += other.*field;
  }
  sum.worst_mass = std::min(one.worst_mass, other.worst_mass);
  return sum;
}

void bind_stats(py::module_& module) {
  forbid_new(
      py::class_<HeadStats>(
          module, "HeadStats", py::is_final(),
          "Sums since the start (or reset_stats) for one layer and KV head, over all "
          "sequences. Two of them add up.")
          .def_readonly("steps", &HeadStats::steps, "decode queries answered with an index")
          .def_readonly("dense_steps", &HeadStats::dense_steps,
                        "decode queries that attended to everything")
          .def_readonly("tokens_selected", &HeadStats::tokens_selected,
                        "by the index; sink and window not counted")
          .def_readonly("pages_selected", &HeadStats::pages_selected)
          .def_readonly("widened_steps", &HeadStats::widened_steps,
                        "steps with more candidates than at first, lest a main token be missed")
          .def_readonly("doubtful_steps", &HeadStats::doubtful_steps,
                        "steps where one may have been missed all the same")
          .def_readonly("seals", &HeadStats::seals, "segments built of decoded tokens")
          .def_readonly("merges", &HeadStats::merges, "segments built of other segments")
          .def_readonly("bytes_read", &HeadStats::bytes_read,
                        "sketches, summaries, candidates, attended K and V")
          .def_readonly("hits", &HeadStats::hits, "candidates whose key was on the device")
          .def_readonly("misses", &HeadStats::misses, "and those whose key was in host memory")
          .def_readonly("bytes_moved", &HeadStats::bytes_moved,
                        "keys and values, from host to device")
          .def_readonly(
              "mass", &HeadStats::mass,
              "sum over steps of the share of attention mass that was attended exactly, mean "
              "over the group's heads; divide by steps; NaN of a DeviceCache")
          .def_readonly("worst_mass", &HeadStats::worst_mass,
                        "least such share of any head and step")
          .def_readonly("select_seconds", &HeadStats::select_seconds)
          .def_readonly("attend_seconds", &HeadStats::attend_seconds)
          .def_readonly("index_seconds", &HeadStats::index_seconds)
          .def("__add__", &sum_of, py::is_operator())
          .def("__repr__", [](const py::object& self) {
            return describe(self, "steps", "dense_steps", "tokens_selected", "pages_selected",
                            "widened_steps", "doubtful_steps", "seals", "merges", "bytes_read",
                            "hits", "misses", "bytes_moved", "mass", "worst_mass", "select_seconds",
                            "attend_seconds", "index_seconds");
          }));

  forbid_new(
      py::class_<MemoryStats>(module, "MemoryStats", py::is_final(), "Bytes that an engine holds.")
          .def_readonly("pool_bytes", &MemoryStats::pool_bytes, "pages in use, in host memory")
          .def_readonly("pool_capacity", &MemoryStats::pool_capacity, "the bound: host_memory")
          .def_readonly("index_bytes", &MemoryStats::index_bytes, "sketches, summaries, tables")
          .def_readonly("query_bytes", &MemoryStats::query_bytes,
                        "recent queries, and sums of them, that shape the metric")
          .def_readonly("device_bytes", &MemoryStats::device_bytes,
                        "what the device holds, or would hold, for these sequences")
          .def_readonly("sequences", &MemoryStats::sequences)
          .def_readonly("retained_sequences", &MemoryStats::retained_sequences, "of `sequences`")
          .def_readonly("retained_bytes", &MemoryStats::retained_bytes,
                        "pages that only retained sequences hold")
          .def_readonly("evicted_sequences", &MemoryStats::evicted_sequences,
                        "retained ones that have ended for want of pages")
          .def("__repr__", [](const py::object& self) {
            return describe(self, "pool_bytes", "pool_capacity", "index_bytes", "query_bytes",
                            "device_bytes", "sequences", "retained_sequences", "retained_bytes",
                            "evicted_sequences");
          }));
}

void bind_trace(py::module_& module) {
  forbid_new(py::class_<PageInfo>(module, "PageInfo", py::is_final(), "A page of an index.")
                 .def_readonly("page", &PageInfo::page, "id in the page pool")
                 .def_readonly("node", &PageInfo::node, "far-field node, -1 where there is none")
                 .def_readonly("positions", &PageInfo::positions, "of its tokens, in slot order")
                 .def("__repr__", [](const py::object& self) {
                   return describe(self, "page", "node", "positions");
                 }));

  forbid_new(py::class_<FarNodeInfo>(module, "FarNodeInfo", py::is_final(),
                                     "A node of the far field in one step.")
                 .def_readonly("weight", &FarNodeInfo::weight,
                               "[G] log weight of the tokens that were not picked")
                 .def_readonly("tokens", &FarNodeInfo::tokens, "members, picked ones included")
                 .def("__repr__",
                      [](const py::object& self) { return describe(self, "weight", "tokens"); }));

  forbid_new(py::class_<StepTrace>(
                 module, "StepTrace", py::is_final(),
                 "What one decode step of one layer and KV head looked at. Every attribute is "
                 "converted when it is read: keep it in a variable.")
                 .def_readonly("sink", &StepTrace::sink, "positions")
                 .def_readonly("window", &StepTrace::window, "positions")
                 .def_readonly("selected", &StepTrace::selected, "positions, ascending")
                 .def_readonly("pages", &StepTrace::pages, "all pages of the index")
                 .def_readonly("far_nodes", &StepTrace::far_nodes, "indexed by PageInfo.node")
                 .def_readonly("near_lse", &StepTrace::near_lse, "[G] log weight attended exactly")
                 .def_readonly("total_lse", &StepTrace::total_lse,
                               "[G] log weight of everything, estimated")
                 .def("__repr__", [](const StepTrace& self) {
                   return "StepTrace(" + std::to_string(self.sink.size()) + " sink, " +
                          std::to_string(self.window.size()) + " window, " +
                          std::to_string(self.selected.size()) + " selected, " +
                          std::to_string(self.pages.size()) + " pages)";
                 }));
}

}  // namespace

void bind_telemetry(py::module_& module) {
  bind_stats(module);
  bind_trace(module);
  forbid_new(
      py::class_<BuildInfo>(module, "BuildInfo", py::is_final(), "Versions and what was built in.")
          .def_readonly("version", &BuildInfo::version)
          .def_readonly("compiler", &BuildInfo::compiler)
          .def_readonly("cuda", &BuildInfo::cuda)
          .def_readonly("cuda_version", &BuildInfo::cuda_version)
          .def_readonly("faiss", &BuildInfo::faiss)
          .def_readonly("faiss_version", &BuildInfo::faiss_version)
          .def_readonly("debug", &BuildInfo::debug)
          .def("__repr__", [](const py::object& self) {
            return describe(self, "version", "compiler", "cuda", "cuda_version", "faiss",
                            "faiss_version", "debug");
          }));
  module.def("build_info", &build_info, "Versions and what was built in.");
  module.def("simd_level", &simd_level,
             "Kernels in use: avx512, avx2 or scalar. Raises InvalidArgument where ICECACHE_SIMD "
             "asks for what is not there.");
  module.def("usable_cores", &usable_cores,
             "Cores that this process may keep busy: by its affinity, and by the CPU time that "
             "its control group grants.");
  module.def("usable_memory", &usable_memory,
             "Bytes of memory, or the control group's limit where that is smaller.");
}

}  // namespace icecache::bindings

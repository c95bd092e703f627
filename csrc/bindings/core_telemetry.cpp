// Plain records: statistics, traces, build information.
#include <pybind11/stl.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/core_arguments.h"
#include "bindings/core_bindings.h"
#include "config/machine.h"
#include "icecache/engine.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

// A field that Python reads, and gives to of().
template <typename Record, typename Value>
struct Field {
  const char* name;
  Value Record::*member;
  const char* doc;
};

constexpr Field<HeadStats, std::int64_t> kHeadCounts[] = {
    {"steps", &HeadStats::steps, "decode queries answered with an index"},
    {"dense_steps", &HeadStats::dense_steps, "decode queries that attended to everything"},
    {"prompt_tokens", &HeadStats::prompt_tokens, "tokens of prompts that attended"},
    {"sparse_prompt_tokens", &HeadStats::sparse_prompt_tokens,
     "tokens of prompts that attended within prefill_budget"},
    {"tokens_selected", &HeadStats::tokens_selected, "by the index; sink and window not counted"},
    {"pages_selected", &HeadStats::pages_selected, "by the index"},
    {"widened_steps", &HeadStats::widened_steps,
     "steps with more candidates than at first, lest a main token be missed"},
    {"doubtful_steps", &HeadStats::doubtful_steps,
     "steps where one may have been missed all the same"},
    {"seals", &HeadStats::seals, "segments built of decoded tokens"},
    {"merges", &HeadStats::merges, "segments built of other segments"},
    {"bytes_read", &HeadStats::bytes_read, "sketches, summaries, candidates, attended K and V"},
    {"hits", &HeadStats::hits, "candidates whose key was on the device"},
    {"misses", &HeadStats::misses, "and those whose key was in host memory"},
    {"bytes_moved", &HeadStats::bytes_moved, "keys and values, from host to device"},
};
constexpr Field<HeadStats, double> kHeadNumbers[] = {
    {"mass", &HeadStats::mass,
     "sum over steps of the share of attention mass that was attended exactly, mean over the "
     "group's heads; divide by steps; NaN of a DeviceCache"},
    {"worst_mass", &HeadStats::worst_mass, "least such share of any head and step"},
    {"select_seconds", &HeadStats::select_seconds, "part of attend_seconds"},
    {"attend_seconds", &HeadStats::attend_seconds, "of decode steps"},
    {"index_seconds", &HeadStats::index_seconds, "of building and growing indexes"},
};
constexpr Field<MemoryStats, std::int64_t> kMemoryCounts[] = {
    {"pool_bytes", &MemoryStats::pool_bytes, "pages in use, in host memory"},
    {"pool_capacity", &MemoryStats::pool_capacity, "the bound: host_memory"},
    {"index_bytes", &MemoryStats::index_bytes, "sketches, summaries, tables"},
    {"query_bytes", &MemoryStats::query_bytes,
     "recent queries, and sums of them, that shape the metric"},
    {"device_bytes", &MemoryStats::device_bytes,
     "what the device holds, or would hold, for these sequences"},
    {"sequences", &MemoryStats::sequences, "that were not released"},
    {"retained_sequences", &MemoryStats::retained_sequences, "of `sequences`"},
    {"retained_bytes", &MemoryStats::retained_bytes, "pages that only retained sequences hold"},
    {"evicted_sequences", &MemoryStats::evicted_sequences,
     "retained ones that have ended for want of pages"},
    {"resident_sequences", &MemoryStats::resident_sequences,
     "whose keys and values a CUDA device holds all (device_tokens)"},
    {"resident_bytes", &MemoryStats::resident_bytes,
     "of the device, for those sequences, in use or not; part of device_bytes"},
};

HeadStats sum_of(HeadStats one, const HeadStats& other) {
  return one += other;
}

// Sets the field of that name; false where the table has none.
template <typename Record, typename Value, std::size_t N>
bool set_field(const Field<Record, Value> (&fields)[N], Record& record, const std::string& name,
               py::handle value) {
  for (const auto& field : fields) {
    if (name != field.name) continue;
    if constexpr (std::is_integral_v<Value>) {
      record.*field.member = integer(name, value);
    } else {
      record.*field.member = py::float_(py::reinterpret_borrow<py::object>(value));
    }
    return true;
  }
  return false;
}

// A record whose fields are those of the tables, each readable, in repr() and an argument of of().
template <typename Record, typename... Tables>
py::class_<Record> bind_record(py::module_& module, const char* name, const char* doc,
                               const Tables&... tables) {
  py::class_<Record> made(module, name, py::is_final(), doc);
  const auto each = [&](const auto& table) {
    for (const auto& field : table) made.def_readonly(field.name, field.member, field.doc);
  };
  (each(tables), ...);
  made.def_static(
      "of",
      [name, &tables...](const py::kwargs& given) {
        Record record;
        for (const auto& [key, value] : given) {
          const auto field = py::cast<std::string>(key);
          if (!(set_field(tables, record, field, value) || ...)) {
            throw py::type_error(message(name, " has no field ", field));
          }
        }
        return record;
      },
      "With these fields; others are as at the start.");
  made.def("__repr__", [&tables...](const py::object& self) {
    std::vector<const char*> names;
    const auto note = [&](const auto& table) {
      for (const auto& field : table) names.push_back(field.name);
    };
    (note(tables), ...);
    return describe(self, names);
  });
  forbid_new(made);
  return made;
}

void bind_stats(py::module_& module) {
  bind_record<HeadStats>(module, "HeadStats",
                         "Sums since the start (or reset_stats) for one layer and KV head, over "
                         "all sequences. Two of them add up.",
                         kHeadCounts, kHeadNumbers)
      .def("__add__", &sum_of, py::is_operator());
  bind_record<MemoryStats>(module, "MemoryStats", "Bytes that an engine holds.", kMemoryCounts);
}

void bind_trace(py::module_& module) {
  forbid_new(py::class_<PageInfo>(module, "PageInfo", py::is_final(), "A page of an index.")
                 .def_readonly("page", &PageInfo::page, "id in the page pool")
                 .def_readonly("node", &PageInfo::node, "far-field node, -1 where there is none")
                 .def_readonly("positions", &PageInfo::positions, "of its tokens, in slot order")
                 .def("__repr__", [](const py::object& self) {
                   return describe(self, {"page", "node", "positions"});
                 }));

  forbid_new(py::class_<FarNodeInfo>(module, "FarNodeInfo", py::is_final(),
                                     "A node of the far field in one step.")
                 .def_readonly("weight", &FarNodeInfo::weight,
                               "[G] log weight of the tokens that were not picked")
                 .def_readonly("tokens", &FarNodeInfo::tokens, "members, picked ones included")
                 .def("__repr__", [](const py::object& self) {
                   return describe(self, {"weight", "tokens"});
                 }));

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
            return describe(self, {"version", "compiler", "cuda", "cuda_version", "faiss",
                                   "faiss_version", "debug"});
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

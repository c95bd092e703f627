#include <dlfcn.h>
#include <pybind11/stl.h>

#include "bindings/core_arguments.h"
#include "bindings/core_bindings.h"
#include "bindings/core_tensors.h"
#include "icecache/engine.h"
#include "icecache/error.h"
#include "icecache/parallel.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

using Self = Live<Engine>;
using Ids = std::vector<SeqId>;
using Unlocked = py::gil_scoped_release;

// Index builds that are under way end before an engine does: other Python threads go on meanwhile.
struct UnlockedDelete {
  void operator()(Engine* engine) const {
    const Unlocked unlocked;
    delete engine;
  }
};

constexpr const char* kSymbol = "icecache_torch_parallel_for";

// Only of a library that is loaded already: no code runs here, and none is found by a wrong path.
void use_parallel_for_of(const py::object& library) {
  if (library.is_none()) return use_parallel_for(nullptr);
  const std::string path = text("library", library);
  void* handle = path.find('\0') == std::string::npos && !path.empty()
                     ? dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD)
                     : nullptr;
  // Never closed: the function stays in use.
  void* function = handle != nullptr ? dlsym(handle, kSymbol) : nullptr;
  if (function == nullptr) {
    throw InvalidArgument(message("library must be the path of a loaded library that defines ",
                                  kSymbol, ", got ", path));
  }
  use_parallel_for(reinterpret_cast<ParallelFor>(function));
}

std::unique_ptr<Engine, UnlockedDelete> make_engine(py::handle num_layers, py::handle num_q_heads,
                                                    py::handle num_kv_heads, py::handle head_dim,
                                                    py::handle dtype, py::handle scale,
                                                    py::handle logit_softcap, Live<Config> config) {
  const CacheShape shape =
      shape_of(num_layers, num_q_heads, num_kv_heads, head_dim, dtype, scale, logit_softcap);
  const Config values = *config;  // another thread may change it meanwhile
  const Unlocked unlocked;
  return std::unique_ptr<Engine, UnlockedDelete>(new Engine(shape, values));
}

TensorForm form_of(Self self, const char* name, Use use = Use::kRead) {
  TensorForm form;
  form.name = name;
  form.dtype = self->shape().dtype;
  form.use = use;
  return form;
}

TensorForm lse_form() {
  TensorForm form;
  form.name = "lse";
  form.has_dim = false;
  form.use = Use::kWritten;
  return form;
}

// Of a tensor, or a list, or None.
Rows lse_rows(py::handle tensors, std::size_t sequences) {
  return tensors.is_none() ? Rows() : batch_or_list_rows(lse_form(), tensors, sequences);
}

Phase phase_of(const char* name, std::int64_t number) {
  if (number < 0 || number > static_cast<int>(Phase::kVerify)) {
    throw InvalidArgument(message(name, " must be from 0 to 3, got ", number));
  }
  return static_cast<Phase>(number);
}

std::vector<Phase> phases_of(py::handle values) {
  std::vector<Phase> phases;
  for (const std::int64_t number : integers("phases", values)) {
    phases.push_back(phase_of("phases", number));
  }
  return phases;
}

// One phase for all of `sequences`.
std::vector<Phase> phases_of(py::handle value, std::size_t sequences) {
  return std::vector<Phase>(sequences, phase_of("phase", narrow_integer("phase", value)));
}

// Runs a call that appends `tokens`. Signals that came meanwhile are handled before its result
// stands: where a handler raises (Ctrl-C), the tokens are taken back, as of a call that failed.
template <typename Call>
void append_or_not(Self self, const Ids& ids, int layer, std::span<const TensorView> tokens,
                   const Call& call) {
  {
    const Unlocked unlocked;
    call();
  }
  if (PyErr_CheckSignals() == 0) return;
  py::error_already_set raised;
  {
    const Unlocked unlocked;
    std::vector<std::int64_t> counts;
    for (const TensorView& view : tokens) counts.push_back(view.tokens);
    self->take_back(ids, layer, counts);
  }
  throw raised;
}

void append(Self self, py::handle seqs, py::handle layer_number, py::handle keys,
            py::handle values) {
  const Ids ids = integers("seqs", seqs);
  const int layer = narrow_integer("layer", layer_number);
  const Rows k = batch_or_list_rows(form_of(self, "keys"), keys, ids.size());
  const Rows v = batch_or_list_rows(form_of(self, "values"), values, ids.size());
  append_or_not(self, ids, layer, k.views, [&] { self->append(ids, layer, k.views, v.views); });
}

// New tensors of the form of the queries.
py::object attend(Self self, py::handle seqs, py::handle layer_number, py::handle queries,
                  py::handle phase, py::handle lse_tensors) {
  const Ids ids = integers("seqs", seqs);
  const int layer = narrow_integer("layer", layer_number);
  const std::vector<Phase> phases = phases_of(phase, ids.size());
  const bool is_batch = is_tensor(queries);
  const auto given = is_batch ? py::reinterpret_borrow<py::object>(queries)
                              : py::reinterpret_steal<py::object>(PySequence_List(queries.ptr()));
  if (!given) PyErr_Clear();  // no list: named below
  const Rows q =
      batch_or_list_rows(form_of(self, "queries"), given ? py::handle(given) : queries, ids.size());
  const Rows lse = lse_rows(lse_tensors, ids.size());
  py::object result;
  if (is_batch) {
    result = new_like(given);
  } else {
    py::list parts;
    for (const py::handle part : given) parts.append(new_like(part));
    result = parts;
  }
  const Rows out = batch_or_list_rows(form_of(self, "outputs", Use::kMade), result, ids.size());
  {
    const Unlocked unlocked;
    self->attend(ids, layer, q.views, out.views, phases, lse.views);
  }
  return result;
}

py::object step(Self self, py::handle seqs, py::handle layer_number, py::handle queries,
                py::handle keys, py::handle values, py::handle phase, py::handle lse_tensor) {
  const Ids ids = integers("seqs", seqs);
  const int layer = narrow_integer("layer", layer_number);
  const std::vector<Phase> phases = phases_of(phase, ids.size());
  const Rows q = batch_rows(form_of(self, "queries"), queries, ids.size());
  const Rows k = batch_rows(form_of(self, "keys"), keys, ids.size());
  const Rows v = batch_rows(form_of(self, "values"), values, ids.size());
  // Before memory is taken for as many outputs: an expanded tensor is of any length.
  if (q.held[0].size(2) != k.held[0].size(2)) {
    throw InvalidArgument(message("queries must have as many tokens as keys (", k.held[0].size(2),
                                  "), got ", q.held[0].size(2)));
  }
  const Rows lse = lse_rows(lse_tensor, ids.size());
  py::object result = new_like(queries);
  const Rows out = batch_rows(form_of(self, "outputs", Use::kMade), result, ids.size());
  append_or_not(self, ids, layer, k.views, [&] {
    self->step(ids, layer, k.views, v.views, q.views, out.views, phases, lse.views);
  });
  return result;
}

void step_packed(Self self, py::handle seqs, py::handle layer_number, py::handle queries,
                 py::handle keys, py::handle values, py::handle outputs, py::handle row_firsts,
                 py::handle row_counts, py::handle row_phases, py::handle lse_tensor) {
  const Ids ids = integers("seqs", seqs);
  const int layer = narrow_integer("layer", layer_number);
  const auto firsts = integers("firsts", row_firsts), counts = integers("counts", row_counts);
  const std::vector<Phase> phases = phases_of(row_phases);
  if (firsts.size() != ids.size() || counts.size() != ids.size() || phases.size() != ids.size()) {
    throw InvalidArgument(message("seqs, firsts, counts and phases must be of one length, got ",
                                  ids.size(), ", ", firsts.size(), ", ", counts.size(), " and ",
                                  phases.size()));
  }
  if (keys.is_none() != values.is_none()) {
    throw InvalidArgument(message("keys and values must be two tensors, or None both, got ",
                                  type_name(keys), " and ", type_name(values)));
  }
  const Rows q = packed_rows(form_of(self, "queries"), queries, firsts, counts);
  const Rows out = packed_rows(form_of(self, "outputs", Use::kWritten), outputs, firsts, counts);
  const Rows lse =
      lse_tensor.is_none() ? Rows() : packed_rows(lse_form(), lse_tensor, firsts, counts);
  if (keys.is_none()) {
    const Unlocked unlocked;
    return self->attend(ids, layer, q.views, out.views, phases, lse.views);
  }
  const Rows k = packed_rows(form_of(self, "keys"), keys, firsts, counts);
  const Rows v = packed_rows(form_of(self, "values"), values, firsts, counts);
  append_or_not(self, ids, layer, k.views, [&] {
    self->step(ids, layer, k.views, v.views, q.views, out.views, phases, lse.views);
  });
}

void observe(Self self, py::handle seqs, py::handle layer_number, py::handle queries,
             py::handle phase) {
  const Ids ids = integers("seqs", seqs);
  const int layer = narrow_integer("layer", layer_number);
  const std::vector<Phase> phases = phases_of(phase, ids.size());
  const Rows q = batch_or_list_rows(form_of(self, "queries"), queries, ids.size());
  const Unlocked unlocked;
  self->observe(ids, layer, q.views, phases);
}

void gather(Self self, py::handle seq, py::handle layer_number, py::handle keys,
            py::handle values) {
  const SeqId id = integer("seq", seq);
  const int layer = narrow_integer("layer", layer_number);
  TensorForm form = form_of(self, "keys", Use::kWritten);
  form.dims = "[H, T, D]";
  const Rows k = batch_or_list_rows(form, py::make_tuple(keys), 1);
  form.name = "values";
  const Rows v = batch_or_list_rows(form, py::make_tuple(values), 1);
  const Unlocked unlocked;
  self->gather(id, layer, k.views[0], v.views[0]);
}

using Class = py::class_<Engine, std::unique_ptr<Engine, UnlockedDelete>>;

void bind_sequences(Class& engine) {
  engine
      .def("new_sequence",
           [](Self self) {
             const Unlocked unlocked;
             return self->new_sequence();
           })
      .def("fork",
           [](Self self, py::handle seq) {
             const SeqId id = integer("seq", seq);
             const Unlocked unlocked;
             return self->fork(id);
           })
      .def("fork",
           [](Self self, py::handle seq, py::handle length) {
             const SeqId id = integer("seq", seq);
             const std::int64_t kept = integer("length", length);
             const Unlocked unlocked;
             return self->fork(id, kept);
           })
      .def("retain",
           [](Self self, py::handle seq) {
             const SeqId id = integer("seq", seq);
             const Unlocked unlocked;
             self->retain(id);
           })
      .def("contains",
           [](Self self, py::handle seq) {
             const SeqId id = integer("seq", seq);
             const Unlocked unlocked;
             return self->contains(id);
           })
      .def("truncate",
           [](Self self, py::handle seq, py::handle length) {
             const SeqId id = integer("seq", seq);
             const std::int64_t kept = integer("length", length);
             const Unlocked unlocked;
             self->truncate(id, kept);
           })
      .def("release",
           [](Self self, py::handle seq) {
             const SeqId id = integer("seq", seq);
             const Unlocked unlocked;
             self->release(id);
           })
      .def("length", [](Self self, py::handle seq, py::handle layer_number) {
        const SeqId id = integer("seq", seq);
        const int layer = narrow_integer("layer", layer_number);
        const Unlocked unlocked;
        return self->length(id, layer);
      });
}

void bind_telemetry_of(Class& engine) {
  engine
      .def("synchronize",
           [](Self self) {
             const Unlocked unlocked;
             self->synchronize();
           })
      .def("stats",
           [](Self self, py::handle layer_number, py::handle kv_head) {
             const int layer = narrow_integer("layer", layer_number);
             const int head = narrow_integer("kv_head", kv_head);
             const Unlocked unlocked;
             return self->stats(layer, head);
           })
      .def("reset_stats",
           [](Self self) {
             const Unlocked unlocked;
             self->reset_stats();
           })
      .def("memory",
           [](Self self) {
             const Unlocked unlocked;
             return self->memory();
           })
      .def("pool_bytes", [](Self self) { return self->pool_bytes(); })
      .def("trace",
           [](Self self, py::handle seq, py::handle layer_number, py::handle kv_head) {
             const SeqId id = integer("seq", seq);
             const int layer = narrow_integer("layer", layer_number);
             const int head = narrow_integer("kv_head", kv_head);
             const Unlocked unlocked;
             return self->trace(id, layer, head);
           })
      .def("check_integrity",
           [](Self self) {
             const Unlocked unlocked;
             self->check_integrity();
           })
      .def("config", [](Self self) { return self->config(); })
      .def("scale", [](Self self) { return self->shape().softmax_scale(); });
}

}  // namespace

void bind_engine(py::module_& module) {
  module.def("use_parallel_for", &use_parallel_for_of, py::arg("library"),
             "Path of a loaded library whose icecache_torch_parallel_for runs the engine's calls "
             "from now on; None: own threads.");
  Class engine(module, "Engine", "See icecache.Engine.");
  engine.def(py::init(&make_engine))
      .def("append", &append)
      .def("attend", &attend)
      .def("step", &step)
      .def("step_packed", &step_packed)
      .def("observe", &observe)
      .def("gather", &gather);
  bind_sequences(engine);
  bind_telemetry_of(engine);
}

}  // namespace icecache::bindings

#include "icecache/config.h"

#include <pybind11/stl.h>

#include "bindings/core_arguments.h"
#include "bindings/core_bindings.h"
#include "host/page_bound.h"

namespace py = pybind11;

namespace icecache::bindings {

void bind_config(py::module_& module) {
  py::class_<Config>(module, "Config",
                     "Values of all parameters, as text; icecache.Config gives them their types.")
      .def(py::init<>())
      .def(py::init([](Live<Config> other) { return *other; }))
      .def(
          "set",
          [](Live<Config> self, py::handle name, py::handle value) {
            const std::string field = text("name", name);
            self->set(field, text(field, value));
          },
          py::arg("name"), py::arg("value"))
      .def(
          "get", [](Live<Config> self, py::handle name) { return self->get(text("name", name)); },
          py::arg("name"))
      .def(
          "resolved",
          [](Live<Config> self, py::handle num_layers, py::handle num_q_heads,
             py::handle num_kv_heads, py::handle head_dim) {
            return self->resolved({narrow_integer("num_layers", num_layers),
                                   narrow_integer("num_q_heads", num_q_heads),
                                   narrow_integer("num_kv_heads", num_kv_heads),
                                   narrow_integer("head_dim", head_dim)});
          },
          py::arg("num_layers"), py::arg("num_q_heads"), py::arg("num_kv_heads"),
          py::arg("head_dim"),
          "With every derived value, for a float32 cache of this shape; InvalidArgument where "
          "values contradict each other or the shape.")
      .def(
          "most_slots",
          [](Live<Config> self, py::handle tokens) {
            const int count = narrow_integer("tokens", tokens);
            if (count < 0) throw InvalidArgument(message("tokens must be 0 or more, got ", count));
            return most_slots(*self, count);
          },
          py::arg("tokens"),
          "Slots that the pages of an index of so many tokens have at most, resolved parameters "
          "given.");

  py::class_<ConfigField> field(module, "ConfigField", py::is_final(),
                                "One parameter: its type, default and meaning.");
  forbid_new(field);
  field
      .def_property_readonly("name", [](Live<ConfigField> self) { return std::string(self->name); })
      .def_property_readonly(
          "type", [](Live<ConfigField> self) { return std::string(self->type); },
          "int, real, text or flag")
      .def_property_readonly(
          "default", [](Live<ConfigField> self) { return std::string(self->default_value); },
          "as text")
      .def_property_readonly("unit", [](Live<ConfigField> self) { return std::string(self->unit); })
      .def_property_readonly("meaning",
                             [](Live<ConfigField> self) { return std::string(self->meaning); });
  module.def(
      "config_fields",
      [] {
        const std::span<const ConfigField> fields = config_fields();
        return std::vector<ConfigField>(fields.begin(), fields.end());
      },
      "All parameters in the order of their declaration.");
}

}  // namespace icecache::bindings

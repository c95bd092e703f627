#include <pybind11/stl.h>

#include "bindings/core_bindings.h"
#include "icecache/config.h"

namespace py = pybind11;

namespace icecache::bindings {

void bind_config(py::module_& module) {
  py::class_<Config>(module, "Config",
                     "Values of all parameters, as text; icecache.Config gives them their types.")
      .def(py::init<>())
      .def(py::init<const Config&>())
      .def(
          "set",
          [](Config& self, const std::string& name, const std::string& value) {
            self.set(name, value);
          },
          py::arg("name"), py::arg("value"))
      .def(
          "get", [](const Config& self, const std::string& name) { return self.get(name); },
          py::arg("name"))
      .def(
          "resolved",
          [](const Config& self, int num_layers, int num_q_heads, int num_kv_heads, int head_dim) {
            return self.resolved({num_layers, num_q_heads, num_kv_heads, head_dim});
          },
          py::arg("num_layers"), py::arg("num_q_heads"), py::arg("num_kv_heads"),
          py::arg("head_dim"),
          "With every derived value, for a float32 cache of this shape; InvalidArgument where "
          "values contradict each other or the shape.");

  py::class_<ConfigField>(module, "ConfigField", "One parameter: its type, default and meaning.")
      .def_property_readonly("name", [](const ConfigField& self) { return std::string(self.name); })
      .def_property_readonly(
          "type", [](const ConfigField& self) { return std::string(self.type); },
          "int, real, text or flag")
      .def_property_readonly(
          "default", [](const ConfigField& self) { return std::string(self.default_value); },
          "as text")
      .def_property_readonly("unit", [](const ConfigField& self) { return std::string(self.unit); })
      .def_property_readonly("meaning",
                             [](const ConfigField& self) { return std::string(self.meaning); });
  module.def(
      "config_fields",
      [] {
        const std::span<const ConfigField> fields = config_fields();
        return std::vector<ConfigField>(fields.begin(), fields.end());
      },
      "All parameters in the order of their declaration.");
}

}  // namespace icecache::bindings

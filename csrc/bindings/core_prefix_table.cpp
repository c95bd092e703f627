#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "bindings/core_arguments.h"
#include "bindings/core_bindings.h"
#include "icecache/error.h"
#include "icecache/prefix_table.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

using Table = Live<PrefixTable>;
using Text = PrefixTable::Text;

std::vector<std::int32_t> tokens_of(py::handle values) {
  std::vector<std::int32_t> tokens;
  for (const std::int64_t value : integers("tokens", values)) {
    if (value < INT32_MIN || value > INT32_MAX) {
      throw InvalidArgument(message("tokens must be numbers of 32 bits, got ", value));
    }
    tokens.push_back(static_cast<std::int32_t>(value));
  }
  return tokens;
}

std::vector<std::string> hashes_of(py::handle values) {
  std::vector<std::string> hashes;
  for (const py::handle value : py::list(py::reinterpret_borrow<py::object>(values))) {
    if (!py::isinstance<py::bytes>(value)) {
      throw py::type_error("hashes must be bytes, got " + type_name(value));
    }
    hashes.push_back(value.cast<std::string>());
  }
  return hashes;
}

Text text_of(Table self, py::handle tokens, py::handle hashes, py::handle space, bool by_token) {
  Text result;
  result.tokens = tokens_of(tokens);
  result.hashes =
      hashes.is_none() ? hash_blocks(result.tokens, self->block_tokens()) : hashes_of(hashes);
  result.space = text("space", space);
  result.by_token = by_token;
  return result;
}

}  // namespace

void bind_prefix_table(py::module_& module) {
  forbid_new(py::class_<Text>(module, "PrefixText", py::is_final(),
                              "A text as PrefixTable compares it; see PrefixTable.text."));
  py::class_<PrefixTable>(module, "PrefixTable", py::is_final(),
                          "Sequences by what they begin with; see icecache.prefix_store.")
      .def(py::init([](py::handle block_tokens) {
             return PrefixTable(integer("block_tokens", block_tokens));
           }),
           py::arg("block_tokens"))
      .def("text", &text_of, py::arg("tokens"), py::arg("hashes") = py::none(),
           py::arg("space") = "", py::arg("by_token") = true)
      .def("add", [](Table self, py::handle seq,
                     Live<Text> text) { return self->add(integer("seq", seq), *text); })
      .def("find",
           [](Table self, Live<Text> text) {
             const PrefixTable::Match match = self->find(*text);
             return std::pair(match.sequence, match.length);
           })
      .def("version", [](Table self) { return self->version(); })
      .def("use", [](Table self, py::handle seq) { self->use(integer("seq", seq)); })
      .def("pin", [](Table self, py::handle seq) { self->pin(integer("seq", seq)); })
      .def("unpin", [](Table self, py::handle seq) { self->unpin(integer("seq", seq)); })
      .def("remove", [](Table self, py::handle seq) { self->remove(integer("seq", seq)); })
      .def("oldest", [](Table self) { return self->oldest(); })
      .def("sequences", [](Table self) { return self->sequences(); })
      .def("__contains__",
           [](Table self, py::handle seq) { return self->contains(integer("seq", seq)); })
      .def("__len__", [](Table self) { return self->size(); });
}

}  // namespace icecache::bindings

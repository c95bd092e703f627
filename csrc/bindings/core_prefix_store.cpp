#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "bindings/core_arguments.h"
#include "bindings/core_bindings.h"
#include "icecache/error.h"
#include "icecache/prefix_store.h"

namespace py = pybind11;

namespace icecache::bindings {
namespace {

using Store = Live<PrefixStore>;

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

PrefixStore::Text text_of(Store self, py::handle tokens, py::handle hashes, py::handle space,
                          bool by_token) {
  PrefixStore::Text result;
  result.tokens = tokens_of(tokens);
  result.hashes =
      hashes.is_none() ? hash_blocks(result.tokens, self->block_tokens()) : hashes_of(hashes);
  result.space = text("space", space);
  result.by_token = by_token;
  return result;
}

}  // namespace

void bind_prefix_store(py::module_& module) {
  py::class_<PrefixStore>(module, "PrefixStore", py::is_final(),
                          "Sequences by what they begin with; see icecache.PrefixStore.")
      .def(py::init([](py::handle block_tokens) {
             return PrefixStore(integer("block_tokens", block_tokens));
           }),
           py::arg("block_tokens"))
      .def(
          "add",
          [](Store self, py::handle seq, py::handle tokens, py::handle hashes, py::handle space,
             bool by_token) {
            return self->add(integer("seq", seq), text_of(self, tokens, hashes, space, by_token));
          },
          py::arg("seq"), py::arg("tokens"), py::arg("hashes") = py::none(),
          py::arg("space") = "", py::arg("by_token") = true)
      .def(
          "find",
          [](Store self, py::handle tokens, py::handle hashes, py::handle space, bool by_token) {
            const PrefixStore::Match match =
                self->find(text_of(self, tokens, hashes, space, by_token));
            return std::pair(match.sequence, match.length);
          },
          py::arg("tokens"), py::arg("hashes") = py::none(), py::arg("space") = "",
          py::arg("by_token") = true)
      .def("use", [](Store self, py::handle seq) { self->use(integer("seq", seq)); })
      .def("pin", [](Store self, py::handle seq) { self->pin(integer("seq", seq)); })
      .def("unpin", [](Store self, py::handle seq) { self->unpin(integer("seq", seq)); })
      .def("remove", [](Store self, py::handle seq) { self->remove(integer("seq", seq)); })
      .def("oldest", [](Store self) { return self->oldest(); })
      .def("sequences", [](Store self) { return self->sequences(); })
      .def("__contains__",
           [](Store self, py::handle seq) { return self->contains(integer("seq", seq)); })
      .def("__len__", [](Store self) { return self->size(); });
}

}  // namespace icecache::bindings

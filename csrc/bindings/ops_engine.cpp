// A decode step of an Engine as one torch operator: the tensors are read here, not in Python, whose
// part would cost as much as the step.
#include <vector>

#include "bindings/ops_kernels.h"
#include "icecache/engine.h"

namespace icecache::ops {
namespace {

// What every view of a tensor needs; `form` is that of its dimensions.
DType checked(const char* name, const Tensor& tensor, std::int64_t dims, const char* form) {
  require(tensor.dim() == dims, name, " must be ", form, ", got ", shape_text(tensor));
  require(tensor.is_cpu(), name, " must be on the CPU");
  require(tensor.stride(dims - 1) == 1 || tensor.size(dims - 1) == 1, name,
          " must have unit stride in D");
  return dtype_of(name, tensor);
}

// Element `offset` of a tensor.
std::byte* element(const Tensor& tensor, DType dtype, std::int64_t offset) {
  return static_cast<std::byte*>(tensor.data_ptr()) +
         offset * static_cast<std::int64_t>(size_of(dtype));
}

// One [H, T, D] of each sequence of a tensor [B, H, T, D].
std::vector<TensorView> views(const char* name, const Tensor& tensor) {
  const DType dtype = checked(name, tensor, 4, "[B, H, T, D]");
  std::vector<TensorView> result(tensor.size(0));
  for (std::size_t b = 0; b < result.size(); ++b) {
    result[b] = {element(tensor, dtype, static_cast<std::int64_t>(b) * tensor.stride(0)),
                 dtype,
                 tensor.size(1),
                 tensor.size(2),
                 tensor.size(3),
                 tensor.stride(1),
                 tensor.stride(2)};
  }
  return result;
}

// Rows of a tensor [N, H, D] as one [H, T, D] a sequence.
std::vector<TensorView> packed_views(const char* name, const Tensor& tensor,
                                     const std::vector<std::int64_t>& firsts,
                                     const std::vector<std::int64_t>& counts) {
  const DType dtype = checked(name, tensor, 3, "[N, H, D]");
  std::vector<TensorView> result(firsts.size());
  for (std::size_t b = 0; b < result.size(); ++b) {
    require(firsts[b] >= 0 && counts[b] >= 0 && firsts[b] + counts[b] <= tensor.size(0), name,
            " must hold rows ", firsts[b], " to ", firsts[b] + counts[b], ", got ",
            shape_text(tensor));
    result[b] = {element(tensor, dtype, firsts[b] * tensor.stride(0)),
                 dtype,
                 tensor.size(1),
                 counts[b],
                 tensor.size(2),
                 tensor.stride(1),
                 tensor.stride(0)};
  }
  return result;
}

}  // namespace

Tensor step(std::int64_t engine, const std::vector<std::int64_t>& sequences, std::int64_t layer,
            const Tensor& keys, const Tensor& values, const Tensor& queries) {
  const std::vector<TensorView> query_views = views("queries", queries);
  Tensor out = torch::stable::new_empty(
      queries, {queries.size(0), queries.size(1), queries.size(2), queries.size(3)});
  reinterpret_cast<Engine*>(engine)->step(sequences, static_cast<int>(layer), views("keys", keys),
                                          views("values", values), query_views,
                                          views("outputs", out));
  return out;
}

void step_packed(std::int64_t engine, const std::vector<std::int64_t>& sequences,
                 std::int64_t layer, const Tensor& keys, const Tensor& values,
                 const Tensor& queries, Tensor outputs, const std::vector<std::int64_t>& firsts,
                 const std::vector<std::int64_t>& counts, const std::vector<std::int64_t>& phases) {
  require(firsts.size() == sequences.size() && counts.size() == firsts.size() &&
              phases.size() == firsts.size(),
          "sequences, firsts, counts and phases must be of one length, got ", sequences.size(),
          ", ", firsts.size(), ", ", counts.size(), " and ", phases.size());
  std::vector<Phase> treated(phases.size());
  for (std::size_t b = 0; b < phases.size(); ++b) {
    require(phases[b] >= 0 && phases[b] <= 2, "phases must be 0, 1 or 2, got ", phases[b]);
    treated[b] = static_cast<Phase>(phases[b]);
  }
  reinterpret_cast<Engine*>(engine)->step(
      sequences, static_cast<int>(layer), packed_views("keys", keys, firsts, counts),
      packed_views("values", values, firsts, counts),
      packed_views("queries", queries, firsts, counts),
      packed_views("outputs", outputs, firsts, counts), treated);
}

}  // namespace icecache::ops

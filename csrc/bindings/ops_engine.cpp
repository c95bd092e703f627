// A decode step of an Engine as one torch operator: the tensors are read here, not in Python, whose
// part would cost as much as the step.
#include <vector>

#include "bindings/ops_kernels.h"
#include "icecache/engine.h"

namespace icecache::ops {
namespace {

// One [H, T, D] of each sequence of a tensor [B, H, T, D].
std::vector<TensorView> views(const char* name, const Tensor& tensor) {
  require(tensor.dim() == 4, name, " must be [B, H, T, D], got ", shape_text(tensor));
  require(tensor.is_cpu(), name, " must be on the CPU");
  require(tensor.stride(3) == 1 || tensor.size(3) == 1, name, " must have unit stride in D");
  const DType dtype = dtype_of(name, tensor);
  std::vector<TensorView> result(tensor.size(0));
  for (std::size_t b = 0; b < result.size(); ++b) {
    result[b] = {static_cast<std::byte*>(tensor.data_ptr()) +
                     static_cast<std::int64_t>(b) * tensor.stride(0) *
                         static_cast<std::int64_t>(size_of(dtype)),
                 dtype,
                 tensor.size(1),
                 tensor.size(2),
                 tensor.size(3),
                 tensor.stride(1),
                 tensor.stride(2)};
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

}  // namespace icecache::ops

// The operators' CPU implementations and what they share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "icecache/error.h"
#include "icecache/types.h"

namespace icecache::ops {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> paged_attention(const Tensor& queries, const Tensor& pages,
                                           const Tensor& block_table, const Tensor& slot_masks,
                                           double scale);
std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b);

// Throws std::runtime_error, which torch hands to Python as RuntimeError.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error(message("icecache: ", parts...));
}

std::string shape_text(const Tensor& tensor);
// Contiguous, of this dtype and shape (-1: any), with all elements in its storage.
void require_tensor(const char* name, const Tensor& tensor, torch::headeronly::ScalarType dtype,
                    std::initializer_list<std::int64_t> shape);
// float32, bfloat16 or float16; throws for others, naming the tensor.
DType dtype_of(const char* name, const Tensor& tensor);

}  // namespace icecache::ops

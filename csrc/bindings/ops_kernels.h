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

// Engine::step of the engine at this address; tensors [B, H, T, D].
Tensor step(std::int64_t engine, const std::vector<std::int64_t>& sequences, std::int64_t layer,
            const Tensor& keys, const Tensor& values, const Tensor& queries);
// The same on tensors [N, H, D] that hold the tokens of all sequences: rows firsts[b] ..
// firsts[b] + counts[b] are those of sequence b. Other rows of `outputs` stay as they are.
// phases: one icecache::Phase each.
void step_packed(std::int64_t engine, const std::vector<std::int64_t>& sequences,
                 std::int64_t layer, const Tensor& keys, const Tensor& values,
                 const Tensor& queries, Tensor outputs, const std::vector<std::int64_t>& firsts,
                 const std::vector<std::int64_t>& counts, const std::vector<std::int64_t>& phases);

// Throws std::runtime_error, which torch hands to Python as RuntimeError.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error(message("icecache: ", parts...));
}

std::string shape_text(const Tensor& tensor);
// Contiguous, on the CPU, of this dtype, and of this shape (-1: any).
void require_tensor(const char* name, const Tensor& tensor, torch::headeronly::ScalarType dtype,
                    std::initializer_list<std::int64_t> shape);
// float32, bfloat16 or float16; throws for others, naming the tensor.
DType dtype_of(const char* name, const Tensor& tensor);

}  // namespace icecache::ops

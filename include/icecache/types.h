// The vocabulary of every other header: element types, identifiers, shapes.
//
// Dimension letters used in all comments of the project:
//   B batch (sequences), T new tokens of one call, L tokens of a sequence, P pages, S page size,
//   Hq query heads, Hkv KV heads, G = Hq / Hkv query heads that share one KV head (the GQA group),
//   D head dim, R sketch rank, N tokens in an index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace icecache {

// Element type of keys, values, queries and outputs as they are stored. All arithmetic is in fp32.
// kInt8 is of rows in pages alone (kv_dtype = "int8"), never of what a caller gives or gets.
enum class DType : std::uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  if (dtype == DType::kInt8) return 1;
  return dtype == DType::kFloat32 ? 4 : 2;
}
// Bytes of a row of D elements in a page. A row of kInt8 has one float32 scale behind its elements,
// which multiplies all of them.
constexpr std::size_t row_bytes_of(DType dtype, int head_dim) {
  const std::size_t scale = dtype == DType::kInt8 ? sizeof(float) : 0;
  return static_cast<std::size_t>(head_dim) * size_of(dtype) + scale;
}
const char* name_of(DType dtype);  // "float32", "bfloat16", "float16", "int8"

// A page of the PagePool. Ids are reused after release; `epoch` in PageHeader tells uses apart.
using PageId = std::uint32_t;
constexpr PageId kNoPage = 0xffffffffu;

// A sequence of an Engine. Never reused within one Engine.
using SeqId = std::int64_t;

// Far above any model, and low enough for one record of each (layer, KV head) to fit into memory.
constexpr int kMaxLayers = 1024;
constexpr int kMaxKvHeads = 1024;
constexpr int kMaxGroup = 128;       // largest G; a multiple of 4, as mass_stride() is
constexpr int kMaxHeadDim = 512;     // largest D; D is a multiple of 8
constexpr int kMaxSketchRank = 256;  // largest R; R is a multiple of 8
constexpr int kMaxPageSize = 32;     // S is 8, 16 or 32: the slots of a page fit a 32-bit mask

// What one model's attention layers look like. `scale` multiplies q.k before the softmax;
// 0 means 1 / sqrt(head_dim). A `logit_softcap` c makes c tanh(logit / c) of each logit; 0: none.
struct CacheShape {
  int num_layers = 0;
  int num_q_heads = 0;   // Hq
  int num_kv_heads = 0;  // Hkv, divides Hq
  int head_dim = 0;      // D
  DType dtype = DType::kFloat32;
  float scale = 0.0f;
  float logit_softcap = 0.0f;

  int group() const { return num_q_heads / num_kv_heads; }
  float softmax_scale() const;

  // Throws InvalidArgument naming the parameter, what is supported and what was given.
  void validate() const;
};

// A strided view of [heads, tokens, D] with unit stride in D; not owning. Strides in elements.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t heads = 0, tokens = 0, dim = 0;
  std::int64_t head_stride = 0, token_stride = 0;

  std::byte* at(std::int64_t head, std::int64_t token) const {
    return static_cast<std::byte*>(data) +
           (head * head_stride + token * token_stride) * static_cast<std::int64_t>(size_of(dtype));
  }
};

}  // namespace icecache

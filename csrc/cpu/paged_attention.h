// Attention of one GQA group over pages of the pool, in place.
//
// A page is [2][S] rows of D elements in `dtype`: S key rows, then S value rows. Queries are fp32
// and already multiplied by the softmax scale. Results are merged into an AttentionState whose
// `group` is the number of query rows. Kernels come from simd::kernels(). No threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "icecache/types.h"
#include "simd/attention_state.h"
#include "simd/row_format.h"

namespace icecache {

struct PageLayout {
  int head_dim = 0;   // D
  int page_size = 0;  // S
  DType dtype = DType::kFloat32;
  const RowFormat* format = nullptr;  // of rows with codes; null: numbers in `dtype`
};

// Tokens of one page that take part; bit s of `slots` stands for slot s. Other slots are not read.
struct PageSlots {
  const std::byte* page = nullptr;
  std::uint32_t slots = 0;
};

// T query tokens of a group. Of the tokens of all pages, in order, query t sees the first seen + t.
struct QueryBlock {
  static constexpr std::int64_t kAll = std::numeric_limits<std::int32_t>::max();

  const float* queries = nullptr;  // [T, G, D]
  int tokens = 1;                  // T
  int group = 0;                   // G
  std::int64_t seen = kAll;        // by the first query; may be negative
  float softcap = 0.0f;            // of the logits; 0: none
  const float* bias = nullptr;     // [T, G] of queries that are turned for rows with codes
};

// state.group == T * G.
void attend_pages(std::span<const PageSlots> pages, const QueryBlock& block,
                  const PageLayout& layout, const AttentionState& state);

}  // namespace icecache

// Attention of one GQA group over pages of the pool, in place.
//
// A page is [2][S][D] in `dtype`: S key rows, then S value rows. Queries are fp32 and already
// multiplied by the softmax scale. Results are merged into an AttentionState whose `group` is the
// number of query rows. Kernels come from simd::kernels(). No threads, no state, no allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "icecache/attention_state.h"
#include "icecache/types.h"

namespace icecache {

struct PageLayout {
  int head_dim = 0;   // D
  int page_size = 0;  // S
  DType dtype = DType::kFloat32;
};

// Tokens of one page that take part; bit s of `slots` stands for slot s. Other slots are not read.
struct PageSlots {
  const std::byte* page = nullptr;
  std::uint32_t slots = 0;
};

// Every row of queries [state.group, D] sees every slot.
void attend_pages(std::span<const PageSlots> pages, const float* queries, const PageLayout& layout,
                  const AttentionState& state);

// Consecutive tokens in order of position: token i is in slot (offset + i) % S of page
// (offset + i) / S and stands at position first_position + i.
struct CausalRun {
  std::span<const std::byte* const> pages;  // at least ceil((offset + count) / S)
  int offset = 0;                           // 0 <= offset < S
  std::int64_t first_position = 0;
  std::int64_t count = 0;
};

// T query tokens of a group: query t stands at position first_position + t.
struct QueryBlock {
  const float* queries = nullptr;  // [T, G, D]
  int tokens = 0;                  // T
  int group = 0;                   // G
  std::int64_t first_position = 0;
};

// Row (t, g) sees the run's tokens at positions up to its own. state.group == T * G.
void attend_causal_run(const CausalRun& run, const QueryBlock& block, const PageLayout& layout,
                       const AttentionState& state);

}  // namespace icecache

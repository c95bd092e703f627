// AttendWorkspace: memory that a thread works with while it attends for one head after another.
//
// Buffers keep what they have grown to: once they have, a step of decoding allocates nothing here.
//
// Threads: of one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/paged_attention.h"
#include "index/block_selector.h"
#include "index/log_sum.h"
#include "index/selector.h"
#include "pages/page_pool.h"

namespace icecache {

struct alignas(64) AttendWorkspace {    // no cache line is written by two threads
  std::vector<float> queries, outputs;  // of a task: [T, G, D]
  std::vector<float> lse;               // of a task: [T, G], or empty
  std::vector<std::byte> moving;        // keys and values on their way into a growing index
  // Tokens that are attended exactly: of one part after another, or of a whole step.
  std::vector<PagePick> picks;
  std::vector<PageSlots> pages;

  // A block of a prompt within prefill_budget.
  BlockSelector block_selector;
  std::vector<BlockSelector::Pick> block_picks;
  std::vector<float> near_rows;  // [T, G]
  // The C far-field nodes of one segment, without their picked tokens.
  std::vector<float> node_counts;         // [C] tokens, and later the logarithms of that
  std::vector<float> node_keys;           // [D, C] means
  std::vector<float> node_values;         // [C, D] means
  std::vector<float> node_spreads;        // [dims, C] half the variances of the keys' codes
  std::vector<float> squares;             // [T, G, dims] of the projected queries
  std::vector<float> node_logits;         // [T, G, C]
  std::vector<float> node_spread_logits;  // [T, G, C] what the spreads add to these

  // One step within the budget.
  std::vector<const Segment*> segments;
  std::optional<Segment> added[2];  // those of `segments` that are not a head's own
  std::int32_t tail_begin = 0;      // position
  Selector selector;
  Selection selection;
  std::vector<const void*> rows;    // keys, then values, then means
  std::vector<float> turned, bias;  // [G, D], [G]: the queries for rows with codes
  std::vector<float> logits, weights, far_weights;
  std::int64_t near = 0;  // tokens of sink and window
  // Of sink and window, of all that is attended exactly, of everything; the last two over
  // exp(shift).
  WeightSum near_sum[kMaxGroup];
  float near_lse[kMaxGroup], exact_lse[kMaxGroup], exact[kMaxGroup], total[kMaxGroup];
  float shift[kMaxGroup];
};

}  // namespace icecache

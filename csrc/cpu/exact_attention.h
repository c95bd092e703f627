// ExactAttention: attention of one GQA group over pages, of any numbers that the types hold.
//
// Float arithmetic where it has room for all products and sums, else double: the result is that of
// exact arithmetic to a float's rounding of logits and values, and to 2^-126. A query with NaN or
// Inf gives NaN, and changes no other.
//
// Threads: made, used and gone on one thread, whose subnormal floats are zeros meanwhile where none
// can matter.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "cpu/paged_attention.h"
#include "cpu/wide_attention.h"
#include "simd/flush_subnormals.h"

namespace icecache {

// Largest magnitudes of keys and values, or bounds of them; finite.
struct Magnitudes {
  float key = 0.0f, value = 0.0f;
};

// Whether attention takes more room than floats have. `query`: the largest element, scaled.
bool needs_double(float query, const Magnitudes& held, int head_dim);
// Whether an index can tell what tokens weigh: beyond, a float has not even the digits to tell one
// weight from another. False for an infinite query.
bool can_estimate(float query, const Magnitudes& held, int head_dim);

class ExactAttention {
 public:
  // Queries [T, G, D] (scaled) over nothing. `out` [T, G, D] is used from now on.
  ExactAttention(const QueryBlock& queries, int head_dim, const Magnitudes& held, float* out);

  // Of the tokens of the pages, in order, query t sees the first seen + t.
  void attend(std::span<const PageSlots> pages, const PageLayout& layout,
              std::int64_t seen = QueryBlock::kAll);
  // Adds values [n, D] with weights exp(logits), logits [T, G, n]: of whatever stands for tokens.
  // REQUIRES: floats have room, see can_estimate().
  void add(std::span<const float> logits, std::span<const float> values);
  // Logs of the total weights so far, [T, G]. REQUIRES: as above.
  void lse(float* out);
  // Fills `out`: normalised, zeros over no tokens. `lse` [T, G], unless null: log of the total
  // weight as a float has it, infinite where it has none; -inf over no tokens.
  void finish(float* lse = nullptr);

 private:
  // Of the rows without wide_.
  AttentionState state() {
    return {out_, max_.data(), sum_.data(), static_cast<int>(max_.size()), head_dim_};
  }
  void set_aside_bad_rows();
  // The queries as they are compared with rows of a format that has codes.
  const QueryBlock& turned_for(const RowFormat& format);

  QueryBlock block_, turned_;
  int head_dim_;
  float* out_;
  std::optional<RowFormat> format_;    // that turned_ is for
  std::vector<float> queries_, bias_;  // of turned_
  std::vector<float> finite_;          // queries with zeros in place of bad rows, if there are any
  std::vector<int> bad_;               // rows with NaN or Inf
  std::optional<WideAttention> wide_;
  std::optional<simd::FlushSubnormals> flush_;
  std::vector<float> max_, sum_;        // [T, G] without wide_
  std::vector<float> weights_, added_;  // scratch of add()
};

}  // namespace icecache

// Attention over pages in double precision, for numbers whose products or sums are no floats.
//
// As attend_pages() of cpu/paged_attention.h, some ten times slower: logits and sums have room for
// any finite queries, keys and values of the cache's types. No threads.
#pragma once

#include <span>
#include <vector>

#include "cpu/paged_attention.h"

namespace icecache {

class WideAttention {
 public:
  // Of `rows` queries over nothing.
  WideAttention(int rows, int head_dim);

  // Merges the tokens of the pages. block.tokens * block.group == rows; its queries are not turned.
  void attend(std::span<const PageSlots> pages, const QueryBlock& block, const PageLayout& layout);
  // out [rows, D]: normalised; zeros over no tokens.
  void finish(float* out) const;
  // Log of the total weight of a row; -inf over no tokens.
  double lse(int row) const;

 private:
  void add(int row, double logit, const double* value);

  int head_dim_;
  std::vector<double> max_, sum_;  // [rows]
  std::vector<double> out_;        // [rows, D], sums of exp(logit - max) value
};

}  // namespace icecache

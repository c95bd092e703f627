// AttentionState: attention over a set of tokens that can still be joined with other sets.
//
// For one query and a set of keys k_i and values v_i with logits s_i:
//   max = max s_i,  sum = sum exp(s_i - max),  out = sum exp(s_i - max) v_i   (not yet divided)
// merge() is associative and commutative up to rounding, with the empty state (-inf, 0, 0) as its
// neutral element. Sink, window, picked pages, far field and prefill chunks are all such states
// (the form FlashInfer made common; Milakov & Gimelshein 2018 for the online softmax).
#pragma once

#include <cmath>
#include <limits>

namespace icecache {

// View of G states of one GQA group, fp32; not owning.
struct AttentionState {
  float* out = nullptr;  // [G, D]
  float* max = nullptr;  // [G]
  float* sum = nullptr;  // [G]
  int group = 0;
  int head_dim = 0;

  void clear() const {
    for (int g = 0; g < group; ++g) {
      max[g] = -std::numeric_limits<float>::infinity();
      sum[g] = 0.0f;
    }
    for (int i = 0; i < group * head_dim; ++i) out[i] = 0.0f;
  }
  // log of the total attention weight of query g; -inf when empty.
  float lse(int g) const { return sum[g] > 0.0f ? max[g] + std::log(sum[g]) : max[g]; }
};

// into = merge(into, other).
void merge(const AttentionState& into, const AttentionState& other);
// out[G, D] = state.out / state.sum; zeros for an empty state.
void finish(const AttentionState& state, float* out);

}  // namespace icecache

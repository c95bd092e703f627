// The naive reference: attention of one GQA group in double, formula by formula, without blocking,
// online softmax or tables. Kept for ever; every fast kernel is tested against it.
//
// Inputs are fp32 (what a stored element means), rows contiguous, queries already multiplied by the
// softmax scale. No threads, no state.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace icecache::reference {

// N tokens that one KV head holds.
struct Tokens {
  const float* keys = nullptr;    // [N, D]
  const float* values = nullptr;  // [N, D]
  std::int64_t count = 0;         // N
  int head_dim = 0;               // D
};

// Attention of `rows` queries over a set of tokens, already divided by the sum of weights.
struct Attention {
  std::vector<double> out;  // [rows, D]; zeros over no tokens
  std::vector<double> lse;  // [rows] log of the total weight; -inf over no tokens
};

// Queries [rows, D] over the tokens with subset[i] true (all tokens where `subset` is empty).
Attention attend(const float* queries, std::int64_t rows, const Tokens& tokens,
                 const std::vector<bool>& subset = {});

// Causal attention of queries [T, G, D]: query t stands at position first_position + t and sees the
// tokens at positions up to its own; token i stands at position i. Rows of the result: [T, G].
Attention attend_causal(const float* queries, std::int64_t tokens_of_queries, int group,
                        std::int64_t first_position, const Tokens& tokens,
                        const std::vector<bool>& subset = {});

// Attention over the union of two disjoint sets of tokens.
Attention merge(const Attention& a, const Attention& b);

// Far field: a node stands for its members that were not picked. It weighs the sum of their
// weights, which are given (exact ones would be the logits q.k_i), and its value is the plain mean
// of their values.
struct FarField {
  std::span<const std::int32_t> node;  // [N] node of each token, -1: in none
  std::vector<bool> picked;            // [N], or empty: none
  std::span<const double> log_weight;  // [rows, N], -inf: weighs nothing
};
// Attention over the nodes, and the log weight of each: node_lse [rows, C] (-inf: empty).
struct FarAttention {
  Attention attention;
  std::vector<double> node_lse;
};
FarAttention attend_far(std::int64_t rows, const Tokens& tokens, const FarField& far);

}  // namespace icecache::reference

#include "reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace icecache::reference {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

double dot(const float* a, const float* b, int dim) {
  double sum = 0.0;
  for (int d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

// One row: softmax over `logits` (-inf: left out) of values(i, d).
template <typename Value>
void attend_row(const std::vector<double>& logits, int dim, const Value& value, Attention& into) {
  double max = kMinusInfinity;
  for (const double x : logits) max = std::max(max, x);
  std::vector<double> out(static_cast<std::size_t>(dim), 0.0);
  double sum = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] == kMinusInfinity) continue;
    const double weight = std::exp(logits[i] - max);
    sum += weight;
    for (int d = 0; d < dim; ++d) out[d] += weight * value(i, d);
  }
  for (double& x : out) x = sum == 0.0 ? 0.0 : x / sum;
  into.out.insert(into.out.end(), out.begin(), out.end());
  into.lse.push_back(sum == 0.0 ? kMinusInfinity : max + std::log(sum));
}

// Tokens below `end` that are in the subset.
void attend_tokens(const float* query, const Tokens& tokens, std::int64_t end,
                   const std::vector<bool>& subset, Attention& into) {
  std::vector<double> logits(static_cast<std::size_t>(tokens.count), kMinusInfinity);
  for (std::int64_t i = 0; i < std::min(end, tokens.count); ++i) {
    if (!subset.empty() && !subset[i]) continue;
    logits[i] = dot(query, tokens.keys + i * tokens.head_dim, tokens.head_dim);
  }
  attend_row(
      logits, tokens.head_dim,
      [&](std::size_t i, int d) -> double {
        return tokens.values[static_cast<std::int64_t>(i) * tokens.head_dim + d];
      },
      into);
}

}  // namespace

Attention attend(const float* queries, std::int64_t rows, const Tokens& tokens,
                 const std::vector<bool>& subset) {
  Attention result;
  for (std::int64_t r = 0; r < rows; ++r) {
    attend_tokens(queries + r * tokens.head_dim, tokens, tokens.count, subset, result);
  }
  return result;
}

Attention attend_causal(const float* queries, std::int64_t tokens_of_queries, int group,
                        std::int64_t first_position, const Tokens& tokens,
                        const std::vector<bool>& subset) {
  Attention result;
  for (std::int64_t row = 0; row < tokens_of_queries * group; ++row) {
    const std::int64_t position = first_position + row / group;
    attend_tokens(queries + row * tokens.head_dim, tokens, position + 1, subset, result);
  }
  return result;
}

Attention merge(const Attention& a, const Attention& b) {
  Attention result = a;
  const std::size_t dim = a.lse.empty() ? 0 : a.out.size() / a.lse.size();
  for (std::size_t r = 0; r < a.lse.size(); ++r) {
    const double max = std::max(a.lse[r], b.lse[r]);
    if (max == kMinusInfinity) continue;
    const double wa = std::exp(a.lse[r] - max), wb = std::exp(b.lse[r] - max);
    for (std::size_t i = r * dim; i < (r + 1) * dim; ++i) {
      result.out[i] = (wa * a.out[i] + wb * b.out[i]) / (wa + wb);
    }
    result.lse[r] = max + std::log(wa + wb);
  }
  return result;
}

FarAttention attend_far(std::int64_t rows, const Tokens& tokens, const FarField& far) {
  const int dim = tokens.head_dim;
  std::int32_t nodes = 0;
  for (const std::int32_t node : far.node) nodes = std::max(nodes, node + 1);
  std::vector<std::vector<std::int64_t>> rest(static_cast<std::size_t>(nodes));
  for (std::int64_t i = 0; i < tokens.count; ++i) {
    if (far.node[i] >= 0 && (far.picked.empty() || !far.picked[i])) rest[far.node[i]].push_back(i);
  }
  const auto mean = [&](std::size_t c, int d) {
    double sum = 0.0;
    for (const std::int64_t i : rest[c]) sum += tokens.values[i * dim + d];
    return sum / static_cast<double>(rest[c].size());
  };
  FarAttention result;
  for (std::int64_t r = 0; r < rows; ++r) {
    const double* log_weight = far.log_weight.data() + r * tokens.count;
    std::vector<double> node_lse;
    for (const std::vector<std::int64_t>& members : rest) {
      double max = kMinusInfinity, sum = 0.0;
      for (const std::int64_t i : members) max = std::max(max, log_weight[i]);
      for (const std::int64_t i : members) {
        if (log_weight[i] != kMinusInfinity) sum += std::exp(log_weight[i] - max);
      }
      node_lse.push_back(sum == 0.0 ? kMinusInfinity : max + std::log(sum));
    }
    attend_row(node_lse, dim, mean, result.attention);
    result.node_lse.insert(result.node_lse.end(), node_lse.begin(), node_lse.end());
  }
  return result;
}

}  // namespace icecache::reference

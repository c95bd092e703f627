// What an Engine must answer, computed from nothing but the tokens that were appended and, for
// sparse steps, from what the engine says it looked at (StepTrace): exact attention over sink,
// window and selected tokens, and far-field nodes that stand for the rest. A node's value is made
// of its tokens; what it weighs is an estimate of the engine, taken from the trace and returned
// beside what its tokens really weigh. In double, without any of the engine's code.
#pragma once

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "icecache/engine.h"

namespace icecache::testing {

// One layer and KV head: rows of D.
struct OracleHead {
  std::vector<std::vector<float>> keys, values;
};

// What the engine says of a weight, and what it is; logs, -inf: no weight.
struct FarWeight {
  double said = -INFINITY, exact = -INFINITY;
};

struct OracleResult {
  std::vector<double> out;
  double near_lse = -INFINITY;   // of what is attended exactly: sink, window and selected, or all
  std::vector<FarWeight> nodes;  // [C], empty without a far field
  FarWeight rest;                // over all nodes
};

inline double log_sum(const std::vector<double>& x) {
  double max = -INFINITY, sum = 0.0;
  for (const double v : x) max = std::max(max, v);
  for (const double v : x) sum += v == -INFINITY ? 0.0 : std::exp(v - max);
  return sum == 0.0 ? -INFINITY : max + std::log(sum);
}

// c tanh(logit / c); c of 0: the logit.
inline double soft_cap(double logit, double softcap) {
  return softcap > 0.0 ? softcap * std::tanh(logit / softcap) : logit;
}

// Full causal attention of one query (scaled) over the first `length` tokens.
inline OracleResult full_attention(const OracleHead& head, const std::vector<double>& query,
                                   std::size_t length, double softcap = 0.0) {
  const std::size_t d = query.size();
  std::vector<double> logits(length);
  double max = -INFINITY;
  for (std::size_t i = 0; i < length; ++i) {
    for (std::size_t x = 0; x < d; ++x) logits[i] += query[x] * head.keys[i][x];
    logits[i] = soft_cap(logits[i], softcap);
    max = std::max(max, logits[i]);
  }
  OracleResult result;
  result.out.assign(d, 0.0);
  double sum = 0.0;
  for (std::size_t i = 0; i < length; ++i) {
    const double w = std::exp(logits[i] - max);
    sum += w;
    for (std::size_t x = 0; x < d; ++x) result.out[x] += w * head.values[i][x];
  }
  for (double& x : result.out) x /= sum;
  result.near_lse = max + std::log(sum);
  return result;
}

// The sparse answer of head g of the group for the selection in `trace`.
inline OracleResult sparse_attention(const OracleHead& head, const std::vector<double>& query,
                                     const StepTrace& trace, int g, double softcap = 0.0) {
  const std::size_t d = query.size();
  std::set<std::int32_t> exact(trace.sink.begin(), trace.sink.end());
  exact.insert(trace.window.begin(), trace.window.end());
  exact.insert(trace.selected.begin(), trace.selected.end());
  const auto logit = [&](std::int32_t i) {
    double sum = 0.0;
    for (std::size_t x = 0; x < d; ++x) sum += query[x] * head.keys[i][x];
    return soft_cap(sum, softcap);
  };
  OracleResult result;
  std::vector<double> logits;
  std::vector<std::vector<double>> values;
  for (const std::int32_t i : exact) {
    logits.push_back(logit(i));
    values.emplace_back(head.values[i].begin(), head.values[i].end());
  }
  result.near_lse = log_sum(logits);
  std::vector<std::vector<std::int32_t>> members(trace.far_nodes.size());
  if (!members.empty()) {
    for (const PageInfo& page : trace.pages) {
      for (const std::int32_t i : page.positions) {
        if (!exact.contains(i)) members[page.node].push_back(i);
      }
    }
  }
  std::vector<double> said, real;
  for (std::size_t c = 0; c < members.size(); ++c) {
    std::vector<double> of_members;
    for (const std::int32_t i : members[c]) of_members.push_back(logit(i));
    result.nodes.push_back({trace.far_nodes[c].weight[g], log_sum(of_members)});
    real.push_back(result.nodes.back().exact);
    said.push_back(result.nodes.back().said);
    if (members[c].empty()) continue;
    std::vector<double> mean(d, 0.0);
    for (const std::int32_t i : members[c]) {
      for (std::size_t x = 0; x < d; ++x) {
        mean[x] += head.values[i][x] / static_cast<double>(members[c].size());
      }
    }
    logits.push_back(said.back());
    values.push_back(std::move(mean));
  }
  result.rest = {log_sum(said), log_sum(real)};
  const double total = log_sum(logits);
  result.out.assign(d, 0.0);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double w = std::exp(logits[i] - total);
    for (std::size_t x = 0; x < d; ++x) result.out[x] += w * values[i][x];
  }
  return result;
}

}  // namespace icecache::testing

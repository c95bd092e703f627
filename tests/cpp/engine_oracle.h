// What an Engine must answer, computed from nothing but the tokens that were appended and, for
// sparse steps, from what the engine says it looked at (StepTrace): exact attention over sink,
// window and selected tokens, and the far-field formula over the rest. In double, without any of
// its code.
#pragma once

#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "icecache/engine.h"

namespace icecache::testing {

// One layer and KV head: rows of D.
struct OracleHead {
  std::vector<std::vector<float>> keys, values;
};

struct OracleResult {
  std::vector<double> out;
  double rest_share = 0.0;  // weight of the far field in the answer
};

// Full causal attention of one query (scaled) over the first `length` tokens.
inline OracleResult full_attention(const OracleHead& head, const std::vector<double>& query,
                                   std::size_t length) {
  const std::size_t d = query.size();
  std::vector<double> logits(length);
  double max = -INFINITY;
  for (std::size_t i = 0; i < length; ++i) {
    for (std::size_t x = 0; x < d; ++x) logits[i] += query[x] * head.keys[i][x];
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
  return result;
}

// The sparse answer for the selection in `trace`.
inline OracleResult sparse_attention(const OracleHead& head, const std::vector<double>& query,
                                     const StepTrace& trace) {
  const std::size_t d = query.size();
  std::set<std::int32_t> exact(trace.sink.begin(), trace.sink.end());
  exact.insert(trace.window.begin(), trace.window.end());
  exact.insert(trace.selected.begin(), trace.selected.end());
  std::vector<double> logits;
  std::vector<std::vector<double>> values;
  const auto dot = [&](const std::vector<double>& q, const std::vector<float>& k) {
    double sum = 0.0;
    for (std::size_t x = 0; x < d; ++x) sum += q[x] * k[x];
    return sum;
  };
  for (const std::int32_t i : exact) {
    logits.push_back(dot(query, head.keys[i]));
    values.emplace_back(head.values[i].begin(), head.values[i].end());
  }
  const std::size_t near = logits.size();
  if (!trace.far_center.empty()) {
    const std::vector<double> mu(trace.far_center.begin(), trace.far_center.end());
    std::map<int, std::vector<std::int32_t>> nodes;
    for (const PageInfo& page : trace.pages) {
      for (const std::int32_t i : page.positions) {
        if (!exact.contains(i)) nodes[page.node].push_back(i);
      }
    }
    for (const auto& [node, members] : nodes) {
      double max = -INFINITY;
      for (const std::int32_t i : members) max = std::max(max, dot(mu, head.keys[i]));
      double weight = 0.0;
      std::vector<double> key(d, 0.0), square(d, 0.0), value(d, 0.0);
      for (const std::int32_t i : members) {
        const double w = std::exp(dot(mu, head.keys[i]) - max);
        weight += w;
        for (std::size_t x = 0; x < d; ++x) {
          key[x] += w * head.keys[i][x];
          square[x] += w * head.keys[i][x] * head.keys[i][x];
          value[x] += w * head.values[i][x];
        }
      }
      double linear = 0.0, quadratic = 0.0;
      for (std::size_t x = 0; x < d; ++x) {
        const double mean = key[x] / weight, q = query[x] - mu[x];
        linear += q * mean;
        quadratic += q * q * std::max(0.0, square[x] / weight - mean * mean);
        value[x] /= weight;
      }
      logits.push_back(max + std::log(weight) + linear + std::min(1.0, 0.5 * quadratic));
      values.push_back(value);
    }
  }
  double max = -INFINITY;
  for (const double x : logits) max = std::max(max, x);
  OracleResult result;
  result.out.assign(d, 0.0);
  double sum = 0.0, rest = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double w = std::exp(logits[i] - max);
    sum += w;
    if (i >= near) rest += w;
    for (std::size_t x = 0; x < d; ++x) result.out[x] += w * values[i][x];
  }
  for (double& x : result.out) x /= sum;
  result.rest_share = rest / sum;
  return result;
}

}  // namespace icecache::testing

#include "index/far_field.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();
// Below this share of a node's weight the unpicked rest is summed from its members.
constexpr double kRest = 1e-3;

}  // namespace

// Weighted sums of a set of tokens, in double, relative to a running maximum of mu.k.
struct FarField::Sums {
  explicit Sums(int d) : key(d, 0.0), square(d, 0.0), value(d, 0.0) {}
  double max = -std::numeric_limits<double>::infinity();
  double weight = 0.0;
  std::vector<double> key, square, value;
  std::int32_t count = 0;

  void add(double logit, const float* k, const float* v) {
    const int d = static_cast<int>(key.size());
    if (logit > max) {
      const double shrink = std::exp(max - logit);
      weight *= shrink;
      for (int i = 0; i < d; ++i) {
        key[i] *= shrink;
        square[i] *= shrink;
        value[i] *= shrink;
      }
      max = logit;
    }
    const double w = std::exp(logit - max);
    weight += w;
    for (int i = 0; i < d; ++i) {
      key[i] += w * k[i];
      square[i] += w * k[i] * k[i];
      value[i] += w * v[i];
    }
    ++count;
  }
};

void FarField::reset(std::span<const float> mu) {
  mu_.assign(mu.begin(), mu.end());
  log_weight_.clear();
  mean_.clear();
  variance_.clear();
  value_.clear();
  counts_.clear();
}

int FarField::add_node() {
  log_weight_.push_back(kEmpty);
  mean_.resize(mean_.size() + head_dim_, 0.0f);
  variance_.resize(variance_.size() + head_dim_, 0.0f);
  value_.resize(value_.size() + head_dim_, 0.0f);
  counts_.push_back(0);
  return node_count() - 1;
}

void FarField::accumulate(Sums& sums, const PageTable& table, int page, std::uint32_t slots) const {
  float key[kMaxHeadDim], value[kMaxHeadDim];
  slots &= table.page(page).mask;
  for (std::uint32_t rest = slots; rest != 0; rest &= rest - 1) {
    const int slot = std::countr_zero(rest);
    table.key(page, slot, key);
    table.value(page, slot, value);
    sums.add(simd::kernels().dot(mu_.data(), key, head_dim_), key, value);
  }
}

void FarField::store(int node, const Sums& sums) {
  float* mean = mean_.data() + static_cast<std::size_t>(node) * head_dim_;
  float* variance = variance_.data() + static_cast<std::size_t>(node) * head_dim_;
  float* value = value_.data() + static_cast<std::size_t>(node) * head_dim_;
  counts_[node] = sums.count;
  log_weight_[node] =
      sums.count > 0 ? static_cast<float>(sums.max + std::log(sums.weight)) : kEmpty;
  for (int i = 0; i < head_dim_; ++i) {
    const double m = sums.count > 0 ? sums.key[i] / sums.weight : 0.0;
    mean[i] = static_cast<float>(m);
    variance[i] = sums.count > 0
                      ? static_cast<float>(std::max(0.0, sums.square[i] / sums.weight - m * m))
                      : 0.0f;
    value[i] = sums.count > 0 ? static_cast<float>(sums.value[i] / sums.weight) : 0.0f;
  }
}

void FarField::assign(int node, const PageTable& table, std::span<const int> pages) {
  Sums sums(head_dim_);
  for (int page : pages) accumulate(sums, table, page, ~0u);
  store(node, sums);
}

void FarField::add(int node, const float* key, const float* value) {
  float* mean = mean_.data() + static_cast<std::size_t>(node) * head_dim_;
  float* variance = variance_.data() + static_cast<std::size_t>(node) * head_dim_;
  float* center = value_.data() + static_cast<std::size_t>(node) * head_dim_;
  const double logit = simd::kernels().dot(mu_.data(), key, head_dim_);
  const double before = log_weight_[node];
  const double high = std::max(before, logit);
  const double total = high + std::log(std::exp(before - high) + std::exp(logit - high));
  const float share = static_cast<float>(std::exp(logit - total));
  for (int i = 0; i < head_dim_; ++i) {
    const float delta = key[i] - mean[i];
    mean[i] += share * delta;
    variance[i] = (1.0f - share) * (variance[i] + share * delta * delta);
    center[i] += share * (value[i] - center[i]);
  }
  log_weight_[node] = static_cast<float>(total);
  ++counts_[node];
}

// What is left of a node, as FarField stores nodes but in double.
struct FarField::Rest {
  double log_weight = 0.0;
  double mean[kMaxHeadDim], variance[kMaxHeadDim];
  float value[kMaxHeadDim];
  std::int64_t bytes = 0;
};

bool FarField::open(int node, const Query& query, std::span<const PagePick> picks,
                    Rest& rest) const {
  const int d = head_dim_;
  const float* mean = mean_.data() + static_cast<std::size_t>(node) * d;
  const float* variance = variance_.data() + static_cast<std::size_t>(node) * d;
  const float* center = value_.data() + static_cast<std::size_t>(node) * d;
  float key[kMaxHeadDim], value[kMaxHeadDim];
  double first[kMaxHeadDim] = {}, second[kMaxHeadDim] = {}, values[kMaxHeadDim] = {};
  double picked = 0.0;
  int tokens = 0;
  for (const PagePick& pick : picks) {
    for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1) {
      const int slot = std::countr_zero(slots);
      query.table->key(pick.local_page, slot, key);
      query.table->value(pick.local_page, slot, value);
      const double share = std::exp(static_cast<double>(simd::kernels().dot(mu_.data(), key, d)) -
                                    log_weight_[node]);
      picked += share;
      for (int i = 0; i < d; ++i) {
        const double delta = static_cast<double>(key[i]) - mean[i];
        first[i] += share * delta;
        second[i] += share * delta * delta;
        values[i] += share * (static_cast<double>(value[i]) - center[i]);
      }
      ++tokens;
    }
  }
  if (tokens >= counts_[node]) return false;
  const double left = 1.0 - picked;
  if (left > kRest) {
    rest.log_weight = log_weight_[node] + std::log(left);
    for (int i = 0; i < d; ++i) {
      const double shift = -first[i] / left;
      rest.mean[i] = mean[i] + shift;
      rest.variance[i] = std::max(0.0, (variance[i] - second[i]) / left - shift * shift);
      rest.value[i] = static_cast<float>(center[i] - values[i] / left);
    }
    return true;
  }
  Sums sums(d);
  for (int page : query.pages_of_node[node]) {
    std::uint32_t slots = ~0u;
    for (const PagePick& pick : picks) {
      if (pick.local_page == page) slots = ~pick.slots;
    }
    accumulate(sums, *query.table, page, slots);
    rest.bytes +=
        2 * query.table->page_size() * d * static_cast<std::int64_t>(size_of(query.table->dtype()));
  }
  rest.log_weight = sums.max + std::log(sums.weight);
  for (int i = 0; i < d; ++i) {
    rest.mean[i] = sums.key[i] / sums.weight;
    rest.variance[i] = std::max(0.0, sums.square[i] / sums.weight - rest.mean[i] * rest.mean[i]);
    rest.value[i] = static_cast<float>(sums.value[i] / sums.weight);
  }
  return true;
}

float FarField::logit(const Rest& rest, const float* dq) const {
  double linear = 0.0, quadratic = 0.0;
  for (int i = 0; i < head_dim_; ++i) {
    linear += dq[i] * rest.mean[i];
    quadratic += static_cast<double>(dq[i]) * dq[i] * rest.variance[i];
  }
  return static_cast<float>(rest.log_weight + linear + std::min(1.0, 0.5 * quadratic));
}

std::int64_t FarField::merge_into(const Query& query, const AttentionState& state,
                                  std::vector<FarNodeInfo>* nodes) const {
  const int d = head_dim_, group = query.group;
  const std::size_t count = counts_.size();
  if (count == 0) return 0;
  const simd::Kernels& kernels = simd::kernels();
  thread_local std::vector<float> dq, logits, opened_logits, opened_values;
  thread_local std::vector<PagePick> picks;
  dq.resize(static_cast<std::size_t>(group) * d);
  for (int g = 0; g < group; ++g) {
    for (int i = 0; i < d; ++i) dq[g * d + i] = query.queries[g * d + i] - mu_[i];
  }
  logits.resize(count * group);
  kernels.far_scan({log_weight_.data(), mean_.data(), variance_.data(), dq.data(), logits.data(),
                    static_cast<std::int64_t>(count), group, d});
  std::int64_t bytes = static_cast<std::int64_t>(count) * (3 * d + 1) * sizeof(float);

  // Nodes with picked tokens leave the scan; what is left of each is merged on its own.
  const auto node_of = [&](const PagePick& pick) { return query.node_of_page[pick.local_page]; };
  picks.assign(query.picks.begin(), query.picks.end());
  std::sort(picks.begin(), picks.end(), [&](const PagePick& a, const PagePick& b) {
    return node_of(a) != node_of(b) ? node_of(a) < node_of(b) : a.local_page < b.local_page;
  });
  opened_logits.resize(picks.size() * group);
  opened_values.resize(picks.size() * d);
  const std::size_t stride = picks.size();
  std::size_t opened = 0;
  if (nodes != nullptr) nodes->assign(count, {});
  for (std::size_t begin = 0, end = 0; begin < picks.size(); begin = end) {
    const int node = node_of(picks[begin]);
    while (end < picks.size() && node_of(picks[end]) == node) ++end;
    for (int g = 0; g < group; ++g) logits[g * count + node] = kEmpty;
    Rest rest;
    if (!open(node, query, std::span(picks).subspan(begin, end - begin), rest)) continue;
    bytes += rest.bytes;
    for (int g = 0; g < group; ++g) {
      opened_logits[g * stride + opened] = logit(rest, dq.data() + g * d);
      if (nodes != nullptr) (*nodes)[node].weight.push_back(opened_logits[g * stride + opened]);
    }
    std::copy_n(rest.value, d, opened_values.data() + opened * d);
    ++opened;
  }
  if (nodes != nullptr) {
    for (std::size_t c = 0; c < count; ++c) {
      (*nodes)[c].tokens = counts_[c];
      if (!(*nodes)[c].weight.empty()) continue;
      for (int g = 0; g < group; ++g) (*nodes)[c].weight.push_back(logits[g * count + c]);
    }
  }
  kernels.attend_logits(logits.data(), value_.data(), static_cast<std::int64_t>(count), state);
  if (opened > 0) {
    for (int g = 1; g < group; ++g) {
      std::copy_n(opened_logits.data() + g * stride, opened, opened_logits.data() + g * opened);
    }
    kernels.attend_logits(opened_logits.data(), opened_values.data(),
                          static_cast<std::int64_t>(opened), state);
  }
  return bytes;
}

std::size_t FarField::memory_bytes() const {
  return (log_weight_.capacity() + mean_.capacity() + variance_.capacity() + value_.capacity() +
          mu_.capacity()) *
             sizeof(float) +
         counts_.capacity() * sizeof(std::int32_t);
}

void FarField::check_node(int node, const PageTable& table, std::span<const int> pages) const {
  FarField fresh(head_dim_);
  fresh.reset(mu_);
  fresh.add_node();
  fresh.assign(0, table, pages);
  if (fresh.counts_[0] != counts_[node])
    throw IntegrityError(
        message("node ", node, " counts ", counts_[node], " tokens, has ", fresh.counts_[0]));
  if (counts_[node] == 0) return;
  const auto differ = [](float a, float b, float scale) {
    return !(std::abs(a - b) <= 1e-3f * (scale + std::abs(a) + std::abs(b)));
  };
  if (differ(log_weight_[node], fresh.log_weight_[0], 1.0f))
    throw IntegrityError(message("node ", node, " has log weight ", log_weight_[node],
                                 ", its members sum to ", fresh.log_weight_[0]));
  float scale = 0.0f;
  for (int i = 0; i < head_dim_; ++i) {
    scale = std::max({scale, std::abs(fresh.mean_[i]), std::abs(fresh.value_[i]),
                      std::sqrt(fresh.variance_[i])});
  }
  for (int i = 0; i < head_dim_; ++i) {
    const std::size_t at = static_cast<std::size_t>(node) * head_dim_ + i;
    if (differ(mean_[at], fresh.mean_[i], scale) || differ(value_[at], fresh.value_[i], scale) ||
        differ(std::sqrt(variance_[at]), std::sqrt(fresh.variance_[i]), 10 * scale))
      throw IntegrityError(message("node ", node, " differs from its members in dimension ", i));
  }
}

}  // namespace icecache

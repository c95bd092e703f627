#include "compared/dci_tree.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "icecache/error.h"
#include "icecache/types.h"
#include "index/log_sum.h"
#include "index/magnitude.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Keys compared with a level by one matrix product.
constexpr std::int32_t kRowBlock = 256;

double squared_norm(const float* x, int d) {
  double sum = 0.0;
  for (int i = 0; i < d; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

// The largest product; of equal ones that which holds least.
int best_of(const float* product, const std::vector<std::int32_t>& held) {
  int best = 0;
  for (int j = 1; j < static_cast<int>(held.size()); ++j) {
    if (product[j] > product[best] || (product[j] == product[best] && held[j] < held[best])) {
      best = j;
    }
  }
  return best;
}

}  // namespace

DciTree::DciTree(int head_dim, std::int64_t every, std::int64_t upper_every)
    : head_dim_(head_dim), every_(every), upper_every_(upper_every) {}

std::int64_t DciTree::every(double share) {
  constexpr double kMost = 1 << 30;
  return std::llround(std::clamp(1.0 / share, 2.0, kMost));
}

std::int64_t DciTree::tokens() const {
  if (empty()) return 0;
  const std::vector<std::int32_t>& top = levels_.back().tokens;
  return std::accumulate(top.begin(), top.end(), std::int64_t{0});
}

// Keys are compared divided by sqrt(M), where lifted keys have length 1: no norm overflows.
double DciTree::lift(double square) const {
  return max_square_ > 0.0 ? std::sqrt(std::max(0.0, 1.0 - square / max_square_)) : 0.0;
}

int DciTree::add_node(int level, const float* key, double square, std::int64_t ordinal) {
  Level& l = levels_[level];
  int node = l.size();
  if (l.freed == 0) {
    l.keys.resize(l.keys.size() + head_dim_);
    l.squares.push_back(0.0);
    l.ordinals.push_back(0);
    l.parents.push_back(-1);
    l.children.emplace_back();
    l.tokens.push_back(0);
  } else {
    node = static_cast<int>(std::find(l.tokens.begin(), l.tokens.end(), 0) - l.tokens.begin());
    --l.freed;
  }
  std::copy_n(key, head_dim_, l.keys.begin() + static_cast<std::ptrdiff_t>(node) * head_dim_);
  l.squares[node] = square;
  l.ordinals[node] = ordinal;
  return node;
}

void DciTree::set_parent(int level, int node, int parent) {
  levels_[level].parents[node] = parent;
  levels_[level + 1].children[parent].push_back(node);
}

// In two steps where the factor itself is no ordinary float.
void DciTree::normalise(const float* keys, std::int64_t n, float* out) const {
  const double length = std::sqrt(max_square_);
  const int exponent = far_exponent(length, 100);
  const double rest = std::ldexp(length, -exponent);
  const float scale = rest > 0.0 ? static_cast<float>(1.0 / rest) : 0.0f;
  for (std::int64_t i = 0; i < n; ++i) out[i] = keys[i] * scale;
  if (exponent != 0) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = std::ldexp(keys[i], -exponent) * scale;
  }
}

std::vector<int> DciTree::nearest(const Level& level, const float* keys, const double* squares,
                                  const std::int32_t* tokens, std::int32_t n) const {
  const int d = head_dim_, m = level.size();
  std::vector<float> columns(static_cast<std::size_t>(d + 1) * m);
  std::vector<float> rows(static_cast<std::size_t>(kRowBlock) * (d + 1));
  std::vector<std::int32_t> held(m, 0);
  for (int j = 0; j < m; ++j) {
    normalise(level.keys.data() + static_cast<std::size_t>(j) * d, d, rows.data());
    for (int i = 0; i < d; ++i) columns[static_cast<std::size_t>(i) * m + j] = rows[i];
    columns[static_cast<std::size_t>(d) * m + j] = static_cast<float>(lift(level.squares[j]));
  }
  std::vector<float> products(static_cast<std::size_t>(kRowBlock) * m);
  std::vector<int> result(n);
  for (std::int32_t begin = 0; begin < n; begin += kRowBlock) {
    const std::int32_t count = std::min(kRowBlock, n - begin);
    for (std::int32_t t = 0; t < count; ++t) {
      float* row = rows.data() + static_cast<std::size_t>(t) * (d + 1);
      normalise(keys + static_cast<std::size_t>(begin + t) * d, d, row);
      row[d] = static_cast<float>(lift(squares[begin + t]));
    }
    simd::kernels().matmul(rows.data(), columns.data(), products.data(), count, d + 1, m);
    for (std::int32_t t = 0; t < count; ++t) {
      const float* product = products.data() + static_cast<std::size_t>(t) * m;
      const int best = best_of(product, held);
      held[best] += tokens != nullptr ? tokens[begin + t] : 1;
      result[begin + t] = best;
    }
  }
  return result;
}

bool DciTree::raise() {
  const int below = level_count() - 1;
  std::int64_t divisor = every_;
  for (int l = 0; l <= below; ++l) divisor *= upper_every_;
  std::vector<int> promoted;
  std::int32_t live = 0;
  for (int node = 0; node < levels_[below].size(); ++node) {
    if (levels_[below].tokens[node] == 0) continue;
    ++live;
    if (levels_[below].ordinals[node] % divisor == 0) promoted.push_back(node);
  }
  if (promoted.empty() || static_cast<std::int32_t>(promoted.size()) == live) return false;
  levels_.emplace_back();
  const Level& level = levels_[below];
  std::vector<int> own(level.size(), -1);
  for (int node : promoted) {
    own[node] = add_node(below + 1, level.keys.data() + static_cast<std::size_t>(node) * head_dim_,
                         level.squares[node], level.ordinals[node]);
  }
  const std::vector<int> parents = nearest(levels_[below + 1], level.keys.data(),
                                           level.squares.data(), level.tokens.data(), level.size());
  for (int node = 0; node < level.size(); ++node) {
    if (level.tokens[node] == 0) continue;
    const int parent = own[node] >= 0 ? own[node] : parents[node];
    set_parent(below, node, parent);
    levels_[below + 1].tokens[parent] += level.tokens[node];
  }
  return true;
}

std::vector<int> DciTree::build(const float* keys, std::int32_t n) {
  levels_.clear();
  levels_.emplace_back();
  std::vector<double> squares(n);
  max_square_ = 0.0;
  for (std::int32_t i = 0; i < n; ++i) {
    squares[i] = squared_norm(keys + static_cast<std::size_t>(i) * head_dim_, head_dim_);
    max_square_ = std::max(max_square_, squares[i]);
  }
  for (std::int64_t i = 0; i < n; i += every_) {
    add_node(0, keys + i * head_dim_, squares[i], i);
  }
  std::vector<int> cells = nearest(levels_[0], keys, squares.data(), nullptr, n);
  for (std::int32_t i = 0; i < n; ++i) {
    if (promotes(i)) cells[i] = static_cast<int>(i / every_);
    ++levels_[0].tokens[cells[i]];
  }
  while (levels_.back().size() > kTop && raise()) {
  }
  return cells;
}

int DciTree::nearest(int level, const float* key, double square) const {
  const Level& l = levels_[level];
  const double own_lift = lift(square), length = std::sqrt(max_square_);
  // Nodes are not normalised: the key takes a power of two that keeps products in range.
  const int exponent = far_exponent(length, 100), shift = std::clamp(exponent, -40, 40);
  const double factor = length > 0.0 ? std::ldexp(1.0 / length, shift) : 0.0;
  float scaled[kMaxHeadDim];
  normalise(key, head_dim_, scaled);
  for (int i = 0; i < head_dim_ && shift != 0; ++i) scaled[i] = std::ldexp(scaled[i], -shift);
  int best = -1;
  double most = 0.0;
  for (int node = 0; node < l.size(); ++node) {
    if (l.tokens[node] == 0) continue;
    const float* other = l.keys.data() + static_cast<std::size_t>(node) * head_dim_;
    const double product =
        static_cast<double>(simd::kernels().dot(scaled, other, head_dim_)) * factor +
        own_lift * lift(l.squares[node]);
    if (best < 0 || product > most || (product == most && l.tokens[node] < l.tokens[best])) {
      best = node;
      most = product;
    }
  }
  return best;
}

int DciTree::nearest(const float* key) {
  const double square = squared_norm(key, head_dim_);
  max_square_ = std::max(max_square_, square);
  return nearest(0, key, square);
}

int DciTree::promote(const float* key, std::int64_t ordinal) {
  if (levels_.empty()) levels_.emplace_back();
  const double square = squared_norm(key, head_dim_);
  max_square_ = std::max(max_square_, square);
  std::int64_t divisor = every_;
  int below = -1, cell = -1;
  for (int level = 0; level < level_count(); ++level, divisor *= upper_every_) {
    const bool reaches = level == 0 || ordinal % divisor == 0;
    const int node = reaches ? add_node(level, key, square, ordinal) : nearest(level, key, square);
    if (level == 0) {
      cell = node;
    } else {
      set_parent(level - 1, below, node);
    }
    below = node;
    if (!reaches) break;
  }
  return cell;
}

void DciTree::add_tokens(int cell, std::int32_t change) {
  for (int level = 0, node = cell; level < level_count(); ++level) {
    Level& l = levels_[level];
    const int parent = l.parents[node];
    l.tokens[node] += change;
    if (l.tokens[node] == 0) {
      if (parent >= 0) std::erase(levels_[level + 1].children[parent], node);
      l.parents[node] = -1;
      ++l.freed;
    }
    node = parent;
  }
  if (tokens() == 0) {
    levels_.clear();
  } else if (change > 0 && levels_.back().size() - levels_.back().freed > kTop) {
    raise();
  }
}

void DciTree::search(const float* query, float logit_softcap, int beam, std::int64_t wanted,
                     Found& found) const {
  auto &frontier = found.frontier, &ranking = found.ranking;
  auto &scores = found.scores, &dropped = found.dropped;
  found.scored = 0;
  dropped.clear();
  frontier.clear();
  if (!empty()) {
    for (int node = 0; node < levels_.back().size(); ++node) {
      if (levels_.back().tokens[node] > 0) frontier.push_back(node);
    }
  }
  for (int level = level_count() - 1; level >= 0; --level) {
    const Level& l = levels_[level];
    scores.resize(frontier.size());
    ranking.resize(frontier.size());
    std::iota(ranking.begin(), ranking.end(), 0);
    for (std::size_t i = 0; i < frontier.size(); ++i) {
      const float score = simd::kernels().dot(
          query, l.keys.data() + static_cast<std::size_t>(frontier[i]) * head_dim_, head_dim_);
      scores[i] = std::isnan(score) ? -INFINITY : score;
    }
    std::sort(ranking.begin(), ranking.end(), [&](int a, int b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : frontier[a] < frontier[b];
    });
    found.scored += static_cast<std::int64_t>(frontier.size());
    found.cells.clear();
    std::int64_t kept = 0;
    for (int i : ranking) {
      const int node = frontier[i];
      if (static_cast<int>(found.cells.size()) < beam || kept < wanted) {
        found.cells.push_back(node);
        kept += l.tokens[node];
      } else {
        dropped.push_back(soft_cap(scores[i], logit_softcap) +
                          std::log(static_cast<float>(l.tokens[node])));
      }
    }
    if (level == 0) break;
    frontier.clear();
    for (int node : found.cells) {
      frontier.insert(frontier.end(), l.children[node].begin(), l.children[node].end());
    }
  }
  found.unseen_lse = log_sum(dropped.data(), static_cast<std::int64_t>(dropped.size()));
}

std::size_t DciTree::memory_bytes() const {
  std::size_t bytes = 0;
  for (const Level& l : levels_) {
    bytes += l.keys.capacity() * sizeof(float) + l.squares.capacity() * sizeof(double) +
             l.ordinals.capacity() * sizeof(std::int64_t) + l.parents.capacity() * sizeof(int) +
             l.tokens.capacity() * sizeof(std::int32_t);
    for (const auto& children : l.children) bytes += children.capacity() * sizeof(int);
  }
  return bytes;
}

void DciTree::check_integrity() const {
  for (int level = 0; level < level_count(); ++level) {
    const Level& l = levels_[level];
    const bool top = level + 1 == level_count();
    if (std::count(l.tokens.begin(), l.tokens.end(), 0) != l.freed)
      throw IntegrityError(message("level ", level, " does not have ", l.freed, " free nodes"));
    for (int node = 0; node < l.size(); ++node) {
      const std::string name = message("node ", node, " of level ", level);
      const bool freed = l.tokens[node] == 0;
      if (l.tokens[node] < 0)
        throw IntegrityError(message(name, " has ", l.tokens[node], " tokens"));
      const int parent = l.parents[node];
      if ((parent < 0) != (top || freed))
        throw IntegrityError(message(name, " has parent ", parent));
      if (parent >= 0) {
        const std::vector<int>& siblings = levels_[level + 1].children[parent];
        if (std::count(siblings.begin(), siblings.end(), node) != 1)
          throw IntegrityError(message(name, " is not once among its parent's children"));
      }
      if (level == 0) continue;
      std::int64_t tokens = 0;
      for (int child : l.children[node]) {
        tokens += levels_[level - 1].tokens[child];
        if (levels_[level - 1].parents[child] != node)
          throw IntegrityError(message(name, " has child ", child, " of another"));
      }
      if (tokens != l.tokens[node])
        throw IntegrityError(
            message(name, " counts ", l.tokens[node], " tokens, its children hold ", tokens));
    }
  }
}

}  // namespace icecache

// DciTree: the levels of representatives above the tokens of a DciIndex (M-DCI of the IceCache
// paper).
//
// Every e-th token, e = 1 / dci_promotion, represents the first level; of each level every u-th
// node, u = 1 / dci_upper_promotion, is promoted to the next, until at most kTop nodes are left. So
// a token with ordinal i (0 for the first) reaches level l where i is divisible by e u^l. The
// parent of a promoted token is itself; every other token's is the nearest representative b under
//   D(a, b) = M - a.b - sqrt((M - |a|^2)(M - |b|^2)),   M the largest squared norm so far:
// half the squared distance of the lifted keys [k, sqrt(M - |k|^2)], which all have length sqrt(M),
// so that the nearest neighbour of a query [q, 0] is the key with the largest inner product. Ties
// go to the node with the fewest tokens, then to the lower number: cells of equal keys are alike.
//
// A larger norm raises M for what is inserted from then on; parents that were chosen under the
// smaller M stay, and truncation does not lower it. A new representative takes no tokens from the
// others. A representative whose own token was removed goes on routing to those it has, and goes
// with the last. Unlike M-DCI, which finds parents by the approximate search, parents are found by
// full comparison.
//
// A cell is a node of the first level. Threads: const methods any number, others one caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace icecache {

class DciTree {
 public:
  static constexpr int kTop = 32;

  // One of how many is promoted, where a share of them is.
  static std::int64_t every(double share);

  // Both at least 2.
  DciTree(int head_dim, std::int64_t every, std::int64_t upper_every);

  // Replaces everything by the tree over keys [n, D] with ordinals 0..n-1. Returns the cell of
  // each.
  std::vector<int> build(const float* keys, std::int32_t n);

  bool empty() const { return levels_.empty(); }
  std::int64_t tokens() const;
  bool promotes(std::int64_t ordinal) const { return ordinal % every_ == 0; }
  // The cell whose representative is nearest to key [D]. Not for an empty tree.
  int nearest(const float* key);
  // A new cell around key [D], without tokens yet: the next call must be add_tokens for it.
  int promote(const float* key, std::int64_t ordinal);
  // The cell has `change` more tokens. Nodes left without tokens are dropped. Where `change` is
  // negative, it needs no memory.
  void add_tokens(int cell, std::int32_t change);

  // Beam search from the top with exact inner products. Each level keeps its best `beam` nodes, and
  // more as long as those kept hold fewer than `wanted` tokens.
  struct Found {
    std::vector<int> cells;   // best first
    float unseen_lse = 0.0f;  // sum over dropped nodes of tokens x exp(q.representative), log
    std::int64_t scored = 0;  // representatives compared with
    // Scratch.
    std::vector<int> frontier, ranking;
    std::vector<float> scores, dropped;
  };
  void search(const float* query, float logit_softcap, int beam, std::int64_t wanted,
              Found& found) const;

  int level_count() const { return static_cast<int>(levels_.size()); }
  int cell_count() const { return empty() ? 0 : levels_[0].size(); }
  std::int32_t cell_tokens(int cell) const { return levels_[0].tokens[cell]; }
  std::size_t memory_bytes() const;
  // Throws IntegrityError when parents, children and counts disagree.
  void check_integrity() const;

 private:
  struct Level {
    std::vector<float> keys;                 // [n, D]
    std::vector<double> squares;             // [n] |k|^2
    std::vector<std::int64_t> ordinals;      // [n]
    std::vector<int> parents;                // [n] in the level above, -1 at the top
    std::vector<std::vector<int>> children;  // [n] in the level below; empty at the first level
    std::vector<std::int32_t> tokens;        // [n] of all cells below; 0: the number is free
    int freed = 0;                           // free numbers
    int size() const { return static_cast<int>(tokens.size()); }
  };

  int add_node(int level, const float* key, double square, std::int64_t ordinal);
  void set_parent(int level, int node, int parent);
  int nearest(int level, const float* key, double square) const;
  // The nearest node of a level for each of n keys [n, D], which are `tokens` [n] each (null: 1).
  std::vector<int> nearest(const Level& level, const float* keys, const double* squares,
                           const std::int32_t* tokens, std::int32_t n) const;
  // Keys [n] over sqrt(M), into `out`.
  void normalise(const float* keys, std::int64_t n, float* out) const;
  // Adds a level above the top, of the top's nodes that are promoted to it. False where it would
  // not be smaller.
  bool raise();
  double lift(double square) const;

  int head_dim_;
  std::int64_t every_, upper_every_;
  double max_square_ = 0.0;    // M
  std::vector<Level> levels_;  // the first level is levels_[0]
};

}  // namespace icecache

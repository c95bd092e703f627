// SketchScores: what a scan of the sketches tells about every token of an index, for one step.
//
// Scores are 16-bit integers on a scale that all heads of the group share: score x unit nats above
// bias[g], unit = 2^coarse simd::kScoreUnit (or more, where coarse is simd::kMaxCoarse). Only
// differences between a head's scores are exact to the unit; see Sketch for how far a score is from
// the true logit.
//
// Threads: none of its own. Buffers grow and are used again.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "icecache/types.h"

namespace icecache {

class SketchScores {
 public:
  // Room for the scores of `pages` pages of `page_size` slots.
  void resize(int group, int pages, int page_size);

  int group() const { return group_; }
  std::int64_t stride() const { return stride_; }
  // [G, stride()], [G], [P, mass_stride(G)]: what Sketch::scan writes, with the unit in nats and
  // the bias of each head.
  std::int16_t* scores() { return scores_.data(); }
  std::int16_t* max() { return max_; }
  float* mass() { return mass_.data(); }
  float unit = 0.0f;
  int coarse = 0;
  float bias[kMaxGroup] = {};

  // Log of the largest weight of a token, -inf where there is none.
  float log_max(int g) const;
  // Weights of a page's tokens over exp(log_max(g)): [G].
  const float* page_mass(int page) const {
    return mass_.data() + static_cast<std::size_t>(page) * mass_columns_;
  }
  // Log of the sum of all weights: of every head [G], of one.
  void log_totals(float* out) const;
  float log_total(int g) const;

  // The k slots of most mass, ascending, all where there are fewer. A token's mass is what it
  // weighs in the head of the group that sees it best, beside near_lse and all other tokens; the
  // sum over the group would rank alike (it is at most G times as large) and cost an exponential a
  // score. Equal masses: the lower slots.
  void top(const float* near_lse, std::int64_t k, std::vector<std::int32_t>& slots);
  // Takes slots (ascending) out of the page masses.
  void exclude(std::span<const std::int32_t> slots);

 private:
  int group_ = 0, pages_ = 0, page_size_ = 0, mass_columns_ = 0;
  std::int64_t stride_ = 0;
  std::vector<std::int16_t> scores_, rank_, block_max_;
  std::int16_t max_[kMaxGroup] = {};
  std::vector<float> mass_;  // [P, mass_columns_]
};

}  // namespace icecache

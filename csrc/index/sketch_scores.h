// SketchScores: what a scan of the sketches tells about every token of some segments, for one step.
//
// Each segment is a part. Pages are numbered over all parts in order, the first of a part by
// first_page(): numbers between two parts belong to none.
// Scores are 16-bit integers on a scale that all heads and parts share: score x unit nats above
// bias(part)[g], unit = 2^octave simd::kScoreUnit. Only differences between scores are exact to the
// unit; see Sketch for how far a score is from the true logit.
//
// Threads: none of its own. Buffers grow and are used again.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "icecache/types.h"

namespace icecache {

class SketchScores {
 public:
  // For parts of so many pages of `page_size` slots; octave >= 0.
  void resize(int group, int page_size, std::span<const int> pages, int octave);

  // Numbers that a part of so many pages takes: parts begin with a block of ranks.
  static int page_room(int pages, int page_size);
  int group() const { return group_; }
  int first_page(int part) const { return parts_[part].first_page; }
  std::int64_t stride() const { return stride_; }
  int octave() const { return octave_; }
  // What the kernels know of it.
  int coarse() const;
  float unit() const { return unit_; }
  // What Sketch::scan writes: [G, stride()], [G], [P, mass_stride(G)], nats of a score of 0 [G].
  std::int16_t* scores(int part) { return scores_.data() + first_slot(part); }
  std::int16_t* max(int part) { return parts_[part].max; }
  float* mass(int part) {
    return mass_.data() + static_cast<std::size_t>(first_page(part)) * mass_columns_;
  }
  float* bias(int part) { return parts_[part].bias; }

  // Log of the largest weight of a token, -inf where there is none: of all, of a part.
  float log_max(int g) const;
  float log_max(int part, int g) const;
  // Weights of a part's page over exp(log_max(part, g)): [G].
  const float* page_mass(int part, int page) const {
    return mass_.data() + static_cast<std::size_t>(first_page(part) + page) * mass_columns_;
  }
  // Log of the sum of all weights: of every head [G], of one.
  void log_totals(float* out) const;
  float log_total(int g) const;

  // The k slots of most mass, ascending, all where there are fewer. A token's mass is what it
  // weighs in the head of the group that sees it best, beside near_lse and all other tokens; the
  // sum over the group would rank alike (it is at most G times as large) and cost an exponential a
  // score. Equal masses: the lower slots. Leaves out those whose share has a logarithm of `least`
  // or below. Returns the logarithm of the largest share that a token beside them may have, by its
  // score; -inf where there is none.
  float top(const float* near_lse, std::int64_t k, float least, std::vector<std::int32_t>& slots);
  // The same ranks by themselves, in units. Returns what a share of 1 has. With `share_of_one`, which
  // an earlier call returned, other queries have scanned since then: each token keeps the higher of
  // its two ranks.
  float rank(const float* near_lse, std::optional<float> share_of_one = {});
  // Gives a slot that holds a token the highest rank.
  void prefer(std::int64_t slot);
  // The k slots of highest rank above `floor`, ascending.
  void top_ranked(std::int64_t k, std::int16_t floor, std::vector<std::int32_t>& slots);
  // What a slot's score says of its logit: log weight of head g.
  float log_weight(int part, int g, std::int32_t slot) const {
    return parts_[part].bias[g] + unit() * scores_[g * stride_ + slot];
  }
  // Takes slots (ascending) out of the page masses.
  void exclude(std::span<const std::int32_t> slots);

 private:
  struct Part {
    int first_page, pages;
    std::int64_t slots;  // a multiple of simd::kScoreSlots
    std::int16_t max[kMaxGroup];
    float bias[kMaxGroup];
  };
  std::int64_t first_slot(int part) const {
    return static_cast<std::int64_t>(parts_[part].first_page) * page_size_;
  }

  int group_ = 0, page_size_ = 0, mass_columns_ = 0, octave_ = 0;
  float unit_ = 0.0f;  // nats
  std::int64_t stride_ = 0;
  std::vector<Part> parts_;
  std::vector<std::int16_t> scores_, rank_, block_max_, chosen_;
  std::vector<float> mass_;  // [stride() / S, mass_columns_]
};

}  // namespace icecache

// Selector: one step's answer from all segments of a head: one set of candidates, one budget, one
// far field.
//
// Sketches rank all tokens, by shares of the attention mass, which compare across segments; the
// best get exact scores, and the best of these are picked. What is not picked weighs by its scores.
//
// Threads: none of its own. Keeps its buffers: select() does not allocate after they have grown
// once.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "index/segment.h"
#include "index/sketch_scores.h"

namespace icecache {

class Selector {
 public:
  // Picks tokens of `segments`, which are of one kind and in order of position, for one step of the
  // group, whose queries are finite. Pages (PagePick::local_page) and far-field nodes are numbered
  // over all segments in order. An index that chooses pages by itself must be the only one.
  void select(const Config& config, std::span<const Segment* const> segments,
              const SelectRequest& request, Selection& selection);

  // Of the last selection, whose segments are as they were. The whole map of pages.
  void pages(std::vector<PageInfo>& pages) const;
  void selected_positions(const Selection& selection, std::vector<std::int32_t>& positions) const;
  // [C], empty without far field.
  void far_nodes(const Selection& selection, std::vector<FarNodeInfo>& nodes) const;

 private:
  struct Part {
    const Segment* segment;
    int number, first_page, first_node;
    int pages() const { return static_cast<int>(segment->masks().size()); }
    const PageTable& table() const { return segment->index().table(); }
  };
  // Tokens worth an exact score, and what the others weigh.
  struct Candidates {
    std::vector<std::int32_t> slots;  // over all pages, ascending, each once
    std::vector<float> rest_lse;      // [G] estimated log weight of all tokens not in slots
    std::vector<float> logits;        // [G, slots] exact
    std::vector<float> weights;       // exp(logits - max), [G, slots]; 0 where the logit is -inf
    std::vector<float> max, sum;      // of logits, of weights: [G]
    std::vector<char> picked;         // [slots]
    std::int64_t bytes = 0;           // read to find them
    std::size_t size() const { return slots.size(); }
    // Exact log weight of all of them, for one head.
    float lse(int g) const { return max[g] + std::log(sum[g]); }
  };

  void number(std::span<const Segment* const> segments);
  const Part& part_of_page(int page) const;
  // Calls body(part, i, local slot) for the i-th of `slots`, ascending.
  template <typename Body>
  void for_each(std::span<const std::int32_t> slots, const Body& body) const {
    std::size_t i = 0;
    for (std::size_t p = 0; p < parts_.size() && i < slots.size(); ++p) {
      const std::int32_t first = parts_[p].first_page * page_size_;
      const std::int32_t end = p + 1 < parts_.size() ? parts_[p + 1].first_page * page_size_
                                                     : std::numeric_limits<std::int32_t>::max();
      for (; i < slots.size() && slots[i] < end; ++i) body(parts_[p], i, slots[i] - first);
    }
  }
  std::uint32_t mask(int page) const;
  void add_all(const Part& part);

  // Scans the sketches of all segments for scores, if the index keeps sketches.
  void scan(const SelectRequest& request);
  void find(const SelectRequest& request);
  // Tokens that get an exact score at first; at least the budget, and where no more can follow,
  // what mass_target may pick.
  std::int64_t wanted_candidates(const SelectRequest& request) const;
  // Exact logits of some slots [G, slots]; counts the bytes read.
  void score(const SelectRequest& request, std::span<const std::int32_t> slots,
             std::vector<float>& logits);
  // Exact logits of the candidates, and what they weigh.
  void rescore(const SelectRequest& request);
  void weigh_candidates();
  // Up to `count` candidates more, of those whose log share is above `least`; false: there are
  // none.
  bool find_more(const SelectRequest& request, std::int64_t count, float least);
  // Adds the tokens that may have kMainShare of a head's attention and are no candidates yet. A
  // token may have it if its score says so once it is off by kDeviations times `error` nats.
  void widen(const SelectRequest& request, float error, Selection& selection);
  // How far scores are from logits: the largest over the heads of the candidates' standard
  // deviation, in nats. Before they are excluded.
  float score_error() const;
  // Fills `picked` within the budget; picking whole pages adds their tokens to the candidates.
  // Returns whether all candidates are picked and mass_target asks for more.
  bool pick(const SelectRequest& request);
  void complete_pages(const SelectRequest& request);
  // Picks, tokens and logits of the selection.
  void take_picked(Selection& selection);
  // What the tokens of each node weigh that were not picked, over exp(shift): mass
  // [C, simd::mass_stride(G)], shift [G].
  void weigh_nodes(std::vector<float>& shift);
  // The far field and what is left unpicked, from the page masses of the scores (candidates
  // excluded) and the exact logits of candidates that were not picked.
  void weigh_rest(Selection& selection);
  void share_out(Selection& selection);

  const Config* config_ = nullptr;
  int group_ = 0, page_size_ = 0, nodes_ = 0;
  bool has_far_field_ = false, finds_by_scores_ = false;
  std::vector<Part> parts_;
  Candidates candidates_;
  SketchScores scores_;
  bool has_scores_ = false;
  float cut_ = -INFINITY;  // log of the largest share that a token beside the candidates scores
  // Buffers of the steps above.
  std::vector<Sketch::Query> queries_;
  SearchScratch search_scratch_;
  CandidateFinder::Found found_;
  std::vector<const void*> rows_;
  std::vector<std::int32_t> more_, all_, ranking_, taken_, slots_, left_;
  std::vector<std::int16_t> upper_;
  std::vector<char> marked_;
  std::vector<int> pages_;
  std::vector<float> more_logits_, all_logits_, mass_, node_mass_;
};

}  // namespace icecache

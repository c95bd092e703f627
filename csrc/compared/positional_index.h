// PositionalIndex (index = "positional"): pages of consecutive tokens, ranked by a bound or a mean.
//
// positional_bound = "quest": page and query give the upper bound sum_i max(q_i low_i, q_i high_i)
// of q.k over the page (Tang et al. 2024, Quest); a page is worth the largest bound over the group.
// "mean": a page of n tokens weighs n exp(q.mean); it is worth its share of the attention mass so
// estimated, summed over the group.
// select = "page" takes the best pages without looking at keys; "token" scores the keys of the best
// pages, `candidates` tokens of them. What is not picked is estimated at the middle of its bounds,
// or at its mean: an underestimate where keys of a page differ much.
//
// New tokens fill the last page, so a page is never split.
#pragma once

#include <memory>
#include <vector>

#include "index/growing_index.h"

namespace icecache {

class PositionalIndex final : public GrowingIndex, CandidateFinder, PageChooser {
 public:
  explicit PositionalIndex(const HeadContext& context);
  std::unique_ptr<GrowingIndex> fork() const override;
  const CandidateFinder* finder() const override { return this; }
  const PageChooser* chooser() const override { return config().select == "page" ? this : nullptr; }
  std::size_t memory_bytes() const override;
  void check_integrity() const override;

 protected:
  Arrangement arrange(const Rows& rows) override;
  void built() override;
  int choose_page(const float*) override;
  void page_opened(int page) override;
  void token_added(int page) override { refresh(page); }
  void tokens_removed(int page) override;

 private:
  // How the pages compare for one request.
  struct Ranking {
    std::vector<std::int32_t> pages;  // in use, best first
    std::vector<float> worth;         // [P]
    std::vector<float> lse;           // [G, P] estimated log weight; -inf for pages not in use
    std::int64_t bytes = 0;
  };
  struct Scratch;

  PositionalIndex(const PositionalIndex&) = default;
  void find(const SelectRequest& request, std::int64_t wanted, SearchScratch& scratch,
            Found& found) const override;
  void choose_pages(const SelectRequest& request, SearchScratch& scratch,
                    Selection& selection) const override;
  int row_size() const;
  // The summary [row_size()] of a page's members: high [D] and low [D], or the mean [D].
  void summarize(int page, float* row) const;
  void refresh(int page);
  void rank(const SelectRequest& request, Ranking& ranking) const;

  bool quest_;
  std::vector<float> rows_;  // [P, row_size()]
  std::vector<int> order_;   // pages in use, in order of position
};

}  // namespace icecache

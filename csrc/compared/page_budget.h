// PageBudget: spending the token budget of one request on whole pages, best first.
//
// A page is taken when it fits in what is left. With mass_target the limit is max_budget until
// every head's estimated share of the attention mass is reached, budget from then on.
//
// Threads: none of its own. Keeps its buffers between requests.
#pragma once

#include <vector>

#include "index/selection.h"
#include "pages/page_table.h"

namespace icecache {

class PageBudget {
 public:
  // total_lse [G]: estimated log weight of all tokens, sink and window included. `request` and
  // `table` must outlive the calls below.
  void start(const SelectRequest& request, const PageTable& table, const float* total_lse);
  // Nothing fits any more.
  bool spent() const { return tokens_ >= limit(); }
  bool taken(int page) const { return taken_[page] != 0; }
  // Takes the page unless it does not fit; lse(g) is the log weight of its tokens for head g. True
  // where it was taken now.
  template <typename Lse>
  bool take(int page, Lse&& lse) {
    if (!fits(page)) return false;
    for (int g = 0; g < request_->group; ++g) add_share(g, lse(g));
    close(page);
    return true;
  }
  // Fills picks and tokens.
  void finish(Selection& selection) const;

 private:
  int limit() const { return reached_ ? request_->budget : request_->max_budget; }
  bool fits(int page) const;
  void add_share(int g, float lse);
  void close(int page);
  void update_reached();

  const SelectRequest* request_ = nullptr;
  const PageTable* table_ = nullptr;
  int tokens_ = 0;
  bool reached_ = true;  // of mass_target; true where it is off
  float total_[kMaxGroup], share_[kMaxGroup];
  std::vector<std::uint32_t> taken_;  // [P] mask of the page where taken
};

}  // namespace icecache

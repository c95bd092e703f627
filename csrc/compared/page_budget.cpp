#include "compared/page_budget.h"

#include <algorithm>
#include <cmath>

namespace icecache {

void PageBudget::start(const SelectRequest& request, const PageTable& table,
                       const float* total_lse) {
  request_ = &request;
  table_ = &table;
  tokens_ = 0;
  reached_ = !(request.mass_target > 0.0);
  taken_.assign(table.page_count(), 0);
  for (int g = 0; g < request.group; ++g) {
    total_[g] = total_lse[g];
    share_[g] = 0.0f;
    add_share(g, request.near_lse[g]);
  }
  update_reached();
}

// Shares only grow: once reached, the target stays reached.
void PageBudget::update_reached() {
  reached_ = reached_ || std::all_of(share_, share_ + request_->group,
                                     [&](float share) { return share >= request_->mass_target; });
}

bool PageBudget::fits(int page) const {
  return table_->in_use(page) && !taken(page) && tokens_ + table_->count(page) <= limit();
}

void PageBudget::add_share(int g, float lse) {
  if (lse > -INFINITY) share_[g] += std::exp(std::min(lse - total_[g], 0.0f));
}

void PageBudget::close(int page) {
  taken_[page] = table_->mask(page);
  tokens_ += table_->count(page);
  update_reached();
}

void PageBudget::finish(Selection& selection) const {
  selection.picks.clear();
  selection.tokens = tokens_;
  for (int page = 0; page < table_->page_count(); ++page) {
    if (taken(page)) selection.picks.push_back(table_->pick(page, taken_[page]));
  }
}

}  // namespace icecache

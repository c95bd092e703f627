#include "index/selector.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "index/log_sum.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// A token with that share of a head's attention must not be missed.
constexpr float kMainShare = 0.1f;
// Of thousands of scores about one is wrong by as many standard deviations.
constexpr float kDeviations = 3.5f;
// Times `candidates`, for a step in doubt.
constexpr std::int64_t kMostWidening = 4;

}  // namespace

void Selector::number(std::span<const Segment* const> segments) {
  parts_.clear();
  int page = 0;
  nodes_ = 0;
  for (const Segment* segment : segments) {
    parts_.push_back({segment, static_cast<int>(parts_.size()), page, nodes_});
    page += SketchScores::page_room(parts_.back().pages(), page_size_);
    nodes_ += segment->index().node_count();
  }
}

const Selector::Part& Selector::part_of_page(int page) const {
  const auto after =
      std::upper_bound(parts_.begin(), parts_.end(), page,
                       [](int number, const Part& part) { return number < part.first_page; });
  return *(after - 1);
}

std::uint32_t Selector::mask(int page) const {
  const Part& part = part_of_page(page);
  return part.segment->masks()[page - part.first_page];
}

void Selector::add_all(const Part& part) {
  const std::span<const std::uint32_t> masks = part.segment->masks();
  for (int page = 0; page < part.pages(); ++page) {
    for (std::uint32_t slots = masks[page]; slots != 0; slots &= slots - 1) {
      candidates_.slots.push_back((part.first_page + page) * page_size_ + std::countr_zero(slots));
    }
  }
}

std::int64_t Selector::wanted_candidates(const SelectRequest& request) const {
  const bool few_at_first = finds_by_scores_ && config_->select == "token";
  return std::max<std::int64_t>(config_->candidates,
                                few_at_first ? request.budget : request.max_budget);
}

void Selector::scan(const SelectRequest& request) {
  has_scores_ = parts_.front().segment->index().has_sketches();
  if (!has_scores_) return;
  pages_.clear();
  if (queries_.size() < parts_.size()) queries_.resize(parts_.size());
  int octave = 0;
  for (const Part& part : parts_) {
    const SemanticIndex& index = part.segment->index();
    pages_.push_back(part.pages());
    Sketch::Query& query = queries_[part.number];
    index.sketch().prepare(index.space().metric, request.queries, group_, query);
    octave = std::max(octave, query.octave);
  }
  scores_.resize(group_, page_size_, pages_, octave);
  for (const Part& part : parts_) {
    candidates_.bytes += part.segment->index().sketch().scan(
        queries_[part.number], part.segment->masks(), part.number, request.logit_softcap, scores_);
  }
}

void Selector::find(const SelectRequest& request) {
  const std::int64_t wanted = wanted_candidates(request);
  std::int64_t total = 0;
  for (const Part& part : parts_) total += part.segment->size();
  if (total <= wanted) {
    for (const Part& part : parts_) add_all(part);
    return;
  }
  scan(request);
  if (finds_by_scores_) {
    cut_ = scores_.top(request.near_lse, wanted, -INFINITY, candidates_.slots);
    return;
  }
  for (const Part& part : parts_) {
    const SemanticIndex& index = part.segment->index();
    found_.slots.clear();
    found_.rest_lse.assign(group_, -INFINITY);
    found_.bytes = 0;
    const std::int64_t cut = index.size() - part.segment->size();
    index.finder()->find(request, wanted + cut, search_scratch_, found_);
    candidates_.bytes += found_.bytes;
    const std::span<const std::uint32_t> masks = part.segment->masks();
    for (const std::int32_t slot : found_.slots) {
      if ((masks[index.table().page_of(slot)] >> index.table().place_of(slot) & 1u) == 0) continue;
      candidates_.slots.push_back(part.first_page * page_size_ + slot);
    }
    for (int g = 0; g < group_; ++g) {
      candidates_.rest_lse[g] = log_add(candidates_.rest_lse[g], found_.rest_lse[g]);
    }
  }
}

void Selector::score(const SelectRequest& request, std::span<const std::int32_t> slots,
                     std::vector<float>& logits) {
  const auto count = static_cast<std::int64_t>(slots.size());
  const PageTable& any = parts_.front().table();
  rows_.resize(count);
  for_each(slots, [&](const Part& part, std::size_t i, std::int32_t slot) {
    rows_[i] = part.table().key(any.page_of(slot), any.place_of(slot));
  });
  logits.resize(count * group_);
  simd::kernels().row_logits(
      {rows_.data(), any.format().dtype(), count, group_, any.head_dim(), request.bias},
      request.for_rows(), logits.data(), count);
  simd::kernels().soft_cap(logits.data(), count * group_, request.logit_softcap);
  candidates_.bytes += count * static_cast<std::int64_t>(any.row_bytes());
}

void Selector::rescore(const SelectRequest& request) {
  score(request, candidates_.slots, candidates_.logits);
  weigh_candidates();
}

void Selector::weigh_candidates() {
  Candidates& c = candidates_;
  const auto count = static_cast<std::int64_t>(c.size());
  c.weights.assign(count * group_, 0.0f);
  c.max.resize(group_);
  c.sum.resize(group_);
  for (int g = 0; g < group_; ++g) {
    const float* logits = c.logits.data() + g * count;
    simd::kernels().softmax_stats(logits, count, &c.max[g], &c.sum[g]);
    if (c.sum[g] == 0.0f) continue;
    simd::kernels().add_exp(logits, c.max[g], c.weights.data() + g * count, count);
  }
}

bool Selector::find_more(const SelectRequest& request, std::int64_t count, float least) {
  if (!has_scores_ || count <= 0) return false;
  Candidates& c = candidates_;
  float known[kMaxGroup];
  for (int g = 0; g < group_; ++g) known[g] = log_add(request.near_lse[g], c.lse(g));
  cut_ = scores_.top(known, count, least, more_);
  if (more_.empty()) return false;
  scores_.exclude(more_);
  score(request, more_, more_logits_);
  const std::size_t before = c.size(), added = more_.size(), after = before + added;
  all_.resize(after);
  all_logits_.resize(after * group_);
  for (std::size_t i = 0, a = 0, b = 0; i < after; ++i) {
    const bool is_new = a == before || (b < added && more_[b] < c.slots[a]);
    all_[i] = is_new ? more_[b] : c.slots[a];
    for (int g = 0; g < group_; ++g) {
      all_logits_[g * after + i] = is_new ? more_logits_[g * added + b] : c.logits[g * before + a];
    }
    ++(is_new ? b : a);
  }
  c.slots.swap(all_);
  c.logits.swap(all_logits_);
  weigh_candidates();
  return true;
}

float Selector::score_error() const {
  const Candidates& c = candidates_;
  const auto count = static_cast<std::int64_t>(c.size());
  float sum[kMaxGroup], square[kMaxGroup];
  std::fill_n(sum, group_, 0.0f);
  std::fill_n(square, group_, 0.0f);
  for_each(c.slots, [&](const Part& part, std::size_t i, std::int32_t) {
    for (int g = 0; g < group_; ++g) {
      const float error = c.logits[g * count + static_cast<std::int64_t>(i)] -
                          scores_.log_weight(part.number, g, c.slots[i]);
      sum[g] += error;
      square[g] += error * error;
    }
  });
  float largest = 0.0f;
  for (int g = 0; g < group_ && count > 0; ++g) {
    const float mean = sum[g] / static_cast<float>(count);
    largest = std::max(largest, square[g] / static_cast<float>(count) - mean * mean);
  }
  return std::sqrt(largest);
}

void Selector::widen(const SelectRequest& request, float error, Selection& selection) {
  const float least = std::log(kMainShare) - kDeviations * error;
  if (!(cut_ > least)) return;
  const std::int64_t most = kMostWidening * config_->candidates;
  selection.is_widened =
      find_more(request, most - static_cast<std::int64_t>(candidates_.size()), least);
  selection.is_doubtful = cut_ > least;
}

void Selector::select(const Config& config, std::span<const Segment* const> segments,
                      const SelectRequest& request, Selection& selection) {
  config_ = &config;
  group_ = request.group;
  page_size_ = static_cast<int>(config.page_size);
  number(segments);
  has_far_field_ = segments.front()->index().has_far_field();
  finds_by_scores_ = segments.front()->index().finder() == nullptr;
  has_scores_ = false;
  selection.is_widened = selection.is_doubtful = false;
  cut_ = -INFINITY;
  Candidates& c = candidates_;
  c.slots.clear();
  c.rest_lse.assign(group_, -INFINITY);
  c.bytes = 0;
  const PageChooser* chooser = segments.front()->index().chooser();
  if (chooser != nullptr && segments.size() == 1) {
    chooser->choose_pages(request, search_scratch_, selection);
    scan(request);
    for (const PagePick& pick : selection.picks) {
      for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1) {
        c.slots.push_back(pick.local_page * page_size_ + std::countr_zero(slots));
      }
    }
    c.rest_lse = selection.rest_lse;
    c.bytes += selection.bytes_scanned;
    c.picked.assign(c.size(), 1);
    rescore(request);  // of what is attended anyway: read once
  } else {
    find(request);
    rescore(request);
    const float error = finds_by_scores_ && has_scores_ ? score_error() : 0.0f;
    if (has_scores_) scores_.exclude(c.slots);
    widen(request, error, selection);
    std::int64_t left = 0;
    do {
      if (has_scores_ && request.mass_target > 0.0) scores_.log_totals(c.rest_lse.data());
      left = request.max_budget - static_cast<std::int64_t>(c.size());
    } while (pick(request) &&
             find_more(request, std::min<std::int64_t>(left, static_cast<std::int64_t>(c.size())),
                       -INFINITY));
  }
  // Whole pages brought more candidates.
  if (has_scores_ && config.select == "page") scores_.exclude(candidates_.slots);
  take_picked(selection);
  weigh_rest(selection);
  selection.bytes_scanned = c.bytes;
}

}  // namespace icecache

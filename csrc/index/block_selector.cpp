#include "index/block_selector.h"

#include <algorithm>

#include "simd/kernels.h"

namespace icecache {
namespace {

// Rows of one pass, whose scores stay near.
constexpr int kPassRows = 16;

}  // namespace

void BlockSelector::prepare(std::span<const Segment* const> segments, const Request& request) {
  const int d = segments.front()->index().table().head_dim(), group = request.group;
  const int together = std::max(1, kPassRows / group);  // tokens of a pass
  pass_count_ = (request.tokens + together - 1) / together;
  if (static_cast<int>(passes_.size()) < pass_count_) passes_.resize(pass_count_);
  octave_ = 0;
  const std::int64_t rows = static_cast<std::int64_t>(request.tokens) * group;
  const int dims = NodeKeys::dims(segments.front()->index().space().metric.rank);
  if (projected_.size() < segments.size()) projected_.resize(segments.size());
  for (int p = 0; p < pass_count_; ++p) {
    passes_[p].first = p * together * group;
    passes_[p].rows = std::min(together, request.tokens - p * together) * group;
    passes_[p].prepared.resize(std::max(passes_[p].prepared.size(), segments.size()));
  }
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const Sketch& sketch = segments[s]->index().sketch();
    const QueryMetric& metric = segments[s]->index().space().metric;
    projected_[s].resize(static_cast<std::size_t>(rows) * dims);
    sketch.project(metric, request.queries, rows, dims, basis_, projected_[s].data());
    for (int p = 0; p < pass_count_; ++p) {
      Pass& pass = passes_[p];
      sketch.prepare(metric, request.queries + static_cast<std::ptrdiff_t>(pass.first) * d,
                     projected_[s].data() + static_cast<std::ptrdiff_t>(pass.first) * dims,
                     pass.rows, dims, pass.prepared[s]);
      octave_ = std::max(octave_, pass.prepared[s].octave);
    }
  }
}

std::int64_t BlockSelector::scan(std::span<const Segment* const> segments, const Request& request,
                                 int number) {
  const Pass& pass = passes_[number];
  std::int64_t bytes = 0;
  scores_.resize(pass.rows, segments.front()->index().table().page_size(), pages_, octave_);
  for (std::size_t s = 0; s < segments.size(); ++s) {
    bytes +=
        segments[s]->index().sketch().scan(pass.prepared[s], segments[s]->masks(),
                                           static_cast<int>(s), request.logit_softcap, scores_);
  }
  const float* near_lse = request.near_lse + pass.first;
  if (number == 0) {
    share_of_one_ = scores_.rank(near_lse);
  } else {
    scores_.rank(near_lse, share_of_one_);
  }
  return bytes;
}

std::int64_t BlockSelector::prefer(std::span<const Segment* const> segments,
                                   std::int32_t position) {
  position = std::max(position, 0);  // free slots have none
  std::int64_t count = 0;
  for (std::size_t s = 0; s < segments.size(); ++s) {
    if (segments[s]->end_position() <= position) continue;
    const PageTable& table = segments[s]->index().table();
    const std::size_t first =
        static_cast<std::size_t>(scores_.first_page(static_cast<int>(s))) * table.page_size();
    const std::vector<std::int32_t>& positions = table.positions();
    for (std::size_t slot = 0; slot < positions.size(); ++slot) {
      // A segment that is cut has none of those behind.
      if (positions[slot] < position || positions[slot] >= segments[s]->end_position()) continue;
      scores_.prefer(static_cast<std::int64_t>(first + slot));
      ++count;
    }
  }
  return count;
}

std::int64_t BlockSelector::select(std::span<const Segment* const> segments, const Request& request,
                                   std::vector<Pick>& picks) {
  picks.clear();
  pages_.clear();
  for (const Segment* segment : segments)
    pages_.push_back(static_cast<int>(segment->masks().size()));
  prepare(segments, request);
  std::int64_t bytes = 0;
  for (int p = 0; p < pass_count_; ++p) bytes += scan(segments, request, p);
  const std::int64_t budget = request.budget + prefer(segments, request.exact_from);
  scores_.top_ranked(budget, simd::kNoScore, slots_);
  int s = 0;
  for (const std::int32_t slot : slots_) {
    const int number = segments[s]->index().table().page_of(slot);  // over all segments
    while (s + 1 < static_cast<int>(segments.size()) && number >= scores_.first_page(s + 1)) ++s;
    const PageTable& table = segments[s]->index().table();
    const int page = number - scores_.first_page(s);
    if (picks.empty() || picks.back().segment != s || picks.back().page.local_page != page) {
      picks.push_back({s, table.pick(page, 0)});
    }
    picks.back().page.slots |= 1u << table.place_of(slot);
  }
  return bytes;
}

}  // namespace icecache

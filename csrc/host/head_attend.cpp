// HeadCache: attention, over everything and within the token budget.
#include <algorithm>
#include <bit>
#include <cmath>

#include "host/head_cache.h"
#include "host/seconds.h"
#include "icecache/error.h"
#include "index/log_sum.h"
#include "index/magnitude.h"
#include "simd/flush_subnormals.h"
#include "simd/kernels.h"
#include "simd/prefetch.h"

namespace icecache {
namespace {

// The tokens of a segment in order of position, as picks of one slot.
void add_in_order(const Segment& segment, std::vector<PagePick>& picks) {
  const PageTable& table = segment.index().table();
  const std::span<const std::uint32_t> masks = segment.masks();
  picks.resize(static_cast<std::size_t>(segment.size()));
  for (int page = 0; page < static_cast<int>(masks.size()); ++page) {
    for (std::uint32_t slots = masks[page]; slots != 0; slots &= slots - 1) {
      const int slot = std::countr_zero(slots);
      picks[table.position(page, slot) - segment.first_position()] = table.pick(page, 1u << slot);
    }
  }
}

int token_count(std::span<const PagePick> picks) {
  int tokens = 0;
  for (const PagePick& pick : picks) tokens += std::popcount(pick.slots);
  return tokens;
}

}  // namespace

void HeadCache::verify(std::span<const PagePick> picks) const {
  if (context_.config->integrity == "off") return;
  for (const PagePick& pick : picks) {
    context_.pool->verify(pick.page, pick.epoch, context_.owner.layer, context_.owner.head);
  }
}

PageLayout HeadCache::run_layout() const {
  return {context_.head_dim, context_.run_page_size(), context_.dtype};
}

PageLayout HeadCache::layout_of(const PageTable& table) {
  const RowFormat& format = table.format();
  return {table.head_dim(), table.page_size(), format.dtype(),
          format.has_codes() ? &format : nullptr};
}

void HeadCache::attend_picks(const PageLayout& layout, std::int64_t seen, ExactAttention& attention,
                             HeadStats& stats, AttendWorkspace& workspace) const {
  const auto row_bytes = static_cast<std::int64_t>(row_bytes_of(layout.dtype, layout.head_dim));
  const std::vector<PagePick>& picks = workspace.picks;
  std::vector<PageSlots>& pages = workspace.pages;
  verify(picks);
  pages.clear();
  for (const PagePick& pick : picks) pages.push_back({context_.pool->data(pick.page), pick.slots});
  attention.attend(pages, layout, seen);
  stats.bytes_read += 2 * row_bytes * token_count(picks);
}

void HeadCache::attend_exact(const float* queries, int tokens, std::int32_t first_position, Out out,
                             HeadStats& stats, AttendWorkspace& workspace) const {
  ExactAttention attention(
      {queries, tokens, context_.group, QueryBlock::kAll, context_.logit_softcap},
      context_.head_dim, held_, out.rows);
  const std::int32_t end = first_position + tokens;
  attend_run(sink_, 0, first_position, end, attention, stats, workspace);
  for (const Segment& segment : segments_) {
    attend_segment(segment, first_position, attention, stats, workspace);
  }
  if (growing_) attend_segment(Segment(*growing_), first_position, attention, stats, workspace);
  attend_run(tail_, tail_.first_position(), first_position, end, attention, stats, workspace);
  attention.finish(out.lse);
}

void HeadCache::attend_run(const PageRun& run, std::int32_t begin, std::int32_t first_position,
                           std::int32_t end, ExactAttention& attention, HeadStats& stats,
                           AttendWorkspace& workspace) const {
  workspace.picks.clear();
  run.picks(begin, end, workspace.picks);
  attend_picks(run_layout(), first_position + 1 - begin, attention, stats, workspace);
}

void HeadCache::attend_segment(const Segment& segment, std::int32_t first_position,
                               ExactAttention& attention, HeadStats& stats,
                               AttendWorkspace& workspace) const {
  std::vector<PagePick>& picks = workspace.picks;
  picks.clear();
  const PageLayout layout = layout_of(segment.index().table());
  const std::int64_t seen = first_position + 1 - segment.first_position();
  if (seen < segment.size()) {  // another layer's call for the same tokens has indexed them
    add_in_order(segment, picks);
    return attend_picks(layout, seen, attention, stats, workspace);
  }
  const std::span<const std::uint32_t> masks = segment.masks();
  for (std::size_t page = 0; page < masks.size(); ++page) {
    if (masks[page] == 0) continue;
    picks.push_back(segment.index().table().pick(static_cast<int>(page), masks[page]));
  }
  attend_picks(layout, QueryBlock::kAll, attention, stats, workspace);
}

void HeadCache::insert_due(std::int32_t position, HeadStats& stats, AttendWorkspace& workspace) {
  const auto start = std::chrono::steady_clock::now();
  const simd::FlushSubnormals flush;
  if (!growing_) return;
  const std::int32_t due = std::min(window_start(position) - tail_.first_position(), tail_.count());
  if (due < kInsertTogether) return;
  try {
    insert(due, workspace.moving);
  } catch (const OutOfPages&) {
    // They are attended from the tail until a later step finds room.
  }
  stats.index_seconds += seconds_since(start);
}

void HeadCache::look_at(std::int32_t position, AttendWorkspace& step) const {
  step.segments.clear();
  step.tail_begin = tail_.first_position();
  for (const Segment& segment : segments_) step.segments.push_back(&segment);
  if (growing_) step.segments.push_back(&step.added[0].emplace(*growing_));
  if (const SemanticIndex* sealed = ready_segment(Work::kSeal, position + 1)) {
    step.segments.push_back(&step.added[0].emplace(*sealed));
    step.tail_begin = sealed->end_position();
  }
  if (const SemanticIndex* merged = ready_segment(Work::kMerge, position + 1)) {
    const SegmentBuild& build = *builds_[at(Work::kMerge)];
    const auto first = step.segments.begin() + first_source(build);
    *first = &step.added[1].emplace(*merged);
    step.segments.erase(first + 1, first + static_cast<std::ptrdiff_t>(build.source_count()));
  }
}

void HeadCache::set_rows(const PageLayout& layout, std::span<const PagePick> picks, bool values,
                         AttendWorkspace& step) const {
  const std::size_t row_bytes = row_bytes_of(layout.dtype, layout.head_dim);
  const std::size_t offset = values ? layout.page_size * row_bytes : 0;
  step.rows.clear();
  for (const PagePick& pick : picks) {
    const std::byte* page = context_.pool->data(pick.page) + offset;
    for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1) {
      step.rows.push_back(page + std::countr_zero(slots) * row_bytes);
    }
  }
}

void HeadCache::score_near(const float* queries, std::int32_t position,
                           AttendWorkspace& step) const {
  const int group = context_.group, d = context_.head_dim;
  const PageLayout layout = run_layout();
  const std::size_t row_bytes = context_.row_bytes();
  const std::size_t half = layout.page_size * row_bytes;
  step.picks.clear();
  sink_.picks(0, position + 1, step.picks);
  tail_.picks(step.tail_begin, position + 1, step.picks);
  const std::int64_t near = step.near = token_count(step.picks);
  step.logits.resize(near * group);
  verify(step.picks);
  set_rows(layout, step.picks, false, step);
  for (const void* row : step.rows) {  // its value, attended soon
    simd::prefetch(static_cast<const std::byte*>(row) + half, row_bytes);
  }
  simd::kernels().row_logits({step.rows.data(), context_.dtype, near, group, d}, queries,
                             step.logits.data(), near);
  simd::kernels().soft_cap(step.logits.data(), near * group, context_.logit_softcap);
  for (int g = 0; g < group; ++g) {
    step.near_sum[g] = weight_sum(step.logits.data() + g * near, near);
    step.near_lse[g] = step.near_sum[g].log();
  }
}

void HeadCache::turn_queries(SelectRequest& request, AttendWorkspace& step) const {
  const RowFormat& format = step.segments.front()->index().table().format();
  if (!format.has_codes()) return;
  step.turned.resize(static_cast<std::size_t>(request.group) * context_.head_dim);
  step.bias.resize(request.group);
  format.turn(request.queries, request.group, step.turned.data(), step.bias.data());
  request.turned = step.turned.data();
  request.bias = step.bias.data();
}

// Weights of all rows, over the largest of each head.
void HeadCache::weigh(std::int64_t nodes, AttendWorkspace& step) const {
  const simd::Kernels& kernels = simd::kernels();
  const Selection& selection = step.selection;
  const std::int64_t near = step.near, picked = selection.tokens, known = near + picked;
  const int group = context_.group;
  step.weights.assign(known * group, 0.0f);
  step.far_weights.assign(nodes * group, 0.0f);
  for (int g = 0; g < group; ++g) {
    const float* of_picks = selection.logits.data() + g * picked;
    const WeightSum pick_sum = weight_sum(of_picks, picked);
    const bool any_far = selection.far_total[g] > 0.0f;
    const float exact_max = std::max(step.near_sum[g].max, pick_sum.max);
    const float scale = any_far ? std::max(exact_max, selection.far_shift[g]) : exact_max;
    const float far_scale = any_far ? std::exp(selection.far_shift[g] - scale) : 0.0f;
    float* row = step.weights.data() + g * known;
    kernels.add_exp(step.logits.data() + g * near, scale, row, near);
    if (picked > 0) kernels.add_exp(of_picks, scale, row + near, picked);
    step.exact[g] = step.near_sum[g].over(scale) + pick_sum.over(scale);
    step.exact_lse[g] = log_add(step.near_lse[g], pick_sum.log());
    step.total[g] = step.exact[g] + far_scale * selection.far_total[g];
    step.shift[g] = scale;
    if (nodes == 0) continue;
    // What the nodes' sums count of the picked tokens is taken back.
    kernels.axpy(-far_scale, selection.far_share.data() + g * picked, row + near, picked);
    kernels.axpy(far_scale, selection.far_weights.data() + g * nodes,
                 step.far_weights.data() + g * nodes, nodes);
  }
}

void HeadCache::add_values(std::int64_t nodes, float* out, HeadStats& stats,
                           AttendWorkspace& step) const {
  const simd::Kernels& kernels = simd::kernels();
  const int group = context_.group, d = context_.head_dim;
  const auto row_bytes = static_cast<std::int64_t>(context_.row_bytes());
  const PageLayout layout = layout_of(step.segments.front()->index().table());
  const std::int64_t known = step.near + step.selection.tokens;
  std::fill_n(out, group * d, 0.0f);
  verify(step.selection.picks);  // the others were, when they were scored
  set_rows(run_layout(), step.picks, true, step);
  kernels.add_rows({step.rows.data(), context_.dtype, step.near, group, d}, step.weights.data(),
                   known, out);
  set_rows(layout, step.selection.picks, true, step);
  kernels.add_rows({step.rows.data(), layout.dtype, step.selection.tokens, group, d},
                   step.weights.data() + step.near, known, out);
  stats.bytes_read +=
      step.selection.bytes_scanned + (2 * step.near + nodes) * row_bytes +
      step.selection.tokens * static_cast<std::int64_t>(row_bytes_of(layout.dtype, d));
  if (nodes > 0) {
    step.rows.clear();
    for (const Segment* segment : step.segments) {
      for (int node = 0; node < segment->index().node_count(); ++node) {
        step.rows.push_back(segment->node_mean(node));
      }
    }
    kernels.add_rows({step.rows.data(), context_.dtype, nodes, group, d}, step.far_weights.data(),
                     nodes, out);
  }
  for (int g = 0; g < group; ++g) {
    const float share = 1.0f / step.total[g];
    for (int i = 0; i < d; ++i) out[g * d + i] *= share;
  }
}

// One softmax over three kinds of rows: sink and window, picked tokens, and far-field nodes. Their
// values are added up once, with weights that are final.
void HeadCache::decode(const float* queries, std::int32_t position, Out out, HeadStats& stats,
                       StepTrace& trace, AttendWorkspace& step) const {
  const auto start = std::chrono::steady_clock::now();
  const Config& config = *context_.config;
  const int group = context_.group;
  const float largest = largest_of(queries, static_cast<std::int64_t>(group) * context_.head_dim);
  if (!can_estimate(largest, held_, context_.head_dim)) {
    attend_exact(queries, 1, position, out, stats, step);
    ++stats.dense_steps;
    trace = {};
    return;
  }
  const simd::FlushSubnormals flush;
  look_at(position, step);
  score_near(queries, position, step);
  // Those that wait to be sealed are attended besides.
  const std::int64_t waiting = growing_ ? 0 : std::max(0, window_start(position) - step.tail_begin);
  const auto left = [&](std::int64_t budget) {
    return static_cast<int>(std::max<std::int64_t>(0, budget - (step.near - waiting)));
  };
  SelectRequest request;
  request.queries = queries;
  request.group = group;
  turn_queries(request, step);
  request.logit_softcap = context_.logit_softcap;
  request.near_lse = step.near_lse;
  request.budget = left(config.token_budget);
  request.mass_target = config.mass_target;
  request.max_budget = config.mass_target > 0.0 ? left(config.max_token_budget) : request.budget;
  const auto select_start = std::chrono::steady_clock::now();
  step.selector.select(config, step.segments, request, step.selection);
  stats.select_seconds += seconds_since(select_start);

  // Far-field nodes that have weights.
  const auto nodes = static_cast<std::int64_t>(step.selection.far_weights.size()) / group;
  weigh(nodes, step);
  add_values(nodes, out.rows, stats, step);
  for (int g = 0; g < group && out.lse != nullptr; ++g) {
    out.lse[g] = step.shift[g] + std::log(step.total[g]);
  }
  if (config.telemetry != "off") count_step(step, nodes > 0, start, stats);
  if (config.telemetry == "trace") {
    trace = traced(position, step);
  }
}

void HeadCache::count_step(const AttendWorkspace& step, bool any_far,
                           std::chrono::steady_clock::time_point start, HeadStats& stats) const {
  const Selection& selection = step.selection;
  double mass = 0.0;
  for (int g = 0; g < context_.group; ++g) {
    const double share = any_far
                             ? static_cast<double>(step.exact[g]) / step.total[g]
                             : 1.0 / (1.0 + std::exp(selection.rest_lse[g] - step.exact_lse[g]));
    mass += share / context_.group;
    stats.worst_mass = std::min(stats.worst_mass, share);
  }
  stats.mass += mass;
  ++stats.steps;
  stats.widened_steps += selection.is_widened ? 1 : 0;
  stats.doubtful_steps += selection.is_doubtful ? 1 : 0;
  stats.tokens_selected += selection.tokens;
  stats.pages_selected += static_cast<std::int64_t>(selection.picks.size());
  stats.attend_seconds += seconds_since(start);
}

StepTrace HeadCache::traced(std::int32_t position, const AttendWorkspace& step) const {
  StepTrace trace;
  const auto add = [&](std::int32_t first, std::int32_t end, std::vector<std::int32_t>& out) {
    for (std::int32_t p = first; p < std::min(end, position + 1); ++p) out.push_back(p);
  };
  add(0, sink_.end_position(), trace.sink);
  add(step.tail_begin, tail_.end_position(), trace.window);
  step.selector.pages(trace.pages);
  step.selector.selected_positions(step.selection, trace.selected);
  step.selector.far_nodes(step.selection, trace.far_nodes);
  for (int g = 0; g < context_.group; ++g) {
    trace.near_lse.push_back(step.exact_lse[g]);
    trace.total_lse.push_back(log_add(step.selection.rest_lse[g], step.exact_lse[g]));
  }
  return trace;
}

}  // namespace icecache

#include "core/head_cache.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>

#include "icecache/error.h"
#include "index/log_sum.h"
#include "simd/kernels.h"
#include "simd/prefetch.h"

namespace icecache {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

HeadCache::HeadCache(const IndexContext& context, Residency& residency, bool dense)
    : context_(context),
      residency_(&residency),
      dense_(dense),
      sink_(context, 0),
      tail_(context, static_cast<std::int32_t>(context.config->sink_tokens)) {}

HeadCache::HeadCache(const HeadCache& other)
    : context_(other.context_),
      residency_(other.residency_),
      dense_(other.dense_),
      sink_(other.sink_),
      tail_(other.tail_),
      index_(other.index_ ? other.index_->fork() : nullptr),
      built_tokens_(other.built_tokens_),
      next_rebuild_(other.next_rebuild_),
      moments_(other.moments_) {}

std::int32_t HeadCache::length() const {
  return sink_.count() < context_.config->sink_tokens ? sink_.count() : tail_.end_position();
}

std::size_t HeadCache::pages_for(std::int64_t tokens) const {
  const std::int64_t to_sink =
      std::min(tokens, context_.config->sink_tokens - static_cast<std::int64_t>(sink_.count()));
  return sink_.pages_for(to_sink) + tail_.pages_for(tokens - std::max<std::int64_t>(0, to_sink));
}

void HeadCache::append(const TensorView& keys, const TensorView& values, std::int64_t head) {
  const std::int32_t before = sink_.count();
  const std::int64_t to_sink =
      std::clamp<std::int64_t>(context_.config->sink_tokens - before, 0, keys.tokens);
  sink_.append(keys, values, head, 0, to_sink);
  try {
    tail_.append(keys, values, head, to_sink, keys.tokens - to_sink);
  } catch (...) {
    sink_.truncate(before);
    throw;
  }
}

void HeadCache::truncate(std::int32_t length) noexcept {
  take_back(length);
  trace_ = {};
}

void HeadCache::take_back(std::int32_t length) noexcept {
  const std::int32_t sink_end = static_cast<std::int32_t>(context_.config->sink_tokens);
  sink_.truncate(length);
  tail_.truncate(std::max(length, sink_end));
  if (index_) {
    index_->truncate(length);
    if (index_->size() == 0) index_.reset();
  }
  if (rebuild_ != nullptr && !rebuild_->truncate(length)) rebuild_ = nullptr;
}

bool HeadCache::sparse() const {
  return index_ != nullptr && index_->whole() && length() > context_.config->dense_tokens;
}

bool HeadCache::is_short() const {
  return index_ == nullptr && length() + 1 <= context_.config->dense_tokens;
}

template <typename Body>
void HeadCache::with_pages(std::span<const PagePick> picks, HeadStats& stats,
                           const Body& body) const {
  if (context_.config->integrity != "off") {
    for (const PagePick& pick : picks) {
      context_.pool->verify(pick.page, pick.epoch, context_.owner.layer, context_.owner.head);
    }
  }
  std::int64_t first = 0;
  for (std::size_t begin = 0; begin < picks.size();) {
    const std::span<const PagePick> batch =
        picks.subspan(begin, std::min(residency_->capacity(), picks.size() - begin));
    const Residency::Lease lease = residency_->acquire(batch);
    body(lease, batch, first);
    for (const PagePick& pick : batch) first += std::popcount(pick.slots);
    stats.hits += lease.hits;
    stats.misses += lease.misses;
    stats.bytes_moved += lease.bytes_moved;
    begin += batch.size();
  }
}

void HeadCache::attend_picks(std::span<const PagePick> picks, QueryBlock block,
                             const AttentionState& state, HeadStats& stats) const {
  const int d = context_.head_dim, s = static_cast<int>(context_.config->page_size);
  const auto row_bytes = static_cast<std::int64_t>(d * size_of(context_.dtype));
  thread_local std::vector<PageSlots> pages;
  with_pages(picks, stats, [&](const auto& lease, std::span<const PagePick> batch, std::int64_t) {
    pages.clear();
    std::int64_t tokens = 0;
    for (std::size_t i = 0; i < batch.size(); ++i) {
      pages.push_back({lease.page(i), batch[i].slots});
      tokens += std::popcount(batch[i].slots);
    }
    attend_pages(pages, block, {d, s, context_.dtype}, state);
    stats.bytes_read += 2 * row_bytes * tokens;
    if (block.seen != QueryBlock::kAll) block.seen -= tokens;
  });
}

void HeadCache::attend_run(const PageRun& run, QueryBlock block, std::int32_t first_position,
                           const AttentionState& state, HeadStats& stats) const {
  thread_local std::vector<PagePick> picks;
  picks.clear();
  run.picks(first_position + block.tokens, picks);
  block.seen = first_position + 1 - run.first_position();
  attend_picks(picks, block, state, stats);
}

void HeadCache::attend_exact(const float* queries, int tokens, std::int32_t first_position,
                             const AttentionState& state, HeadStats& stats) const {
  const QueryBlock block{queries, tokens, context_.group};
  attend_run(sink_, block, first_position, state, stats);
  if (index_) {
    std::vector<PagePick> picks;
    index_->all_pages(picks);
    attend_picks(picks, block, state, stats);
  }
  attend_run(tail_, block, first_position, state, stats);
}

namespace {

int token_count(std::span<const PagePick> picks) {
  int tokens = 0;
  for (const PagePick& pick : picks) tokens += std::popcount(pick.slots);
  return tokens;
}

}  // namespace

// One softmax over three kinds of rows: sink and window, picked tokens, and far-field nodes. Their
// values are added up once, with weights that are final.
void HeadCache::decode(const float* queries, std::int32_t position, float* out, HeadStats& stats,
                       StepTrace& trace) {
  const auto start = std::chrono::steady_clock::now();
  const Config& config = *context_.config;
  use_rebuild();
  const auto due = std::min(
      position - static_cast<std::int32_t>(config.window_tokens) + 1 - tail_.first_position(),
      tail_.count());
  if (due >= kInsertTogether) {
    try {
      insert(due);
    } catch (const OutOfPages&) {
      // They are attended from the tail until a later step finds room.
    }
    stats.index_seconds += seconds_since(start);
  }
  const simd::Kernels& kernels = simd::kernels();
  const int group = context_.group, d = context_.head_dim;
  const std::size_t row_bytes = d * size_of(context_.dtype), half = config.page_size * row_bytes;
  struct Scratch {
    std::vector<PagePick> picks;
    std::vector<const void*> rows;
    std::vector<float> logits, weights, far_weights;
    Selection selection;
  };
  thread_local Scratch scratch;
  auto& [picks, rows, logits, weights, far_weights, selection] = scratch;
  const auto add_slots = [&](const std::byte* page, std::uint32_t slots) {
    for (; slots != 0; slots &= slots - 1) {
      rows.push_back(page + std::countr_zero(slots) * row_bytes);
    }
  };
  picks.clear();
  sink_.picks(position + 1, picks);
  tail_.picks(position + 1, picks);
  const std::int64_t near = token_count(picks);
  logits.resize(near * group);
  with_pages(picks, stats, [&](const auto& lease, std::span<const PagePick> batch, auto first) {
    rows.clear();
    for (std::size_t i = 0; i < batch.size(); ++i) add_slots(lease.page(i), batch[i].slots);
    for (const void* row : rows) {  // its value, attended soon
      simd::prefetch(static_cast<const std::byte*>(row) + half, row_bytes);
    }
    kernels.row_logits(
        {rows.data(), context_.dtype, static_cast<std::int64_t>(rows.size()), group, d}, queries,
        logits.data() + first, near);
  });
  float near_lse[kMaxGroup];
  for (int g = 0; g < group; ++g) near_lse[g] = log_sum(logits.data() + g * near, near);

  SelectRequest request;
  request.queries = queries;
  request.group = group;
  request.near_lse = near_lse;
  request.budget = std::max(0, static_cast<int>(config.token_budget - near));
  request.mass_target = config.mass_target;
  request.max_budget = config.mass_target > 0.0
                           ? std::max(0, static_cast<int>(config.max_token_budget - near))
                           : request.budget;
  const auto select_start = std::chrono::steady_clock::now();
  index_->select(request, selection);
  stats.select_seconds += seconds_since(select_start);

  const std::int64_t picked = selection.tokens, known = near + picked;
  const std::span<const std::byte> far_values = index_->far_values();
  const auto nodes = static_cast<std::int64_t>(far_values.size() / row_bytes);
  weights.assign(known * group, 0.0f);
  far_weights.assign(nodes * group, 0.0f);
  float exact[kMaxGroup], total[kMaxGroup];
  for (int g = 0; g < group; ++g) {
    const float* of_picks = selection.logits.data() + g * picked;
    const float picked_lse = log_sum(of_picks, picked);
    exact[g] = log_add(near_lse[g], picked_lse);
    const bool any_far = selection.far_total[g] > 0.0f;
    const float scale = any_far ? std::max(exact[g], selection.far_shift[g]) : exact[g];
    const float far_scale = any_far ? std::exp(selection.far_shift[g] - scale) : 0.0f;
    float* row = weights.data() + g * known;
    kernels.add_exp(logits.data() + g * near, scale, row, near);
    if (picked > 0) kernels.add_exp(of_picks, scale, row + near, picked);
    total[g] = std::exp(exact[g] - scale) + far_scale * selection.far_total[g];
    if (nodes == 0) continue;
    // What the nodes' sums count of the picked tokens is taken back.
    kernels.axpy(-far_scale, selection.far_share.data() + g * picked, row + near, picked);
    kernels.axpy(far_scale, selection.far_weights.data() + g * nodes,
                 far_weights.data() + g * nodes, nodes);
  }

  std::fill_n(out, group * d, 0.0f);
  picks.insert(picks.end(), selection.picks.begin(), selection.picks.end());
  with_pages(picks, stats, [&](const auto& lease, std::span<const PagePick> batch, auto first) {
    rows.clear();
    for (std::size_t i = 0; i < batch.size(); ++i) add_slots(lease.page(i) + half, batch[i].slots);
    kernels.add_rows(
        {rows.data(), context_.dtype, static_cast<std::int64_t>(rows.size()), group, d},
        weights.data() + first, known, out);
  });
  stats.bytes_read += selection.bytes_scanned +
                      (near + known) * static_cast<std::int64_t>(row_bytes) +
                      static_cast<std::int64_t>(far_values.size());
  if (nodes > 0) {
    rows.clear();
    for (std::int64_t c = 0; c < nodes; ++c) rows.push_back(far_values.data() + c * row_bytes);
    kernels.add_rows({rows.data(), context_.dtype, nodes, group, d}, far_weights.data(), nodes,
                     out);
  }
  for (int g = 0; g < group; ++g) {
    const float share = 1.0f / total[g];
    for (int i = 0; i < d; ++i) out[g * d + i] *= share;
  }

  if (config.telemetry != "off") {
    double mass = 0.0;
    for (int g = 0; g < group; ++g) {
      const double share = 1.0 / (1.0 + std::exp(selection.rest_lse[g] - exact[g]));
      mass += share / group;
      stats.worst_mass = std::min(stats.worst_mass, share);
    }
    stats.mass += mass;
    ++stats.steps;
    stats.tokens_selected += selection.tokens;
    stats.pages_selected += static_cast<std::int64_t>(selection.picks.size());
    stats.attend_seconds += seconds_since(start);
  }
  if (config.telemetry == "trace") trace = traced(request, selection, position, exact);
}

StepTrace HeadCache::traced(const SelectRequest& request, const Selection& selection,
                            std::int32_t position, const float* near_lse) const {
  StepTrace trace;
  const auto add = [&](const PageRun& run, std::vector<std::int32_t>& out) {
    for (std::int32_t p = run.first_position(); p < std::min(run.end_position(), position + 1); ++p)
      out.push_back(p);
  };
  add(sink_, trace.sink);
  add(tail_, trace.window);
  trace.pages = index_->pages();
  index_->selected_positions(selection, trace.selected);
  index_->far_nodes(selection, trace.far_nodes);
  for (int g = 0; g < request.group; ++g) {
    trace.near_lse.push_back(near_lse[g]);
    trace.total_lse.push_back(log_add(selection.rest_lse[g], near_lse[g]));
  }
  return trace;
}

void HeadCache::gather(std::byte* keys, std::byte* values) const {
  const std::size_t row = context_.head_dim * size_of(context_.dtype);
  sink_.gather(sink_.count(), keys, values);
  std::size_t at = sink_.count() * row;
  if (index_) index_->gather(keys + at, values + at);
  at += indexed_tokens() * row;
  tail_.gather(tail_.count(), keys + at, values + at);
}

void HeadCache::check_integrity() const {
  sink_.check_integrity();
  tail_.check_integrity();
  if (sink_.first_position() != 0 || sink_.count() > context_.config->sink_tokens)
    throw IntegrityError(
        message("sink starts at ", sink_.first_position(), " with ", sink_.count(), " tokens"));
  if (!index_) return;
  index_->check_integrity();
  if (index_->end_position() != tail_.first_position())
    throw IntegrityError(message("index ends at ", index_->end_position(), ", tail starts at ",
                                 tail_.first_position()));
  if (index_->size() != index_->end_position() - context_.config->sink_tokens)
    throw IntegrityError(
        message("index holds ", index_->size(), " tokens up to position ", index_->end_position()));
}

}  // namespace icecache

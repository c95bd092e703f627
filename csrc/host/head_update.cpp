// How a HeadCache's tokens get from the tail into its index.
#include <algorithm>
#include <chrono>
#include <new>

#include "host/head_cache.h"
#include "host/make_index.h"
#include "host/seconds.h"
#include "icecache/error.h"
#include "pages/stored_tokens.h"
#include "simd/flush_subnormals.h"
#include "simd/kernels.h"

namespace icecache {

QueryMoments HeadCache::observed(const float* queries, std::int64_t n) const {
  QueryMoments moments = moments_;
  if (!dense_) moments.observe_counting(queries, n, context_.head_dim);
  return moments;
}

void HeadCache::join_decoded(std::vector<Decoded>& decoded) const {
  if (decoded_.empty()) return;
  decoded.insert(decoded.begin(), decoded_.begin(), decoded_.end());
  std::stable_sort(decoded.begin(), decoded.end(), [](const Decoded& one, const Decoded& other) {
    return one.position < other.position;
  });
}

void HeadCache::observe_until(std::int32_t position) {
  const auto end = std::find_if(decoded_.begin(), decoded_.end(),
                                [&](const Decoded& token) { return token.position >= position; });
  if (std::any_of(decoded_.begin(), end, [](const Decoded& x) { return x.queries != nullptr; })) {
    QueryMoments moments = moments_;
    std::vector<float> rows(static_cast<std::size_t>(context_.group) * context_.head_dim);
    for (auto token = decoded_.begin(); token != end; ++token) {
      if (token->queries == nullptr) continue;
      simd::kernels().to_float(token->queries->data(), context_.dtype, rows.data(), rows.size());
      moments.observe(rows.data(), context_.group, context_.head_dim);
    }
    set_moments(std::move(moments));
  }
  decoded_.erase(decoded_.begin(), end);
}

std::int32_t HeadCache::window_start(std::int32_t position) const {
  return position - static_cast<std::int32_t>(context_.config->window_tokens) + 1;
}

bool HeadCache::build_is_due(bool packs) const {
  if (packs) {  // within prefill_budget, chunks are
    return context_.stored() != context_.dtype && !grows_ && (dense_ || !picks_in_prompts()) &&
           due_tokens(length()) >= seal_tokens();
  }
  if (is_broken()) return true;
  if (stays_whole() || length() + 1 <= context_.config->dense_tokens) return false;
  if (has_in_prompt()) return true;
  const std::int32_t due = window_start(length()) - tail_.first_position();
  return due > 0 && (!has_index() || (!grows_ && due >= seal_tokens()));
}

std::int32_t HeadCache::due_tokens(std::int32_t length) const {
  return std::clamp(window_start(length) - tail_.first_position(), 0, tail_.count());
}

std::size_t HeadCache::pages_for_update(bool packs) const {
  const std::int32_t due = due_tokens(length());
  if (packs && !build_is_due(packs)) return 0;
  if (packs && !dense_) return static_cast<std::size_t>(due / context_.config->page_size + 1);
  if (build_is_due(packs)) return most_build_pages(*context_.config, indexed_tokens() + due);
  return growing_ ? growing_->most_insert_pages(due) : 0;
}

std::size_t HeadCache::pages_for_decode() const {
  const std::int32_t due = due_tokens(length());
  return growing_ && due >= kInsertTogether ? growing_->most_insert_pages(due) : 0;
}

// Sizes of segments at least double from the last one to the first, so that their number is
// logarithmic in the length, and so is how often a token is built into one.
std::size_t HeadCache::first_to_merge(std::size_t end, std::int32_t more) const {
  std::int64_t tokens = more;
  while (end > 0 && segments_[end - 1].size() <= tokens) tokens += segments_[--end].size();
  return end;
}

std::size_t HeadCache::first_to_merge() const {
  if (segments_.empty()) return 0;
  return std::min(first_in_prompt(), first_to_merge(segments_.size() - 1, segments_.back().size()));
}

std::size_t HeadCache::first_in_prompt() const {
  const auto found = std::find_if(segments_.begin(), segments_.end(), [](const Segment& segment) {
    return segment.index().in_prompt();
  });
  return static_cast<std::size_t>(found - segments_.begin());
}

std::optional<RowFormat> HeadCache::format() const {
  if (segments_.empty()) return std::nullopt;
  return segments_.front().index().table().format();
}

void HeadCache::require_pages(std::int32_t tokens) const {
  const auto page_size = static_cast<std::int32_t>(context_.config->page_size);
  const auto least = static_cast<std::size_t>((tokens + page_size - 1) / page_size);
  if (least > context_.pool->free_pages()) {
    throw OutOfPages(message("an index of ", tokens, " tokens needs ", least, " pages, ",
                             context_.pool->free_pages(), " are free"));
  }
}

void HeadCache::build_segment(std::int32_t due) {
  const auto first = static_cast<std::ptrdiff_t>(
      std::min(first_in_prompt(), first_to_merge(segments_.size(), due)));
  const SegmentBuild build(context_,
                           {{segments_.begin() + first, segments_.end()}, tail_, due, format()},
                           moments_, length());
  require_pages(build.end_position() - build.first_position());
  segments_.reserve(segments_.size() + 3);
  Segment segment(build.build());
  segments_.erase(segments_.begin() + first, segments_.end());
  segments_.push_back(std::move(segment));
  tail_.pop_front(due);
}

void HeadCache::pack_segment(std::int32_t due) {
  HeadContext context = context_;
  context.attends_all = context.in_prompt = true;
  const SegmentBuild build(context, {{}, tail_, due, format()}, moments_, length());
  require_pages(due);
  segments_.reserve(segments_.size() + 3);
  segments_.emplace_back(build.build());
  tail_.pop_front(due);
}

void HeadCache::build_growing(std::int32_t due) {
  const std::int32_t before = growing_ ? growing_->size() : 0, count = before + due;
  require_pages(count);
  const bool rounds = context_.stored() == DType::kInt8;
  StoredTokens tokens(context_, count, tail_.first_position() - before,
                      rounds ? moments_.second() : std::vector<double>());
  if (growing_) {
    tokens.add_rows(growing_->table().format(), before, [&](std::byte* keys, std::byte* values) {
      growing_->table().gather(keys, values);
    });
  }
  tokens.add(tail_, due);
  std::unique_ptr<GrowingIndex> fresh = make_growing_index(context_);
  fresh->build(tokens.block(), moments_);
  growing_ = std::move(fresh);
  tail_.pop_front(due);
}

void HeadCache::insert(std::int32_t due, std::vector<std::byte>& moving) {
  const std::size_t bytes = due * context_.row_bytes();
  moving.resize(2 * bytes);
  std::byte *keys = moving.data(), *values = keys + bytes;
  tail_.gather(due, keys, values);
  const std::int32_t before = growing_->size();
  const TokenBlock tokens{keys, values, due, tail_.first_position()};
  try {
    growing_->insert(tokens);
  } catch (...) {
    tail_.pop_front(growing_->size() - before);
    throw;
  }
  tail_.pop_front(due);
}

void HeadCache::update_index(bool packs, HeadStats& stats) {
  const std::int32_t due = due_tokens(length());
  const bool builds = build_is_due(packs);
  if (!builds && (packs || !growing_ || due == 0)) return;
  const auto start = std::chrono::steady_clock::now();
  const simd::FlushSubnormals flush;
  try {
    if (builds && packs && !dense_) {
      pack_segment(due);
    } else if (builds) {
      grows_ ? build_growing(due) : build_segment(due);
    } else {
      std::vector<std::byte> moving;
      insert(due, moving);
    }
  } catch (const OutOfPages&) {
    // The tail still holds what the index could not take; the next step tries again.
  }
  stats.index_seconds += seconds_since(start);
}

std::int32_t HeadCache::due_work(Work work, std::int32_t length) const {
  if (stays_whole() || grows_) return 0;
  if (builds_[at(work)] != nullptr || length < next_build_[at(work)]) return 0;
  if (work == Work::kSeal) {
    const auto size = static_cast<std::int32_t>(context_.config->page_size);
    const std::int32_t due = due_tokens(length) / size * size;
    if (has_index()) return due >= seal_tokens() ? due : 0;
    return length + 1 > context_.config->dense_tokens ? due : 0;
  }
  const std::size_t first = first_to_merge();
  if (first >= segments_.size() || (first + 1 == segments_.size() && !has_in_prompt())) return 0;
  return segments_.back().end_position() - segments_[first].first_position();
}

std::shared_ptr<SegmentBuild> HeadCache::make_build(Work work, std::int32_t length,
                                                    std::int32_t ready_at) {
  const std::int32_t tokens = due_work(work, length);
  if (tokens == 0) return nullptr;
  segments_.reserve(segments_.size() + 2);
  if (work == Work::kSeal) {
    SegmentBuild::Sources sources{{}, tail_, tokens, format()};
    return std::make_shared<SegmentBuild>(context_, std::move(sources), moments_, ready_at);
  }
  const auto first = segments_.begin() + static_cast<std::ptrdiff_t>(first_to_merge());
  SegmentBuild::Sources sources{{first, segments_.end()}, std::nullopt, 0, format()};
  return std::make_shared<SegmentBuild>(context_, std::move(sources), moments_, ready_at);
}

void HeadCache::start_build(Work work, std::shared_ptr<SegmentBuild> build) noexcept {
  next_build_[at(work)] = build->ready_at();
  builds_[at(work)] = std::move(build);
}

bool HeadCache::build_is_ready(Work work, std::int32_t length) const {
  const std::shared_ptr<SegmentBuild>& build = builds_[at(work)];
  return build != nullptr && length >= build->ready_at();
}

const SemanticIndex* HeadCache::ready_segment(Work work, std::int32_t length) const {
  return build_is_ready(work, length) ? builds_[at(work)]->result().get() : nullptr;
}

std::ptrdiff_t HeadCache::first_source(const SegmentBuild& build) const {
  std::ptrdiff_t number = 0;
  while (segments_[number].first_position() != build.first_position()) ++number;
  return number;
}

void HeadCache::drop_builds() noexcept {
  for (std::shared_ptr<SegmentBuild>& build : builds_) build = nullptr;
}

std::size_t HeadCache::build_pages() const {
  std::size_t pages = 0;
  for (const std::shared_ptr<SegmentBuild>& build : builds_) {
    if (build != nullptr && build->result() != nullptr)
      pages += build->result()->table().used_pages();
  }
  return pages;
}

void HeadCache::use_builds(std::int32_t length, HeadStats& stats) noexcept {
  for (const Work work : kWorks) {
    if (!build_is_ready(work, length)) continue;
    const std::shared_ptr<SegmentBuild> build = std::exchange(builds_[at(work)], nullptr);
    if (build->result() == nullptr) {  // pages or memory ran out
      postpone_build(work, length + seal_tokens());
      continue;
    }
    Segment segment(build->result());
    if (work == Work::kSeal) {
      tail_.pop_front(segment.size());
      segments_.push_back(std::move(segment));
      ++stats.seals;
    } else {
      const auto first = segments_.begin() + first_source(*build);
      *first = std::move(segment);
      segments_.erase(first + 1, first + static_cast<std::ptrdiff_t>(build->source_count()));
      ++stats.merges;
    }
  }
}

}  // namespace icecache

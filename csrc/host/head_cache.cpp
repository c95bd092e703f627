#include "host/head_cache.h"

#include <algorithm>
#include <utility>

#include "host/make_index.h"
#include "icecache/error.h"
#include "simd/flush_subnormals.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// The largest magnitude of a head's rows.
float largest_in(const TensorView& view, std::int64_t head) {
  float largest = 0.0f;
  for (std::int64_t t = 0; t < view.tokens; ++t) {
    largest = std::max(largest, simd::kernels().largest(view.at(head, t), view.dtype,
                                                        static_cast<std::size_t>(view.dim)));
  }
  return largest;
}

}  // namespace

HeadCache::HeadCache(const HeadContext& context, bool dense)
    : context_(context),
      dense_(dense),
      grows_(!dense && icecache::grows(*context.config)),
      sink_(context, 0),
      tail_(context, static_cast<std::int32_t>(context.config->sink_tokens)),
      moments_(context.dtype) {
  context_.attends_all = dense;
}

HeadCache::HeadCache(const HeadCache& other)
    : context_(other.context_),
      dense_(other.dense_),
      grows_(other.grows_),
      sink_(other.sink_),
      tail_(other.tail_),
      growing_(other.growing_ ? other.growing_->fork() : nullptr),
      next_build_{other.next_build_[0], other.next_build_[1]},
      moments_(other.moments_),
      decoded_(other.decoded_),
      held_(other.held_) {
  for (Decoded& token : decoded_) token.stats = {};  // they are the other one's
  for (const Work work : kWorks) {
    if (other.build_is_ready(work, other.length())) builds_[at(work)] = other.builds_[at(work)];
  }
  segments_.reserve(other.segments_.size() + 2);
  segments_ = other.segments_;
}

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
  held_.key = std::max(held_.key, largest_in(keys, head));
  held_.value = std::max(held_.value, largest_in(values, head));
}

HeadCache::Truncation HeadCache::prepare_truncate(std::int32_t length) const {
  Truncation truncation{length, std::nullopt};
  for (const Segment& segment : segments_) {
    if (segment.first_position() < length && length < segment.end_position()) {
      truncation.cut = segment.cut(length);
    }
  }
  return truncation;
}

void HeadCache::truncate(Truncation&& truncation, bool seen) noexcept {
  const std::int32_t length = truncation.length;
  sink_.truncate(length);
  tail_.truncate(std::max(length, static_cast<std::int32_t>(context_.config->sink_tokens)));
  if (growing_) growing_->truncate(length);
  if (growing_ && growing_->size() == 0) growing_ = nullptr;
  while (!segments_.empty() && segments_.back().first_position() >= length) segments_.pop_back();
  if (truncation.cut) segments_.back() = *std::move(truncation.cut);
  for (std::shared_ptr<SegmentBuild>& build : builds_) {
    if (build != nullptr && length < build->end_position()) build = nullptr;
  }
  while (!decoded_.empty() && decoded_.back().position >= length) decoded_.pop_back();
  if (seen) trace_ = {};
}

bool HeadCache::sparse_at(std::int32_t position) const {
  if (dense_ || is_broken() || position + 1 <= context_.config->dense_tokens) return false;
  // Tokens behind the query are in the index: another layer of the model, which shares these keys,
  // has attended for them first.
  if (tail_.first_position() > position + 1) return false;
  const std::size_t first = first_in_prompt();
  if (first < segments_.size() && segments_[first].index().only_holds()) {
    const SemanticIndex* merged = ready_segment(Work::kMerge, position + 1);
    if (merged == nullptr || merged->first_position() > segments_[first].first_position())
      return false;
  }
  return has_index() || ready_segment(Work::kSeal, position + 1) != nullptr;
}

bool HeadCache::is_short() const {
  return !has_index() && length() + 1 <= context_.config->dense_tokens;
}

std::int32_t HeadCache::indexed_tokens() const {
  std::int32_t tokens = growing_ ? growing_->size() : 0;
  for (const Segment& segment : segments_) tokens += segment.size();
  return tokens;
}

std::size_t HeadCache::index_bytes(std::set<const SemanticIndex*>& counted) const {
  std::size_t bytes = growing_ ? growing_->memory_bytes() : 0;
  for (const Segment& segment : segments_) {
    bytes += segment.cut_bytes();
    if (counted.insert(&segment.index()).second) bytes += segment.index().memory_bytes();
  }
  return bytes;
}

HeadStats HeadCache::take_stats(std::int32_t position) noexcept {
  HeadStats sum;
  for (Decoded& token : decoded_) {
    if (token.position < position) sum += std::exchange(token.stats, {});
  }
  return sum;
}

void HeadCache::add_last_stats(HeadStats& sum) const {
  for (const Decoded& token : decoded_) sum += token.stats;
}

std::size_t HeadCache::query_bytes() const {
  std::size_t bytes = moments_.memory_bytes();
  for (const Decoded& token : decoded_) {
    if (token.queries == nullptr) continue;
    bytes += token.queries->size() / static_cast<std::size_t>(token.queries.use_count());
  }
  return bytes;
}

void HeadCache::mark_pages(std::vector<bool>& held) const {
  sink_.mark_pages(held);
  tail_.mark_pages(held);
  for (const Segment& segment : segments_) segment.index().table().mark_pages(held);
  if (growing_) growing_->table().mark_pages(held);
}

void HeadCache::gather(std::byte* keys, std::byte* values) const {
  const std::size_t row = context_.row_bytes();
  sink_.gather(sink_.count(), keys, values);
  std::size_t at = sink_.count() * row;
  for (const Segment& segment : segments_) {
    segment.gather(keys + at, values + at);
    at += segment.size() * row;
  }
  if (growing_) {
    Segment(*growing_).gather(keys + at, values + at);
    at += growing_->size() * row;
  }
  tail_.gather(tail_.count(), keys + at, values + at);
}

void HeadCache::check_integrity() const {
  const simd::FlushSubnormals flush;  // as summaries were made
  sink_.check_integrity();
  tail_.check_integrity();
  if (sink_.first_position() != 0 || sink_.count() > context_.config->sink_tokens)
    throw IntegrityError(
        message("sink starts at ", sink_.first_position(), " with ", sink_.count(), " tokens"));
  auto end = static_cast<std::int32_t>(context_.config->sink_tokens);
  const auto follows = [&](std::int32_t first, std::int32_t size, const char* what) {
    if (first != end)
      throw IntegrityError(message(what, " starts at ", first, ", what is before ends at ", end));
    end += size;
  };
  for (const Segment& segment : segments_) {
    segment.check_integrity();
    follows(segment.first_position(), segment.size(), "segment");
  }
  if (growing_) {
    growing_->check_integrity();
    follows(growing_->first_position(), growing_->size(), "growing index");
  }
  if (has_index() || tail_.count() > 0) follows(tail_.first_position(), 0, "tail");
}

}  // namespace icecache

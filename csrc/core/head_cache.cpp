#include "core/head_cache.h"

#include <algorithm>

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

HeadCache::HeadCache(const IndexContext& context, Residency& residency, bool dense)
    : context_(context),
      residency_(&residency),
      dense_(dense),
      sink_(context, 0),
      tail_(context, static_cast<std::int32_t>(context.config->sink_tokens)),
      moments_(context.dtype) {}

HeadCache::HeadCache(const HeadCache& other)
    : context_(other.context_),
      residency_(other.residency_),
      dense_(other.dense_),
      sink_(other.sink_),
      tail_(other.tail_),
      index_(other.index_ ? other.index_->fork() : nullptr),
      built_tokens_(other.built_tokens_),
      next_rebuild_(other.next_rebuild_),
      moments_(other.moments_),
      held_(other.held_) {}

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

void HeadCache::gather(std::byte* keys, std::byte* values) const {
  const std::size_t row = context_.head_dim * size_of(context_.dtype);
  sink_.gather(sink_.count(), keys, values);
  std::size_t at = sink_.count() * row;
  if (index_) index_->gather(keys + at, values + at);
  at += indexed_tokens() * row;
  tail_.gather(tail_.count(), keys + at, values + at);
}

void HeadCache::check_integrity() const {
  const simd::FlushSubnormals flush;  // as summaries were made
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

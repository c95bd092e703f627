// How a HeadCache's tokens get from the tail into its index.
#include <algorithm>
#include <chrono>
#include <new>

#include "core/head_cache.h"
#include "core/seconds.h"
#include "icecache/error.h"
#include "simd/flush_subnormals.h"

namespace icecache {

QueryMoments HeadCache::observed(const float* queries, std::int64_t n, std::int64_t skipped) const {
  QueryMoments moments = moments_;
  if (!dense_) moments.observe(queries, n, context_.head_dim, skipped);
  return moments;
}

std::int32_t HeadCache::next_window_start() const {
  return length() - static_cast<std::int32_t>(context_.config->window_tokens) + 1;
}

// Built anew when most of the index is not from the last build: the basis and the tree are then
// older than the tokens they serve. Doubling keeps the cost per token constant.
bool HeadCache::has_doubled(std::int32_t more) const {
  return index_ != nullptr && index_->size() + more >= 2 * built_tokens_;
}

bool HeadCache::build_is_due() const {
  if (is_broken()) return true;
  const std::int32_t due = next_window_start() - tail_.first_position();
  if (dense_ || due <= 0 || length() + 1 <= context_.config->dense_tokens) return false;
  return index_ == nullptr || has_doubled(due);
}

std::int32_t HeadCache::due_tokens() const {
  return std::clamp(next_window_start() - tail_.first_position(), 0, tail_.count());
}

std::size_t HeadCache::pages_for_update() const {
  const std::int32_t due = due_tokens();
  if (build_is_due()) return most_build_pages(*context_.config, indexed_tokens() + due);
  return index_ == nullptr ? 0 : most_insert_pages(due);
}

std::size_t HeadCache::pages_for_decode(std::int64_t tokens) const {
  const std::int32_t due = due_tokens();
  const std::int32_t late = rebuild_ == nullptr ? 0 : rebuild_->due(length());
  // A step of several tokens gives the rebuild what each of them inserts.
  return most_insert_pages((due >= kInsertTogether ? due : 0) + late) +
         (late > 0 && tokens > 1 ? most_insert_pages(due) : 0);
}

void HeadCache::build(std::int32_t due) {
  const std::size_t row = context_.head_dim * size_of(context_.dtype);
  const std::int32_t old = indexed_tokens();
  // Asked first: where pages are scarce, every step tries again.
  const auto page_size = static_cast<std::int32_t>(context_.config->page_size);
  const auto least = static_cast<std::size_t>((old + due + page_size - 1) / page_size);
  if (least > context_.pool->free_pages()) {
    throw OutOfPages(message("an index of ", old + due, " tokens needs ", least, " pages, ",
                             context_.pool->free_pages(), " are free"));
  }
  std::vector<std::byte> keys((old + due) * row), values((old + due) * row);
  if (old > 0) index_->gather(keys.data(), values.data());
  tail_.gather(due, keys.data() + old * row, values.data() + old * row);
  std::unique_ptr<SemanticIndex> fresh = make_index(context_);
  fresh->build({keys.data(), values.data(), old + due,
                static_cast<std::int32_t>(context_.config->sink_tokens)},
               moments_);
  index_ = std::move(fresh);
  built_tokens_ = old + due;
  tail_.pop_front(due);
}

void HeadCache::insert(std::int32_t due) {
  thread_local std::vector<std::byte> keys, values;
  const std::size_t bytes = due * context_.head_dim * size_of(context_.dtype);
  keys.resize(bytes);
  values.resize(bytes);
  tail_.gather(due, keys.data(), values.data());
  if (rebuild_ != nullptr) rebuild_->reserve(due);
  TokenBlock tokens{keys.data(), values.data(), due, tail_.first_position()};
  const std::int32_t before = index_->size();
  const auto moved = [&]() noexcept {
    tokens.count = index_->size() - before;
    if (rebuild_ != nullptr) rebuild_->follow(tokens);
    tail_.pop_front(tokens.count);
  };
  try {
    index_->insert(tokens);
  } catch (...) {
    moved();
    throw;
  }
  moved();
}

void HeadCache::update_index(HeadStats& stats) {
  const std::int32_t due = due_tokens();
  if (dense_ || is_short() || (due == 0 && !is_broken())) return;
  const auto start = std::chrono::steady_clock::now();
  const simd::FlushSubnormals flush;
  try {
    if (index_ == nullptr || is_broken() || has_doubled(due)) {
      build(due);
    } else {
      insert(due);
    }
  } catch (const OutOfPages&) {
    // The tail still holds what the index could not take; the next step tries again.
  }
  stats.index_seconds += seconds_since(start);
}

std::shared_ptr<IndexRebuild> HeadCache::make_rebuild(std::int32_t delay,
                                                      std::int32_t ready_after) const {
  if (dense_ || rebuild_ != nullptr || index_ == nullptr || !has_doubled(-delay) ||
      length() < next_rebuild_) {
    return nullptr;
  }
  return std::make_shared<IndexRebuild>(context_, *index_, moments_,
                                        static_cast<std::int32_t>(context_.config->sink_tokens),
                                        length() + ready_after);
}

void HeadCache::start_rebuild(std::shared_ptr<IndexRebuild> rebuild) noexcept {
  next_rebuild_ = rebuild->ready_at();
  rebuild_ = std::move(rebuild);
}

bool HeadCache::rebuild_is_ready() const {
  return rebuild_ != nullptr && length() >= rebuild_->ready_at();
}

void HeadCache::use_rebuild() {
  if (rebuild_ == nullptr || !rebuild_->catch_up(length())) return;
  if (std::unique_ptr<SemanticIndex> fresh = rebuild_->take(); fresh != nullptr) {
    index_ = std::move(fresh);
  }
  // Also where pages ran out: the next try comes when the index has doubled again.
  built_tokens_ = rebuild_->built_tokens();
  rebuild_ = nullptr;
}

}  // namespace icecache

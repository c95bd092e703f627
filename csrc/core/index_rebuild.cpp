#include "core/index_rebuild.h"

#include <algorithm>
#include <new>

#include "icecache/error.h"
#include "simd/flush_subnormals.h"

namespace icecache {
namespace {

constexpr std::int32_t kTokensPerStep = 8;  // of catching up

}  // namespace

IndexRebuild::IndexRebuild(const IndexContext& context, const SemanticIndex& old,
                           const QueryMoments& queries, std::int32_t first_position,
                           std::int32_t ready_at)
    : context_(context),
      snapshot_(old.snapshot()),
      queries_(queries),
      row_bytes_(context.head_dim * size_of(context.dtype)),
      first_position_(first_position),
      count_(old.size()),
      ready_at_(ready_at) {}

void IndexRebuild::run() {
  const simd::FlushSubnormals flush;
  // The old index goes on where pages or memory run out.
  try {
    std::vector<std::byte> keys(count_ * row_bytes_), values(keys.size());
    snapshot_(keys.data(), values.data());
    snapshot_ = nullptr;
    std::unique_ptr<SemanticIndex> fresh = make_index(context_);
    fresh->build({keys.data(), values.data(), count_, first_position_}, queries_);
    fresh_ = std::move(fresh);
  } catch (const OutOfPages&) {
  } catch (const std::bad_alloc&) {
  }
  snapshot_ = nullptr;
}

void IndexRebuild::reserve(std::int32_t tokens) {
  const std::size_t bytes = (followed_ + tokens) * row_bytes_;
  for (std::vector<std::byte>* rows : {&late_keys_, &late_values_}) {
    if (rows->capacity() < bytes) rows->reserve(2 * bytes);
  }
}

void IndexRebuild::follow(const TokenBlock& tokens) noexcept {
  const std::size_t bytes = tokens.count * row_bytes_;
  late_keys_.insert(late_keys_.end(), tokens.keys, tokens.keys + bytes);
  late_values_.insert(late_values_.end(), tokens.values, tokens.values + bytes);
  followed_ += tokens.count;
}

bool IndexRebuild::truncate(std::int32_t position) noexcept {
  const std::int32_t kept = position - (first_position_ + count_);
  if (kept < 0) return false;
  if (kept >= followed_) return true;
  followed_ = kept;
  late_keys_.resize(kept * row_bytes_);
  late_values_.resize(kept * row_bytes_);
  if (inserted_ > kept && fresh_ != nullptr) {  // hence the build is done
    fresh_->truncate(position);
    inserted_ = kept;
  }
  return true;
}

std::int32_t IndexRebuild::due(std::int32_t length) const {
  if (length < ready_at_ || fresh_ == nullptr) return 0;
  const std::int64_t wanted = kTokensPerStep * (std::int64_t{length} - ready_at_ + 1);
  const auto count = static_cast<std::int32_t>(std::min<std::int64_t>(followed_, wanted));
  return std::max(0, count - inserted_);
}

bool IndexRebuild::catch_up(std::int32_t length) {
  if (length < ready_at_) return false;
  if (const std::int32_t count = due(length); count > 0) {
    try {
      fresh_->insert({late_keys_.data() + inserted_ * row_bytes_,
                      late_values_.data() + inserted_ * row_bytes_, count,
                      first_position_ + count_ + inserted_});
      inserted_ += count;
    } catch (const OutOfPages&) {
      fresh_ = nullptr;
    } catch (const std::bad_alloc&) {
      fresh_ = nullptr;
    }
  }
  return fresh_ == nullptr || inserted_ == followed_;
}

std::size_t IndexRebuild::held_pages() const {
  if (fresh_ == nullptr) return 0;
  std::vector<PagePick> pages;
  fresh_->all_pages(pages);
  return pages.size();
}

}  // namespace icecache

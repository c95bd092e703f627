#include "core/index_rebuild.h"

#include <algorithm>

#include "icecache/error.h"

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
  std::vector<std::byte> keys(count_ * row_bytes_), values(keys.size());
  snapshot_(keys.data(), values.data());
  snapshot_ = nullptr;
  std::unique_ptr<SemanticIndex> fresh = make_index(context_);
  try {
    fresh->build({keys.data(), values.data(), count_, first_position_}, queries_);
    fresh_ = std::move(fresh);
  } catch (const OutOfPages&) {
    // The old index goes on.
  }
}

void IndexRebuild::follow(const TokenBlock& tokens) {
  const std::size_t bytes = tokens.count * row_bytes_;
  late_keys_.insert(late_keys_.end(), tokens.keys, tokens.keys + bytes);
  late_values_.insert(late_values_.end(), tokens.values, tokens.values + bytes);
  followed_ += tokens.count;
}

bool IndexRebuild::truncate(std::int32_t position) {
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

bool IndexRebuild::catch_up(std::int32_t length) {
  if (length < ready_at_) return false;
  const std::int32_t count = std::min(kTokensPerStep, followed_ - inserted_);
  if (fresh_ == nullptr || count == 0) return true;
  try {
    fresh_->insert({late_keys_.data() + inserted_ * row_bytes_,
                    late_values_.data() + inserted_ * row_bytes_, count,
                    first_position_ + count_ + inserted_});
  } catch (const OutOfPages&) {
    fresh_ = nullptr;
    return true;
  }
  inserted_ += count;
  return inserted_ == followed_;
}

}  // namespace icecache

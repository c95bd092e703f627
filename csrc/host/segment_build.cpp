#include "host/segment_build.h"

#include <new>
#include <utility>

#include "host/make_index.h"
#include "icecache/error.h"
#include "simd/flush_subnormals.h"

namespace icecache {

SegmentBuild::SegmentBuild(const HeadContext& context, std::vector<Segment> sources,
                           std::optional<PageRun> run, std::int32_t run_tokens,
                           const QueryMoments& queries, std::int32_t ready_at)
    : context_(context),
      sources_(std::move(sources)),
      run_(std::move(run)),
      queries_(queries),
      source_count_(sources_.size()),
      run_tokens_(run_ ? run_tokens : 0),
      first_position_(sources_.empty() ? run_->first_position()
                                       : sources_.front().first_position()),
      count_(run_tokens_),
      ready_at_(ready_at) {
  for (const Segment& source : sources_) count_ += source.size();
}

std::size_t SegmentBuild::most_pages() const {
  return most_build_pages(*context_.config, count_);
}

std::shared_ptr<const SemanticIndex> SegmentBuild::build() const {
  const simd::FlushSubnormals flush;
  const std::size_t row = context_.head_dim * size_of(context_.dtype);
  std::vector<std::byte> keys(count_ * row), values(keys.size());
  std::size_t at = 0;
  for (const Segment& source : sources_) {
    source.gather(keys.data() + at, values.data() + at);
    at += source.size() * row;
  }
  if (run_) run_->gather(run_tokens_, keys.data() + at, values.data() + at);
  std::unique_ptr<SemanticIndex> index = make_index(context_);
  index->build({keys.data(), values.data(), count_, first_position_}, queries_);
  return index;
}

void SegmentBuild::run() {
  // What there is goes on where pages or memory run out.
  try {
    result_ = build();
  } catch (const OutOfPages&) {
  } catch (const std::bad_alloc&) {
  }
  run_.reset();
  sources_.clear();
}

}  // namespace icecache

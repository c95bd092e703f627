#include "core/segment_build.h"

#include <new>
#include <utility>

#include "icecache/error.h"
#include "index/make_index.h"
#include "simd/flush_subnormals.h"

namespace icecache {

SegmentBuild::SegmentBuild(const IndexContext& context, const PageRun& run, std::int32_t count,
                           const QueryMoments& queries, std::int32_t ready_at)
    : context_(context),
      run_(run),
      queries_(queries),
      source_count_(0),
      first_position_(run.first_position()),
      count_(count),
      ready_at_(ready_at) {}

SegmentBuild::SegmentBuild(const IndexContext& context, std::vector<Segment> sources,
                           const QueryMoments& queries, std::int32_t ready_at)
    : context_(context),
      sources_(std::move(sources)),
      queries_(queries),
      source_count_(sources_.size()),
      first_position_(sources_.front().first_position()),
      count_(sources_.back().end_position() - first_position_),
      ready_at_(ready_at) {}

std::size_t SegmentBuild::most_pages() const {
  return most_build_pages(*context_.config, count_);
}

void SegmentBuild::run() {
  const simd::FlushSubnormals flush;
  // What there is goes on where pages or memory run out.
  try {
    const std::size_t row = context_.head_dim * size_of(context_.dtype);
    std::vector<std::byte> keys(count_ * row), values(keys.size());
    if (run_) run_->gather(count_, keys.data(), values.data());
    std::size_t at = 0;
    for (const Segment& source : sources_) {
      source.gather(keys.data() + at, values.data() + at);
      at += source.size() * row;
    }
    std::unique_ptr<SemanticIndex> fresh = make_index(context_);
    fresh->build({keys.data(), values.data(), count_, first_position_}, queries_);
    result_ = std::move(fresh);
  } catch (const OutOfPages&) {
  } catch (const std::bad_alloc&) {
  }
  run_.reset();
  sources_.clear();
}

}  // namespace icecache

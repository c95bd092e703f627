#include "host/segment_build.h"

#include <new>
#include <utility>

#include "host/make_index.h"
#include "icecache/error.h"
#include "pages/stored_tokens.h"
#include "simd/flush_subnormals.h"

namespace icecache {

SegmentBuild::SegmentBuild(const HeadContext& context, Sources sources, const QueryMoments& queries,
                           std::int32_t ready_at)
    : context_(context),
      sources_(std::move(sources)),
      queries_(queries),
      source_count_(sources_.segments.size()),
      first_position_(sources_.segments.empty() ? sources_.run->first_position()
                                                : sources_.segments.front().first_position()),
      count_(sources_.run_tokens),
      ready_at_(ready_at) {
  for (const Segment& source : sources_.segments) count_ += source.size();
}

std::size_t SegmentBuild::most_pages() const {
  return most_build_pages(*context_.config, count_);
}

std::shared_ptr<const SemanticIndex> SegmentBuild::build() const {
  const simd::FlushSubnormals flush;
  const bool rounds = context_.stored() == DType::kInt8 && sources_.run;
  StoredTokens tokens(context_, count_, first_position_,
                      rounds ? queries_.second() : std::vector<double>());
  if (sources_.format) tokens.set_format(*sources_.format);
  for (const Segment& source : sources_.segments) {
    tokens.add_rows(source.index().table().format(), source.size(),
                    [&](std::byte* keys, std::byte* values) { source.gather_rows(keys, values); });
  }
  if (sources_.run) tokens.add(*sources_.run, sources_.run_tokens);
  std::unique_ptr<SemanticIndex> index = make_index(context_);
  index->build(tokens.block(), queries_);
  return index;
}

void SegmentBuild::run() {
  // What there is goes on where pages or memory run out.
  try {
    result_ = build();
  } catch (const OutOfPages&) {
  } catch (const std::bad_alloc&) {
  }
  sources_ = {};
}

}  // namespace icecache

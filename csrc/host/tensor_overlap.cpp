#include "host/tensor_overlap.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace icecache {
namespace {

// Bytes [begin, end).
struct Range {
  std::uintptr_t begin, end;
};

bool by_begin(const Range& a, const Range& b) {
  return a.begin < b.begin;
}

bool is_empty(const TensorView& view) {
  return view.heads == 0 || view.tokens == 0 || view.dim == 0;
}

std::int64_t row_bytes(const TensorView& view) {
  return view.dim * static_cast<std::int64_t>(size_of(view.dtype));
}

// All that a view names, and what lies between. REQUIRES: strides are not negative.
Range hull(const TensorView& view) {
  const auto begin = reinterpret_cast<std::uintptr_t>(view.data);
  const auto last = reinterpret_cast<std::uintptr_t>(view.at(view.heads - 1, view.tokens - 1));
  return {begin, last + static_cast<std::uintptr_t>(row_bytes(view))};
}

// True if the strides alone tell that no two rows of one view share an element.
bool is_plain(const TensorView& view) {
  std::pair<std::int64_t, std::int64_t> inner{view.token_stride, view.tokens};
  std::pair<std::int64_t, std::int64_t> outer{view.head_stride, view.heads};
  if (inner.second == 1 || (outer.second != 1 && outer.first < inner.first)) {
    std::swap(inner, outer);
  }
  const std::int64_t inner_extent = (inner.second - 1) * inner.first + view.dim;
  return (inner.second == 1 || inner.first >= view.dim) &&
         (outer.second == 1 || outer.first >= inner_extent);
}

std::vector<Range> rows_of(std::span<const TensorView> views) {
  std::vector<Range> rows;
  for (const TensorView& view : views) {
    for (std::int64_t h = 0; h < view.heads; ++h) {
      for (std::int64_t t = 0; t < view.tokens && view.dim > 0; ++t) {
        const auto begin = reinterpret_cast<std::uintptr_t>(view.at(h, t));
        rows.push_back({begin, begin + static_cast<std::uintptr_t>(row_bytes(view))});
      }
    }
  }
  std::sort(rows.begin(), rows.end(), by_begin);
  return rows;
}

std::vector<Range> hulls_of(std::span<const TensorView> views) {
  std::vector<Range> hulls;
  hulls.reserve(views.size());
  for (const TensorView& view : views) {
    if (!is_empty(view)) hulls.push_back(hull(view));
  }
  if (!std::is_sorted(hulls.begin(), hulls.end(), by_begin)) {
    std::sort(hulls.begin(), hulls.end(), by_begin);
  }
  return hulls;
}

// REQUIRES: sorted by begin.
bool any_two_meet(std::span<const Range> ranges) {
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[i - 1].end) return true;
  }
  return false;
}

// REQUIRES: both sorted by begin; those of `a` are disjoint.
bool any_meet(std::span<const Range> a, std::span<const Range> b) {
  std::size_t i = 0;
  for (const Range& range : b) {
    while (i < a.size() && a[i].end <= range.begin) ++i;
    if (i < a.size() && a[i].begin < range.end) return true;
  }
  return false;
}

}  // namespace

// Rows are compared one by one only where the hulls of views meet: views of one tensor may be
// interleaved.
bool rows_overlap(std::span<const TensorView> written) {
  const bool all_plain = std::all_of(written.begin(), written.end(), [](const TensorView& view) {
    return is_empty(view) || is_plain(view);
  });
  if (all_plain && !any_two_meet(hulls_of(written))) return false;
  return any_two_meet(rows_of(written));
}

bool rows_overlap(std::span<const TensorView> written, std::span<const TensorView> read) {
  const std::vector<Range> out = hulls_of(written), in = hulls_of(read);
  if (out.empty() || in.empty()) return false;
  const auto end = [](const std::vector<Range>& ranges) {
    std::uintptr_t last = 0;
    for (const Range& range : ranges) last = std::max(last, range.end);
    return last;
  };
  if (out.front().begin >= end(in) || in.front().begin >= end(out)) return false;
  if (!any_two_meet(out) && !any_meet(out, in)) return false;
  return any_meet(rows_of(written), rows_of(read));
}

}  // namespace icecache

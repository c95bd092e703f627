#include "cpu/paged_attention.h"

#include <algorithm>

#include "simd/kernels.h"

namespace icecache {
namespace {

// Query rows that go over all pages together: their queries and outputs stay in the L2 cache.
constexpr int kRowsTogether = 96;

// Slots [begin, end) of a page, end <= 32.
std::uint32_t slot_range(std::int64_t begin, std::int64_t end) {
  const std::uint64_t below_end = (std::uint64_t{1} << end) - 1;
  const std::uint64_t below_begin = (std::uint64_t{1} << begin) - 1;
  return static_cast<std::uint32_t>(below_end & ~below_begin);
}

AttentionState rows_of(const AttentionState& state, std::ptrdiff_t first, int rows) {
  return {state.out + first * state.head_dim, state.max + first, state.sum + first, rows,
          state.head_dim};
}

// Rows of one group x token block against one page at a time.
class PageKernel {
 public:
  PageKernel(const float* queries, const PageLayout& layout, const AttentionState& state)
      : attend_page_(simd::kernels().attend_page), state_(state) {
    args_.queries = queries;
    args_.dtype = layout.dtype;
    args_.head_dim = layout.head_dim;
    args_.page_size = layout.page_size;
    value_offset_ = size_of(layout.dtype) * static_cast<std::size_t>(layout.page_size) *
                    static_cast<std::size_t>(layout.head_dim);
  }

  void operator()(const PageSlots& page, std::ptrdiff_t first_row, int rows) const {
    if (rows <= 0 || page.slots == 0) return;
    simd::PageArgs args = args_;
    args.queries += first_row * args.head_dim;
    args.keys = page.page;
    args.values = page.page + value_offset_;
    args.rows = rows;
    args.slots = page.slots;
    attend_page_(args, rows_of(state_, first_row, rows));
  }

 private:
  void (*attend_page_)(const simd::PageArgs&, const AttentionState&);
  simd::PageArgs args_;
  std::size_t value_offset_ = 0;
  AttentionState state_;
};

}  // namespace

void attend_pages(std::span<const PageSlots> pages, const float* queries, const PageLayout& layout,
                  const AttentionState& state) {
  const PageKernel attend(queries, layout, state);
  for (int first = 0; first < state.group; first += kRowsTogether) {
    const int rows = std::min(kRowsTogether, state.group - first);
    for (const PageSlots& page : pages) attend(page, first, rows);
  }
}

void attend_causal_run(const CausalRun& run, const QueryBlock& block, const PageLayout& layout,
                       const AttentionState& state) {
  const PageKernel attend(block.queries, layout, state);
  const std::int64_t page_size = layout.page_size;
  const std::int64_t end_slot = run.offset + run.count;
  const int tokens_together = std::max(1, kRowsTogether / block.group);
  for (int begin = 0; begin < block.tokens; begin += tokens_together) {
    const int end = std::min(begin + tokens_together, block.tokens);
    for (std::int64_t slot = 0; slot < end_slot; slot += page_size) {
      const std::byte* page = run.pages[static_cast<std::size_t>(slot / page_size)];
      const std::int64_t from = std::max<std::int64_t>(run.offset - slot, 0);
      const std::int64_t to = std::min(end_slot - slot, page_size);
      // Slot s of this page stands at `position` + s; query t sees slots up to seen(t).
      const std::int64_t position = run.first_position - run.offset + slot;
      const auto seen = [&](std::int64_t t) { return block.first_position + t - position + 1; };
      if (seen(end - 1) <= from) break;  // later pages are later still
      // The causal edge, query by query, then the queries that see all of the page together.
      int t = begin;
      for (; t < end && seen(t) < to; ++t) {
        if (seen(t) <= from) continue;
        attend({page, slot_range(from, seen(t))}, static_cast<std::ptrdiff_t>(t) * block.group,
               block.group);
      }
      attend({page, slot_range(from, to)}, static_cast<std::ptrdiff_t>(t) * block.group,
             (end - t) * block.group);
    }
  }
}

}  // namespace icecache

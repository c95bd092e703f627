#include "cpu/paged_attention.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "simd/kernels.h"

namespace icecache {
namespace {

// Query rows that go over all tokens together: their queries and outputs stay in the L2 cache, and
// the transposition of a block's keys serves all of them.
constexpr int kRowsTogether = 192;

struct RowPointers {
  const void* keys[simd::kMaxBlock];
  const void* values[simd::kMaxBlock];
  int count = 0;
};

// The tokens of a list of pages, in order, block by block.
class Tokens {
 public:
  Tokens(std::span<const PageSlots> pages, const PageLayout& layout)
      : pages_(pages),
        row_bytes_(row_bytes_of(layout.dtype, layout.head_dim)),
        value_offset_(row_bytes_ * static_cast<std::size_t>(layout.page_size)),
        slots_(pages.empty() ? 0 : pages.front().slots) {}

  // Empty at the end.
  void next(RowPointers& block) {
    block.count = 0;
    while (block.count < simd::kMaxBlock && page_ < pages_.size()) {
      if (slots_ == 0) {
        if (++page_ < pages_.size()) slots_ = pages_[page_].slots;
        continue;
      }
      const std::byte* key = pages_[page_].page + std::countr_zero(slots_) * row_bytes_;
      slots_ &= slots_ - 1;
      block.keys[block.count] = key;
      block.values[block.count] = key + value_offset_;
      ++block.count;
    }
  }

 private:
  std::span<const PageSlots> pages_;
  std::size_t row_bytes_, value_offset_;
  std::size_t page_ = 0;
  std::uint32_t slots_;  // of the page, those to come
};

AttentionState rows_of(const AttentionState& state, std::ptrdiff_t first, int rows) {
  return {state.out + first * state.head_dim, state.max + first, state.sum + first, rows,
          state.head_dim};
}

// Queries [begin, end) of a block. `seen`: scratch. Blocks of tokens begin at multiples of their size in the list: a
// row adds up the same terms in the same order whatever rows are beside it.
void attend_rows(Tokens tokens, const QueryBlock& queries, int begin, int end,
                 const PageLayout& layout, const AttentionState& state, std::vector<int>& seen) {
  const auto attend = simd::kernels().attend_block;
  const int group = queries.group;
  simd::BlockArgs args;
  args.dtype = layout.dtype;
  args.head_dim = layout.head_dim;
  args.softcap = queries.softcap;
  RowPointers blocks[2];
  RowPointers *now = &blocks[0], *later = &blocks[1];
  tokens.next(*now);
  for (std::int64_t first = 0; now->count > 0; first += simd::kMaxBlock, std::swap(now, later)) {
    tokens.next(*later);
    const auto seen_by = [&](int t) { return queries.seen + t - first; };
    if (seen_by(end - 1) <= 0) return;
    const int from =
        begin + static_cast<int>(std::clamp<std::int64_t>(1 - seen_by(begin), 0, end - begin));
    args.keys = now->keys;
    args.values = now->values;
    args.next_keys = later->keys;
    args.next_values = later->values;
    args.next_count = later->count;
    args.count = static_cast<int>(std::min<std::int64_t>(now->count, seen_by(end - 1)));
    seen.clear();
    if (seen_by(from) < args.count) {
      for (int t = from; t < end; ++t) {
        const auto count = static_cast<int>(std::min<std::int64_t>(seen_by(t), args.count));
        seen.insert(seen.end(), static_cast<std::size_t>(group), count);
      }
    }
    const std::ptrdiff_t first_row = static_cast<std::ptrdiff_t>(from) * group;
    args.queries = queries.queries + first_row * layout.head_dim;
    args.bias = queries.bias == nullptr ? nullptr : queries.bias + first_row;
    args.rows = (end - from) * group;
    args.seen = seen.empty() ? nullptr : seen.data();
    attend(args, rows_of(state, first_row, args.rows));
  }
}

}  // namespace

void attend_pages(std::span<const PageSlots> pages, const QueryBlock& block,
                  const PageLayout& layout, const AttentionState& state) {
  const int together = std::max(1, kRowsTogether / block.group);
  std::vector<int> seen;  // stays empty where all queries see all tokens, as one query does
  for (int begin = 0; begin < block.tokens; begin += together) {
    attend_rows(Tokens(pages, layout), block, begin, std::min(begin + together, block.tokens),
                layout, state, seen);
  }
}

}  // namespace icecache

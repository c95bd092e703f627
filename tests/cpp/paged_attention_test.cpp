// Attention over pages against the naive reference.
#include "cpu/paged_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "reference.h"
#include "simd/kernels.h"

namespace icecache::paged_attention_test {
namespace {

// N tokens in order of position from slot `offset` on; slots not in use are 0xff bytes (NaN).
class PagedTokens {
 public:
  PagedTokens(std::int64_t count, int offset, const PageLayout& layout, unsigned seed)
      : layout_(layout), offset_(offset) {
    const std::int64_t s = layout.page_size, d = layout.head_dim;
    const std::size_t row = static_cast<std::size_t>(d) * size_of(layout.dtype);
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    storage_.resize(static_cast<std::size_t>((offset + count + s - 1) / s));
    for (auto& page : storage_) page.assign(2 * static_cast<std::size_t>(s) * row, std::byte{0xff});
    keys_.resize(static_cast<std::size_t>(count * d));
    values_.resize(keys_.size());
    for (std::int64_t i = 0; i < count; ++i) {
      std::byte* page = storage_[static_cast<std::size_t>((offset + i) / s)].data();
      const std::size_t slot = static_cast<std::size_t>((offset + i) % s);
      float* rows[2] = {&keys_[i * d], &values_[i * d]};
      for (int part = 0; part < 2; ++part) {
        std::byte* at = page + (static_cast<std::size_t>(part * s) + slot) * row;
        for (int j = 0; j < d; ++j) rows[part][j] = normal(random);
        const simd::Kernels& k = simd::scalar_kernels();
        k.from_float(rows[part], at, layout.dtype, static_cast<std::size_t>(d));
        k.to_float(at, layout.dtype, rows[part], static_cast<std::size_t>(d));
      }
    }
    for (const auto& page : storage_) pages_.push_back(page.data());
  }

  std::span<const std::byte* const> pages() const { return pages_; }
  // All tokens.
  std::vector<PageSlots> run() const {
    std::vector<PageSlots> picks;
    const std::int64_t s = layout_.page_size;
    for (std::size_t p = 0; p < pages_.size(); ++p) {
      const std::int64_t base = static_cast<std::int64_t>(p) * s;
      std::uint32_t slots = 0;
      for (std::int64_t i = 0; i < s; ++i) {
        if (base + i >= offset_ && base + i < offset_ + tokens().count) slots |= 1u << i;
      }
      picks.push_back({pages_[p], slots});
    }
    return picks;
  }
  reference::Tokens tokens() const {
    return {keys_.data(), values_.data(),
            static_cast<std::int64_t>(keys_.size()) / layout_.head_dim, layout_.head_dim};
  }

 private:
  PageLayout layout_;
  int offset_;
  std::vector<std::vector<std::byte>> storage_;
  std::vector<const std::byte*> pages_;
  std::vector<float> keys_, values_;
};

struct State {
  State(int rows, int dim)
      : out(static_cast<std::size_t>(rows * dim)),
        max(static_cast<std::size_t>(rows)),
        sum(static_cast<std::size_t>(rows)),
        view{out.data(), max.data(), sum.data(), rows, dim} {
    view.clear();
  }
  std::vector<float> out, max, sum;
  AttentionState view;
};

std::vector<float> random_queries(int rows, int dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> queries(static_cast<std::size_t>(rows * dim));
  for (float& x : queries) x = normal(random) / std::sqrt(static_cast<float>(dim));
  return queries;
}

void expect_matches(const State& state, const reference::Attention& expected) {
  std::vector<float> out(state.out.size());
  finish(state.view, out.data());
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected.out[i], 2e-5) << i;
  for (int r = 0; r < state.view.group; ++r) {
    const std::size_t i = static_cast<std::size_t>(r);
    if (std::isinf(expected.lse[i])) {
      ASSERT_EQ(state.view.lse(r), -std::numeric_limits<float>::infinity()) << "row " << r;
    } else {
      ASSERT_NEAR(state.view.lse(r), expected.lse[i], 2e-5) << "row " << r;
    }
  }
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

TEST(PagedAttentionTest, WholeAndPartialPagesEqualTheReference) {
  for (const int s : {8, 16, 32}) {
    for (const DType dtype : kDTypes) {
      for (const int count : {0, 1, s - 1, s, s + 1, 5 * s + 3}) {
        for (const int group : {1, 3, 4, 8, 16, 100}) {
          const PageLayout layout{40, s, dtype};
          const PagedTokens paged(count, 0, layout, 11);
          const std::vector<float> queries = random_queries(group, 40, 12);
          std::vector<PageSlots> picks;
          std::vector<bool> subset(static_cast<std::size_t>(count));
          std::mt19937 random(13);
          for (std::size_t p = 0; p < paged.pages().size(); ++p) {
            std::uint32_t slots = p % 2 == 0 ? 0xffffffffu : static_cast<std::uint32_t>(random());
            for (int i = 0; i < s; ++i) {
              const std::size_t token = p * static_cast<std::size_t>(s) + i;
              if (token >= subset.size()) {
                slots &= ~(1u << i);
              } else {
                subset[token] = (slots >> i & 1) != 0;
              }
            }
            if (s < 32) slots &= (1u << s) - 1;
            picks.push_back({paged.pages()[p], slots});
          }
          State state(group, 40);
          attend_pages(picks, {queries.data(), 1, group}, layout, state.view);
          expect_matches(state, reference::attend(queries.data(), group, paged.tokens(), subset));
          if (HasFatalFailure()) FAIL() << "S " << s << " N " << count << " G " << group;
        }
      }
    }
  }
}

TEST(PagedAttentionTest, CausalAttentionEqualsTheReference) {
  for (const int s : {8, 16, 32}) {
    for (const int offset : {0, 3, s - 1}) {
      for (const int count : {0, 1, s - 1, s, s + 1, 3 * s + 5, 200}) {
        for (const auto& [tokens, group] :
             {std::pair{1, 1}, {2, 16}, {s, 3}, {70, 3}, {s + 1, 4}, {7, 8}}) {
          const PageLayout layout{24, s, kDTypes[(count + group) % 3]};
          const PagedTokens paged(count, offset, layout, 21);
          const std::vector<float> queries = random_queries(tokens * group, 24, 22);
          // Queries before, across, at the end of and behind the run.
          for (const std::int64_t first : {-5, 0, count / 2, count - tokens, count + 4}) {
            State state(tokens * group, 24);
            attend_pages(paged.run(), {queries.data(), tokens, group, first + 1}, layout,
                         state.view);
            expect_matches(state, reference::attend_causal(queries.data(), tokens, group, first,
                                                           paged.tokens()));
            if (HasFatalFailure()) {
              FAIL() << "S " << s << " offset " << offset << " N " << count << " T " << tokens
                     << " G " << group << " first " << first;
            }
          }
        }
      }
    }
  }
}

TEST(PagedAttentionTest, ChunkedPrefillEqualsOneChunk) {
  const PageLayout layout{64, 16, DType::kFloat32};
  const int length = 150, group = 3;
  const PagedTokens paged(length, 0, layout, 31);
  const std::vector<float> queries = random_queries(length * group, 64, 32);
  const reference::Attention expected =
      reference::attend_causal(queries.data(), length, group, 0, paged.tokens());
  for (const int chunk : {1, 16, 17, 64, 150}) {
    State state(length * group, 64);
    for (int first = 0; first < length; first += chunk) {
      const int tokens = std::min(chunk, length - first);
      const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(first) * group;
      const AttentionState part{state.out.data() + row * 64, state.max.data() + row,
                                state.sum.data() + row, tokens * group, 64};
      attend_pages(paged.run(), {queries.data() + row * 64, tokens, group, first + 1}, layout,
                   part);
    }
    expect_matches(state, expected);
    if (HasFatalFailure()) FAIL() << "chunks of " << chunk;
  }
}

TEST(PagedAttentionTest, PartsMergeToTheWhole) {
  const PageLayout layout{32, 8, DType::kBFloat16};
  const PagedTokens paged(64, 0, layout, 41);
  const std::vector<float> queries = random_queries(4, 32, 42);
  State whole(4, 32), first(4, 32), second(4, 32);
  std::vector<PageSlots> picks;
  for (const std::byte* page : paged.pages()) picks.push_back({page, 0xffu});
  attend_pages(std::span(picks).first(3), {queries.data(), 1, 4}, layout, first.view);
  attend_pages(std::span(picks).subspan(3), {queries.data(), 1, 4}, layout, second.view);
  merge(first.view, second.view);
  expect_matches(first, reference::attend(queries.data(), 4, paged.tokens()));
}

}  // namespace
}  // namespace icecache::paged_attention_test

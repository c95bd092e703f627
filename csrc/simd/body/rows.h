// Rows that lie anywhere: row_logits, add_rows. What is read next is on its way meanwhile.
#pragma once

#include "simd/body/tile.h"

namespace icecache::simd {
namespace {

constexpr std::int64_t kRowsAhead = 32;  // of row_logits
constexpr std::int64_t kRowsBlock = 32;  // rows of add_rows that stay in the L1 cache

// logits[g * stride + s] for kQueries queries and the two rows s. bias: [kQueries], or null.
template <typename E, int kQueries>
ICECACHE_INLINE void logit_pair(const float* queries, int dim, const typename E::Element* first,
                                const typename E::Element* second, bool both, const float* bias,
                                float* logits, std::int64_t stride) {
  VecF acc[2][4] = {};
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const VecF a = E::load(first + d);
    const VecF b = E::load(second + d);
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      const VecF q = load(queries + static_cast<std::ptrdiff_t>(g) * dim + d);
      acc[0][g] += q * a;
      acc[1][g] += q * b;
    }
  }
  if (d < dim) {
    const int rest = dim - d;
    const VecF a = E::load_part(first + d, rest);
    const VecF b = E::load_part(second + d, rest);
    for (int g = 0; g < kQueries; ++g) {
      const VecF q = load_part(queries + static_cast<std::ptrdiff_t>(g) * dim + d, rest);
      acc[0][g] += q * a;
      acc[1][g] += q * b;
    }
  }
  Vec4F one = reduce4(acc[0][0], acc[0][1], acc[0][2], acc[0][3]);
  Vec4F two = reduce4(acc[1][0], acc[1][1], acc[1][2], acc[1][3]);
  if (E::kScaled) {
    Vec4F more = {};
    for (int g = 0; g < kQueries; ++g) more[g] = bias == nullptr ? 0.0f : bias[g];
    one = one * scale_of(first, dim) + more;
    two = two * scale_of(second, dim) + more;
  }
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
    logits[g * stride] = one[g];
    if (both) logits[g * stride + 1] = two[g];
  }
}

template <typename E>
void row_logits_of(const RowsArgs& args, const float* queries, float* logits, std::int64_t stride) {
  const std::size_t row_bytes = bytes_of_row<E>(args.head_dim);
  const auto row = [&](std::int64_t i) {
    return static_cast<const typename E::Element*>(args.rows[i]);
  };
  for (std::int64_t i = 0; i < smaller(kRowsAhead, args.count); ++i) {
    prefetch(args.rows[i], row_bytes);
  }
  for (std::int64_t i = 0; i < args.count; i += 2) {
    for (std::int64_t ahead = i + kRowsAhead; ahead < smaller(i + kRowsAhead + 2, args.count);
         ++ahead) {
      prefetch(args.rows[ahead], row_bytes);
    }
    const bool both = i + 1 < args.count;
    const typename E::Element* first = row(i);
    const typename E::Element* second = both ? row(i + 1) : first;
    for (int g = 0; g < args.group; g += 4) {
      const float* q = queries + static_cast<std::ptrdiff_t>(g) * args.head_dim;
      const float* bias = args.bias == nullptr ? nullptr : args.bias + g;
      float* out = logits + g * stride + i;
      switch (smaller(args.group - g, 4)) {
        case 1:
          logit_pair<E, 1>(q, args.head_dim, first, second, both, bias, out, stride);
          break;
        case 2:
          logit_pair<E, 2>(q, args.head_dim, first, second, both, bias, out, stride);
          break;
        case 3:
          logit_pair<E, 3>(q, args.head_dim, first, second, both, bias, out, stride);
          break;
        default:
          logit_pair<E, 4>(q, args.head_dim, first, second, both, bias, out, stride);
          break;
      }
    }
  }
}

void row_logits(const RowsArgs& args, const float* queries, float* logits, std::int64_t stride) {
  with_element(args.dtype,
               [&](auto e) { row_logits_of<decltype(e)>(args, queries, logits, stride); });
}

// Block by block of rows, each of which the columns of the tiles walk over again and again; the
// first walk asks for the next block.
template <typename E>
void add_rows_of(const RowsArgs& args, const float* weights, std::int64_t stride, float* out) {
  const std::size_t row_bytes = bytes_of_row<E>(args.head_dim);
  float scaled[E::kScaled ? kMaxGroup * kRowsBlock : 1];  // weights of a block's elements
  for (std::int64_t i = 0; i < smaller(kRowsBlock, args.count); ++i) {
    prefetch(args.rows[i], row_bytes);
  }
  for (std::int64_t first = 0; first < args.count; first += kRowsBlock) {
    const std::int64_t end = smaller(first + kRowsBlock, args.count);
    const void* const* rows = args.rows + first;
    const int next_count = static_cast<int>(smaller(args.count - end, kRowsBlock));
    TileArgs tile;
    tile.a = weights + first;
    tile.lda = stride;
    tile.depth = static_cast<int>(end - first);
    if (E::kScaled) {
      for (int k = 0; k < tile.depth; ++k) {
        const float scale = scale_of(rows[k], args.head_dim);
        for (int g = 0; g < args.group; ++g) {
          scaled[g * kRowsBlock + k] = tile.a[g * stride + k] * scale;
        }
      }
      tile.a = scaled;
      tile.lda = kRowsBlock;
    }
    tile.c = out;
    tile.ldc = args.head_dim;
    const ScatteredRows<E> here{rows, args.rows + end, next_count, row_bytes};
    outer_product<E>(tile, args.group, args.head_dim, here, Into::kAdd);
  }
}

void add_rows(const RowsArgs& args, const float* weights, std::int64_t stride, float* out) {
  with_element(args.dtype, [&](auto e) { add_rows_of<decltype(e)>(args, weights, stride, out); });
}

}  // namespace
}  // namespace icecache::simd

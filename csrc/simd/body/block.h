// Attention over a block of tokens that lie anywhere in memory: attend_block.
//
// Many rows: keys are transposed once, then logits are outer products over head_dim, which need no
// sums across lanes. A block is as wide as the register tiles, so that the state is read and
// written once for all of its tokens.
#pragma once

#include "simd/body/soft_cap.h"
#include "simd/body/softmax.h"
#include "simd/body/tile.h"

namespace icecache::simd {
namespace {

constexpr int kBlockRows = 96;  // rows whose logits are held at once

// The weights of `rows` query rows: [rows, depth], row stride `stride`.
struct Weights {
  const float* base;
  int stride;
  int depth;
};

// out of rows first_row.. = factor[row] out + weights x values.
template <typename E, typename Values>
ICECACHE_INLINE void add_values(const Weights& weights, const float* factor, int rows,
                                const Values& values, const AttentionState& state, int first_row) {
  TileArgs tile;
  tile.a = weights.base;
  tile.lda = weights.stride;
  tile.depth = weights.depth;
  tile.c = state.out + static_cast<std::ptrdiff_t>(first_row) * state.head_dim;
  tile.ldc = state.head_dim;
  tile.scale = factor;
  outer_product<E>(tile, rows, state.head_dim, values, Into::kScale);
}

// transposed[d * columns + s] = rows[s][d]; columns, a multiple of 4, beyond `count` repeat the
// last row.
ICECACHE_INLINE void transpose_rows(const float* const* rows, int count, int columns, int dim,
                                    float* transposed) {
  for (int s = 0; s < columns; s += 4) {
    for (int d = 0; d < dim; d += 4) {
      Vec4F block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) block[i] = load4(rows[smaller(s + i, count - 1)] + d);
      transpose4(block);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store4(transposed + (d + i) * columns + s, block[i]);
    }
  }
}

// Rows of a block as floats, in a buffer of its own where they are stored otherwise.
template <typename E>
struct FloatBlock {
  const float* rows[kMaxBlock];
  alignas(64) float buffer[kMaxBlock * kMaxHeadDim];

  ICECACHE_INLINE FloatBlock(const void* const* source, int count, int dim) {
    for (int s = 0; s < count; ++s) {
      convert_row<E>(static_cast<const typename E::Element*>(source[s]), buffer + s * dim,
                     static_cast<std::size_t>(dim));
      rows[s] = buffer + s * dim;
    }
  }
};
template <>
struct FloatBlock<F32> {
  const float* rows[kMaxBlock];

  ICECACHE_INLINE FloatBlock(const void* const* source, int count, int) {
    for (int s = 0; s < count; ++s) rows[s] = static_cast<const float*>(source[s]);
  }
};

struct FloatRows {
  const float* const* rows;
  ICECACHE_INLINE const float* operator()(int k, int j) const { return rows[k] + j; }
};

// At most kFewRows rows. Rows that see different numbers of tokens are served one by one.
template <typename E>
ICECACHE_INLINE void attend_few(const BlockArgs& args, int first_row, int rows, int count,
                                const AttentionState& state) {
  typedef typename E::Element Element;
  alignas(64) float logits[kFewRows * kMaxBlock];
  const Element* keys[kMaxBlock];
  for (int s = 0; s < kMaxBlock && s < (count + 3) / 4 * 4; ++s) {
    keys[s] = static_cast<const Element*>(args.keys[smaller(s, count - 1)]);
  }
  const int columns = (count + kWidth - 1) / kWidth * kWidth;
  const float* queries = args.queries + static_cast<std::ptrdiff_t>(first_row) * args.head_dim;
  const std::size_t row_bytes = bytes_of_row<E>(args.head_dim);
  const int next_count = first_row == 0 ? args.next_count : 0;
  for (int s = 0; s < count; s += 4) {
    for (int i = s; i < smaller(s + 4, next_count); ++i) prefetch(args.next_keys[i], row_bytes);
    dot_rows<E>(queries, rows, keys + s, 4, args.head_dim, logits + s, columns);
  }
  float key_scale[E::kScaled ? kMaxBlock : 1], value_scale[E::kScaled ? kMaxBlock : 1];
  for (int s = 0; E::kScaled && s < count; ++s) {
    key_scale[s] = scale_of(keys[s], args.head_dim);
    value_scale[s] = scale_of(args.values[s], args.head_dim);
  }
  float factor[kFewRows];
  for (int r = 0; r < rows; ++r) {
    float* row = logits + r * columns;
    const float bias = args.bias == nullptr ? 0.0f : args.bias[first_row + r];
    for (int s = 0; E::kScaled && s < count; ++s) row[s] = row[s] * key_scale[s] + bias;
    soft_cap(row, count, args.softcap);
    for (int s = count; s < columns; ++s) row[s] = -kInfinity;
    factor[r] = online_softmax(row, columns, state.max + first_row + r, state.sum + first_row + r);
    for (int s = 0; E::kScaled && s < count; ++s) row[s] *= value_scale[s];
  }
  const ScatteredRows<E> values{args.values, args.next_values, next_count, row_bytes};
  add_values<E>({logits, columns, count}, factor, rows, values, state, first_row);
}

template <typename E>
void attend_some(const BlockArgs& args, const AttentionState& state) {
  for (int r = 0; r < args.rows;) {
    const int count = args.seen == nullptr ? args.count : args.seen[r];
    int end = r + 1;
    while (end < args.rows && (args.seen == nullptr || args.seen[end] == count)) ++end;
    attend_few<E>(args, r, end - r, count, state);
    r = end;
  }
}

template <typename E>
void attend_many(const BlockArgs& args, const AttentionState& state) {
  const int dim = args.head_dim, count = args.count;
  const int columns = (count + kWidth - 1) / kWidth * kWidth;
  alignas(64) float transposed[kMaxHeadDim * kMaxBlock];
  alignas(64) float logits[kBlockRows * kMaxBlock];
  {
    const FloatBlock<E> keys(args.keys, count, dim);
    transpose_rows(keys.rows, count, columns, dim, transposed);
  }
  const FloatBlock<E> values(args.values, count, dim);
  for (int first = 0; first < args.rows; first += kBlockRows) {
    const int rows = smaller(kBlockRows, args.rows - first);
    TileArgs tile;
    tile.a = args.queries + static_cast<std::ptrdiff_t>(first) * dim;
    tile.lda = dim;
    tile.depth = dim;
    tile.c = logits;
    tile.ldc = columns;
    outer_product<F32>(tile, rows, columns, StridedRows{transposed, columns}, Into::kOverwrite);
    float factor[kBlockRows];
    for (int r = 0; r < rows; ++r) {
      float* row = logits + r * columns;
      const int seen = args.seen == nullptr ? count : args.seen[first + r];
      const float bias = args.bias == nullptr ? 0.0f : args.bias[first + r];
      for (int s = 0; E::kScaled && s < seen; ++s) row[s] += bias;
      soft_cap(row, seen, args.softcap);
      for (int s = seen; s < columns; ++s) row[s] = -kInfinity;
      factor[r] = online_softmax(row, columns, state.max + first + r, state.sum + first + r);
    }
    add_values<F32>({logits, columns, count}, factor, rows, FloatRows{values.rows}, state, first);
  }
}

void attend_block(const BlockArgs& args, const AttentionState& state) {
  if (args.count <= 0) return;
  with_element(args.dtype, [&](auto e) {
    if (args.rows <= kFewRows) {
      attend_some<decltype(e)>(args, state);
    } else {
      attend_many<decltype(e)>(args, state);
    }
  });
}

}  // namespace
}  // namespace icecache::simd

// Attention over the slots of a page: attend_page.
//
// Slots that take no part are never read: a page's free slots may hold anything, NaN included. The
// pointers of the others are gathered first, so that the work is that of the set slots.
#pragma once

#include "simd/body/softmax.h"
#include "simd/body/tile.h"

namespace icecache::simd {
namespace {

constexpr int kFewRows = 4;       // rows that are cheaper served from the page's own element type
constexpr int kDecodeRows = 16;   // rows up to which keys are not transposed
constexpr int kPrefillRows = 96;  // rows whose logits are held at once
constexpr int kRowStride = kMaxPageSize;

// The set slots of one page: pointers to their rows, K and V.
template <typename E>
struct Rows {
  const typename E::Element* keys[kMaxPageSize];
  const typename E::Element* values[kMaxPageSize];
  int count = 0;   // set slots
  int padded = 0;  // count rounded up to 4; the pointers behind count repeat the last one

  explicit ICECACHE_INLINE Rows(const PageArgs& args) {
    const typename E::Element* k = static_cast<const typename E::Element*>(args.keys);
    const typename E::Element* v = static_cast<const typename E::Element*>(args.values);
    for (int s = 0; s < args.page_size; ++s) {
      if ((args.slots >> s & 1u) == 0) continue;
      keys[count] = k + static_cast<std::ptrdiff_t>(s) * args.head_dim;
      values[count] = v + static_cast<std::ptrdiff_t>(s) * args.head_dim;
      ++count;
    }
    pad();
  }
  Rows() = default;

  void pad() {
    padded = count;
    while (padded % 4 != 0) {
      keys[padded] = keys[count - 1];
      ++padded;
    }
  }
};

// The rows of a page as floats, in a buffer of its own where they are stored otherwise.
template <typename E>
struct FloatRows {
  Rows<F32> rows;
  alignas(64) float keys[kMaxPageSize * kMaxHeadDim];
  alignas(64) float values[kMaxPageSize * kMaxHeadDim];

  ICECACHE_INLINE FloatRows(const Rows<E>& page, int dim) {
    for (int s = 0; s < page.count; ++s) {
      convert_row<E>(page.keys[s], keys + s * dim, static_cast<std::size_t>(dim));
      rows.keys[s] = keys + s * dim;
      convert_row<E>(page.values[s], values + s * dim, static_cast<std::size_t>(dim));
      rows.values[s] = values + s * dim;
    }
    rows.count = page.count;
    rows.pad();
  }
};
template <>
struct FloatRows<F32> {
  const Rows<F32>& rows;
  ICECACHE_INLINE FloatRows(const Rows<F32>& page, int) : rows(page) {}
};

// Logits [rows, kRowStride] to weights, then state = merge(state, weights x values). At most
// kPrefillRows rows; count <= kMaxPageSize values.
template <typename E>
ICECACHE_INLINE void merge_logits(float* logits, int rows, const typename E::Element* const* values,
                                  int count, const AttentionState& state, int first_row) {
  const int dim = state.head_dim;
  const int vectors = (count + kWidth - 1) / kWidth * kWidth;
  float factor[kPrefillRows];
  for (int r = 0; r < rows; ++r) {
    float* row = logits + r * kRowStride;
    for (int s = count; s < vectors; ++s) row[s] = -kInfinity;
    factor[r] = online_softmax(row, vectors, state.max + first_row + r, state.sum + first_row + r);
  }
  TileArgs tile;
  tile.a = logits;
  tile.lda = kRowStride;
  tile.depth = count;
  tile.c = state.out + static_cast<std::ptrdiff_t>(first_row) * dim;
  tile.ldc = dim;
  tile.scale = factor;
  const void* rows_of[kMaxPageSize];
  for (int s = 0; s < count; ++s) rows_of[s] = values[s];
  outer_product<E>(tile, rows, dim, ScatteredRows<E>{rows_of, rows_of, count - 1}, Into::kScale);
}

// At most kDecodeRows rows from `first_row` on.
template <typename E>
void attend_few(const PageArgs& args, const Rows<E>& page, const AttentionState& state,
                int first_row, int rows) {
  alignas(64) float logits[kDecodeRows * kRowStride];
  const float* queries = args.queries + static_cast<std::ptrdiff_t>(first_row) * args.head_dim;
  dot_rows<E>(queries, rows, page.keys, page.padded, args.head_dim, logits, kRowStride);
  merge_logits<E>(logits, rows, page.values, page.count, state, first_row);
}

// Any number of rows: keys are transposed once, then logits are outer products over head_dim, which
// need no sums across lanes.
void attend_many(const PageArgs& args, const Rows<F32>& page, const AttentionState& state) {
  const int dim = args.head_dim;
  const int columns = (page.count + kWidth - 1) / kWidth * kWidth;
  alignas(64) float transposed[kMaxHeadDim * kMaxPageSize];
  alignas(64) float logits[kPrefillRows * kRowStride];
  for (int s = 0; s < columns; s += 4) {
    for (int d = 0; d < dim; d += 4) {
      Vec4F block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        block[i] = load4(page.keys[smaller(s + i, page.count - 1)] + d);
      }
      transpose4(block);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store4(transposed + (d + i) * columns + s, block[i]);
    }
  }
  for (int first = 0; first < args.rows; first += kPrefillRows) {
    const int rows = smaller(kPrefillRows, args.rows - first);
    TileArgs tile;
    tile.a = args.queries + static_cast<std::ptrdiff_t>(first) * dim;
    tile.lda = dim;
    tile.depth = dim;
    tile.c = logits;
    tile.ldc = kRowStride;
    outer_product<F32>(tile, rows, columns, StridedRows{transposed, columns}, Into::kOverwrite);
    merge_logits<F32>(logits, rows, page.values, page.count, state, first);
  }
}

template <typename E>
void attend_page_of(const PageArgs& args, const AttentionState& state) {
  const Rows<E> page(args);
  if (page.count == 0) return;
  if (args.rows <= kFewRows) {
    attend_few<E>(args, page, state, 0, args.rows);
    return;
  }
  const FloatRows<E> converted(page, args.head_dim);
  if (args.rows <= kDecodeRows) {
    attend_few<F32>(args, converted.rows, state, 0, args.rows);
  } else {
    attend_many(args, converted.rows, state);
  }
}

void attend_page(const PageArgs& args, const AttentionState& state) {
  with_element(args.dtype, [&](auto e) { attend_page_of<decltype(e)>(args, state); });
}

}  // namespace
}  // namespace icecache::simd

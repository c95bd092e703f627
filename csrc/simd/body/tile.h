// Register tiles: blocks of dot products and of outer products, under every matrix-shaped kernel.
#pragma once

#include "simd/body/element.h"

namespace icecache::simd {
namespace {

// What a tile does with what stands in c: c = ab, c += ab, c = scale[row] c + ab.
enum class Into { kOverwrite, kAdd, kScale };

struct TileArgs {
  const float* a = nullptr;  // [rows, depth], row stride lda
  std::ptrdiff_t lda = 0;
  int depth = 0;
  float* c = nullptr;  // [rows, columns], row stride ldc
  std::ptrdiff_t ldc = 0;
  const float* scale = nullptr;  // [rows], with Into::kScale
};

// sums[r * ldo + s] = q[r] . k[s] over `dim` elements for kRows rows and 4 keys.
template <typename E, int kRows>
ICECACHE_INLINE void dot_tile(const float* q, std::ptrdiff_t ldq,
                              const typename E::Element* const* k, int dim, float* sums,
                              std::ptrdiff_t ldo) {
  VecF acc[kRows][4] = {};
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    VecF row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load(q + r * ldq + d);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const VecF key = E::load(k[s] + d);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][s] += row[r] * key;
    }
  }
  if (d < dim) {
    const int rest = dim - d;
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const VecF key = E::load_part(k[s] + d, rest);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][s] += load_part(q + r * ldq + d, rest) * key;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    store4(sums + r * ldo, reduce4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
  }
}

// sums[row * ldo + s] = q[row] . keys[s]; `keys` holds a multiple of 4 pointers (repeat the last).
template <typename E>
ICECACHE_INLINE void dot_rows(const float* q, int rows, const typename E::Element* const* keys,
                              int padded_keys, int dim, float* sums, std::ptrdiff_t ldo) {
  for (int r = 0; r < rows;) {
    const int count = smaller(rows - r, kDotRows);
    const float* block = q + static_cast<std::ptrdiff_t>(r) * dim;
    for (int s = 0; s < padded_keys; s += 4) {
      float* out = sums + r * ldo + s;
      if (count == kDotRows) {
        dot_tile<E, kDotRows>(block, dim, keys + s, dim, out, ldo);
      } else if (count == 3) {
        dot_tile<E, 3>(block, dim, keys + s, dim, out, ldo);
      } else if (count == 2) {
        dot_tile<E, 2>(block, dim, keys + s, dim, out, ldo);
      } else {
        dot_tile<E, 1>(block, dim, keys + s, dim, out, ldo);
      }
    }
    r += count;
  }
}

// c[kRows, kVectors x W] (of the last vector only `last` columns) from a and the rows b(k), k <
// depth.
template <typename E, int kRows, int kVectors, bool kPart, typename BRow>
ICECACHE_INLINE void outer_tile(const TileArgs& t, const BRow& b, Into into, int last) {
  VecF acc[kRows][kVectors] = {};
  if (into != Into::kOverwrite) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float scale = into == Into::kScale ? t.scale[r] : 1.0f;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const float* c = t.c + r * t.ldc + v * kWidth;
        acc[r][v] = (kPart && v == kVectors - 1 ? load_part(c, last) : load(c)) * scale;
      }
    }
  }
  for (int k = 0; k < t.depth; ++k) {
    const typename E::Element* row = b(k);
    VecF column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      column[v] = kPart && v == kVectors - 1 ? E::load_part(row + v * kWidth, last)
                                             : E::load(row + v * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecF weight = splat(t.a[r * t.lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += weight * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* c = t.c + r * t.ldc + v * kWidth;
      if (kPart && v == kVectors - 1) {
        store_part(c, acc[r][v], last);
      } else {
        store(c, acc[r][v]);
      }
    }
  }
}

// outer_tile over any number of rows, in blocks of nearly equal height.
template <typename E, int kVectors, bool kPart, typename BRow>
void outer_rows(TileArgs t, int rows, const BRow& b, Into into, int last) {
  while (rows > 0) {
    const int blocks = (rows + kTileRows - 1) / kTileRows;
    const int count = (rows + blocks - 1) / blocks;
    switch (count) {
      case 1:
        outer_tile<E, 1, kVectors, kPart>(t, b, into, last);
        break;
      case 2:
        outer_tile<E, 2, kVectors, kPart>(t, b, into, last);
        break;
      case 3:
        outer_tile<E, 3, kVectors, kPart>(t, b, into, last);
        break;
      case 4:
        outer_tile<E, 4, kVectors, kPart>(t, b, into, last);
        break;
      case 5:
        outer_tile<E, smaller(5, kTileRows), kVectors, kPart>(t, b, into, last);
        break;
      default:
        outer_tile<E, kTileRows, kVectors, kPart>(t, b, into, last);
        break;
    }
    rows -= count;
    t.a += count * t.lda;
    t.c += count * t.ldc;
    if (t.scale != nullptr) t.scale += count;
  }
}

// Rows of b that lie side by side: row k, column j.
struct StridedRows {
  const float* base;
  std::ptrdiff_t stride;
  ICECACHE_INLINE const float* operator()(int k, int j) const { return base + k * stride + j; }
};

// Rows of b that lie anywhere. The first access to one asks for that of the next block.
template <typename E>
struct ScatteredRows {
  const void* const* rows;
  const void* const* next;
  int next_count;
  std::size_t row_bytes;
  ICECACHE_INLINE const typename E::Element* operator()(int k, int j) const {
    if (j == 0 && k < next_count) prefetch(next[k], row_bytes);
    return static_cast<const typename E::Element*>(rows[k]) + j;
  }
};

// c[rows, columns] from a[rows, depth] and b: row_at(k, column) points at b[k][column].
template <typename E, typename RowAt>
ICECACHE_INLINE void outer_product(const TileArgs& args, int rows, int columns, const RowAt& row_at,
                                   Into into) {
  for (int column = 0; column < columns;) {
    TileArgs t = args;
    t.c += column;
    const auto b = [&](int k) __attribute__((always_inline)) {
      return row_at(k, column);
    };
    const int left = columns - column;
    if (left >= kTileVectors * kWidth) {
      outer_rows<E, kTileVectors, false>(t, rows, b, into, 0);
      column += kTileVectors * kWidth;
    } else if (kTileVectors > 2 && left >= 2 * kWidth) {
      outer_rows<E, 2, false>(t, rows, b, into, 0);
      column += 2 * kWidth;
    } else if (left >= kWidth) {
      outer_rows<E, 1, false>(t, rows, b, into, 0);
      column += kWidth;
    } else {
      outer_rows<E, 1, true>(t, rows, b, into, left);
      column = columns;
    }
  }
}

}  // namespace
}  // namespace icecache::simd

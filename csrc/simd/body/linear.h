// dot, axpy, matmul.
#pragma once

#include "simd/body/tile.h"

namespace icecache::simd {
namespace {

float dot(const float* a, const float* b, std::size_t n) {
  VecF acc[4] = {};
  std::size_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[v] += load(a + i + v * kWidth) * load(b + i + v * kWidth);
  }
  for (; i + kWidth <= n; i += kWidth) acc[0] += load(a + i) * load(b + i);
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    acc[1] += load_part(a + i, rest) * load_part(b + i, rest);
  }
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

void axpy(float a, const float* x, float* y, std::size_t n) {
  const VecF factor = splat(a);
  std::size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, factor * load(x + i) + load(y + i));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_part(y + i, factor * load_part(x + i, rest) + load_part(y + i, rest), rest);
  }
}

// Blocked over all three dimensions. A panel of b is packed once per block of rows, so that its
// rows lie side by side whatever m is (a power of two would map them all to one cache set).
void matmul(const float* a, const float* b, float* c, std::int64_t n, std::int64_t k,
            std::int64_t m) {
  constexpr std::int64_t kRowBlock = 256;
  constexpr std::int64_t kDepth = 256;
  constexpr std::int64_t kColumns = kTileVectors * kWidth;
  alignas(64) float panel[kDepth * kColumns];
  if (k == 0) {
    for (std::int64_t i = 0; i < n * m; ++i) c[i] = 0.0f;
    return;
  }
  if (n <= kTileRows) {  // each element of b is used once: packing would cost more than it saves
    TileArgs tile;
    tile.a = a;
    tile.lda = k;
    tile.depth = static_cast<int>(k);
    tile.c = c;
    tile.ldc = m;
    outer_product<F32>(tile, static_cast<int>(n), static_cast<int>(m), StridedRows{b, m},
                       Into::kOverwrite);
    return;
  }
  for (std::int64_t row = 0; row < n; row += kRowBlock) {
    const int rows = static_cast<int>(smaller(kRowBlock, n - row));
    for (std::int64_t depth = 0; depth < k; depth += kDepth) {
      const int depths = static_cast<int>(smaller(kDepth, k - depth));
      for (std::int64_t column = 0; column < m; column += kColumns) {
        const int columns = static_cast<int>(smaller(kColumns, m - column));
        for (int i = 0; i < depths; ++i) {
          const float* from = b + (depth + i) * m + column;
          float* to = panel + i * kColumns;
          if (columns == kColumns) {
            __builtin_memcpy(to, from, sizeof(float) * kColumns);
          } else {
            for (int j = 0; j < columns; ++j) to[j] = from[j];
          }
        }
        TileArgs tile;
        tile.a = a + row * k + depth;
        tile.lda = k;
        tile.depth = depths;
        tile.c = c + row * m + column;
        tile.ldc = m;
        outer_product<F32>(tile, rows, columns, StridedRows{panel, kColumns},
                           depth == 0 ? Into::kOverwrite : Into::kAdd);
      }
    }
  }
}

}  // namespace
}  // namespace icecache::simd

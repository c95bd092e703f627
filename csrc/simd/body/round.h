// Queries in the coordinates of a sketch as integers: scale_columns, round_rows.
#pragma once

#include "simd/body/element.h"

namespace icecache::simd {
namespace {

// Added to a float of at most 22 bits, it leaves the nearest integer in the lowest bits.
constexpr float kRounder = 12582912.0f;  // 1.5 x 2^23

typedef std::int8_t VecB __attribute__((vector_size(ICECACHE_SIMD_WIDTH)));

// `left` floats of a row, zeros behind them.
ICECACHE_INLINE VecF load_left(const float* p, int left) {
  return left >= kWidth ? load(p) : load_part(p, left);
}

float scale_columns(float* rows, const float* factors, std::int64_t n, int dims) {
  VecF largest = {};
  for (std::int64_t i = 0; i < n; ++i, rows += dims) {
    for (int j = 0; j < dims; j += kWidth) {
      const VecF x = load_left(rows + j, dims - j) * load_left(factors + j, dims - j);
      if (dims - j >= kWidth) {
        store(rows + j, x);
      } else {
        store_part(rows + j, x, dims - j);
      }
      largest = max(largest, max(x, -x));
    }
  }
  return reduce_max(largest);
}

void round_rows(const RoundRowsArgs& args) {
  const VecI unit = reinterpret_cast<VecI>(splat(kRounder));
  const int dims = args.dims;
  for (std::int64_t i = 0; i < args.n; ++i) {
    const float* row = args.rows + i * dims;
    std::int8_t* out = args.rounded + i * dims;
    VecI above = {}, below = {};
    VecF rest = {};
    for (int j = 0; j < dims; j += kWidth) {
      const int left = dims - j;
      const VecF x = load_left(row + j, left);
      const VecF nearest = x / splat(args.scale) + splat(kRounder);
      const VecI q = reinterpret_cast<VecI>(nearest) - unit;
      above += q > 0 ? q : VecI{};
      below += q < 0 ? q : VecI{};
      rest +=
          (x - splat(args.scale) * (nearest - splat(kRounder))) * load_left(args.mean + j, left) -
          x * load_left(args.zero + j, left);
      const VecB bytes = __builtin_convertvector(q, VecB);
      __builtin_memcpy(out + j, &bytes, static_cast<std::size_t>(smaller(left, kWidth)));
    }
    std::int32_t positive = 0, negative = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      positive += above[lane];
      negative += below[lane];
    }
    args.positive[i] = positive;
    args.negative[i] = negative;
    args.rest[i] = reduce_add(rest);
  }
}

}  // namespace
}  // namespace icecache::simd

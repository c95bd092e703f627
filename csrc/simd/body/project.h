// Rows along a direction: project_rows, power_step.
//
// Rows are short, some tens of floats: those of up to kMostVectors vectors stay in registers, with
// the direction and the sum.
#pragma once

#include "simd/body/linear.h"

namespace icecache::simd {
namespace {

constexpr int kMostVectors = 6;

// A row in registers; its last vector holds `last` floats.
template <int kVectors>
struct ShortRow {
  VecF part[kVectors];

  ICECACHE_INLINE void load_from(const float* p, int last) {
#pragma GCC unroll 6
    for (int v = 0; v + 1 < kVectors; ++v) part[v] = load(p + v * kWidth);
    const float* end = p + (kVectors - 1) * kWidth;
    part[kVectors - 1] = last == kWidth ? load(end) : load_part(end, last);
  }
  ICECACHE_INLINE void store_to(float* p, int last) const {
#pragma GCC unroll 6
    for (int v = 0; v + 1 < kVectors; ++v) store(p + v * kWidth, part[v]);
    store_part(p + (kVectors - 1) * kWidth, part[kVectors - 1], last);
  }
  ICECACHE_INLINE float times(const ShortRow& other) const {
    VecF even = part[0] * other.part[0], odd = {};
#pragma GCC unroll 6
    for (int v = 1; v < kVectors; ++v) {
      if (v % 2 == 1) {
        odd += part[v] * other.part[v];
      } else {
        even += part[v] * other.part[v];
      }
    }
    return reduce_add(even + odd);
  }
};

ICECACHE_INLINE const float* some_row(const SomeRowsArgs& args, std::int64_t i) {
  return args.x + static_cast<std::ptrdiff_t>(args.rows[i]) * args.dim;
}

template <int kVectors>
void project_short(const SomeRowsArgs& args, const float* direction, float* out) {
  const int last = args.dim - (kVectors - 1) * kWidth;
  ShortRow<kVectors> along, row;
  along.load_from(direction, last);
  for (std::int64_t i = 0; i < args.count; i += args.stride) {
    row.load_from(some_row(args, i), last);
    *out++ = row.times(along);
  }
}

template <int kVectors>
float power_short(const SomeRowsArgs& args, const float* direction, float offset, float* next) {
  const int last = args.dim - (kVectors - 1) * kWidth;
  ShortRow<kVectors> along, row, sum;
  along.load_from(direction, last);
  sum.load_from(next, last);
  float total = 0.0f;
  for (std::int64_t i = 0; i < args.count; i += args.stride) {
    row.load_from(some_row(args, i), last);
    const float p = row.times(along) - offset;
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) sum.part[v] += splat(p) * row.part[v];
    total += p;
  }
  sum.store_to(next, last);
  return total;
}

void project_rows(const SomeRowsArgs& args, const float* direction, float* out) {
  switch ((args.dim + kWidth - 1) / kWidth) {
    case 1:
      return project_short<1>(args, direction, out);
    case 2:
      return project_short<2>(args, direction, out);
    case 3:
      return project_short<3>(args, direction, out);
    case 4:
      return project_short<4>(args, direction, out);
    case 5:
      return project_short<5>(args, direction, out);
    case kMostVectors:
      return project_short<kMostVectors>(args, direction, out);
    default:
      for (std::int64_t i = 0; i < args.count; i += args.stride) {
        *out++ = dot(some_row(args, i), direction, static_cast<std::size_t>(args.dim));
      }
  }
}

float power_step(const SomeRowsArgs& args, const float* direction, float offset, float* next) {
  switch ((args.dim + kWidth - 1) / kWidth) {
    case 1:
      return power_short<1>(args, direction, offset, next);
    case 2:
      return power_short<2>(args, direction, offset, next);
    case 3:
      return power_short<3>(args, direction, offset, next);
    case 4:
      return power_short<4>(args, direction, offset, next);
    case 5:
      return power_short<5>(args, direction, offset, next);
    case kMostVectors:
      return power_short<kMostVectors>(args, direction, offset, next);
    default:
      break;
  }
  const auto dim = static_cast<std::size_t>(args.dim);
  float total = 0.0f;
  for (std::int64_t i = 0; i < args.count; i += args.stride) {
    const float p = dot(some_row(args, i), direction, dim) - offset;
    axpy(p, some_row(args, i), next, dim);
    total += p;
  }
  return total;
}

}  // namespace
}  // namespace icecache::simd

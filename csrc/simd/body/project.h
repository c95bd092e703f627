// Rows along a direction: project_rows, power_step.
//
// Rows are short, some tens of floats: those of up to kMostVectors vectors stay in registers, with
// the direction and the sum.
#pragma once

#include "simd/body/linear.h"

namespace icecache::simd {
namespace {

constexpr int kMostVectors = 6;

template <int n>
struct Vectors {
  static constexpr int kCount = n;
};

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

// Calls f with how many vectors a row of dim floats takes; false where these are too many.
template <typename F>
ICECACHE_INLINE bool with_vectors(int dim, const F& f) {
  switch ((dim + kWidth - 1) / kWidth) {
    case 1:
      f(Vectors<1>());
      return true;
    case 2:
      f(Vectors<2>());
      return true;
    case 3:
      f(Vectors<3>());
      return true;
    case 4:
      f(Vectors<4>());
      return true;
    case 5:
      f(Vectors<5>());
      return true;
    case kMostVectors:
      f(Vectors<kMostVectors>());
      return true;
    default:
      return false;
  }
}

void project_rows(const SomeRowsArgs& args, const float* direction, float* out) {
  const bool done = with_vectors(
      args.dim, [&](auto vectors) { project_short<vectors.kCount>(args, direction, out); });
  if (done) return;
  for (std::int64_t i = 0; i < args.count; i += args.stride) {
    *out++ = dot(some_row(args, i), direction, static_cast<std::size_t>(args.dim));
  }
}

float power_step(const SomeRowsArgs& args, const float* direction, float offset, float* next) {
  float total = 0.0f;
  const bool done = with_vectors(args.dim, [&](auto vectors) {
    total = power_short<vectors.kCount>(args, direction, offset, next);
  });
  if (done) return total;
  const auto dim = static_cast<std::size_t>(args.dim);
  for (std::int64_t i = 0; i < args.count; i += args.stride) {
    const float p = dot(some_row(args, i), direction, dim) - offset;
    axpy(p, some_row(args, i), next, dim);
    total += p;
  }
  return total;
}

}  // namespace
}  // namespace icecache::simd

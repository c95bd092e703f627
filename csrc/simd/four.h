// Four floats at once, as every machine has them: for loops outside of the ISA levels.
#pragma once

#include <cstring>

namespace icecache::simd {

using Four = float __attribute__((vector_size(16)));

inline Four load_four(const float* from) {
  Four x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store_four(float* to, Four x) {
  std::memcpy(to, &x, sizeof x);
}

// The sum of four columns of rows [count, stride]. Four sums side by side: none waits for the
// other.
inline Four sum_rows(const float* rows, int count, int stride) {
  Four part[4] = {};
  for (int row = 0; row < count; ++row, rows += stride) part[row % 4] += load_four(rows);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The same of sixteen columns, in one pass over the rows: out [16].
inline void sum_sixteen(const float* rows, int count, int stride, float* out) {
  Four part[2][4] = {};
  for (int row = 0; row < count; ++row, rows += stride) {
    for (int f = 0; f < 4; ++f) part[row % 2][f] += load_four(rows + 4 * f);
  }
  for (int f = 0; f < 4; ++f) store_four(out + 4 * f, part[0][f] + part[1][f]);
}

}  // namespace icecache::simd

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

// out[c] = the sum of column c of rows [count, 4 kFours].
template <int kFours>
void sum_columns(const float* rows, int count, float* out) {
  Four part[2][kFours] = {};
  for (int row = 0; row < count; ++row, rows += 4 * kFours) {
    for (int f = 0; f < kFours; ++f) part[row % 2][f] += load_four(rows + 4 * f);
  }
  for (int f = 0; f < kFours; ++f) store_four(out + 4 * f, part[0][f] + part[1][f]);
}

}  // namespace icecache::simd

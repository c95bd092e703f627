// Sums of exponentials: softmax_stats, add_exp, and the online softmax step of the
// attention kernels.
#pragma once

#include "simd/body/exp.h"

namespace icecache::simd {
namespace {

ICECACHE_INLINE float max_of(const float* x, std::int64_t n) {
  VecF m = splat(-kInfinity);
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) m = max(m, load(x + i));
  float best = reduce_max(m);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

void softmax_stats(const float* x, std::int64_t n, float* max, float* sum) {
  const float best = max_of(x, n);
  *max = best;
  *sum = 0.0f;
  if (best == -kInfinity) return;
  VecF total[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    total[0] += exp(load(x + i) - best);
    total[1] += exp(load(x + i + kWidth) - best);
  }
  for (; i + kWidth <= n; i += kWidth) total[0] += exp(load(x + i) - best);
  float rest = 0.0f;
  for (; i < n; ++i) rest += exp(x[i] - best);
  *sum = reduce_add(total[0] + total[1]) + rest;
}

// exp(x - shift), and 0 for x = -inf whatever the shift is.
ICECACHE_INLINE VecF shifted_exp(VecF x, float shift) {
  const VecF e = exp(x - shift);
  return x == -kInfinity ? VecF{} : e;
}

void add_exp(const float* x, float shift, float* y, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(y + i) + shifted_exp(load(x + i), shift));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_part(y + i, load_part(y + i, rest) + shifted_exp(load_part(x + i, rest), shift), rest);
  }
}

// One step of the online softmax: turns `n` logits (a multiple of W, padded with -inf) into weights
// relative to the new maximum, updates max and sum, and returns the factor of what was summed
// before.
ICECACHE_INLINE float online_softmax(float* logits, int n, float* max, float* sum) {
  const float before = *max;
  const float best = max_of(logits, n);
  const float after = best > before ? best : before;
  if (after == -kInfinity) {  // nothing yet
    for (int i = 0; i < n; i += kWidth) store(logits + i, VecF{});
    return 1.0f;
  }
  const float factor = after == before ? 1.0f : exp(before - after);
  VecF total = {};
  for (int i = 0; i < n; i += kWidth) {
    const VecF weight = exp(load(logits + i) - after);
    store(logits + i, weight);
    total += weight;
  }
  *max = after;
  *sum = *sum * factor + reduce_add(total);
  return factor;
}

}  // namespace
}  // namespace icecache::simd

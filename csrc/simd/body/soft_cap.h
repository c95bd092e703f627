// soft_cap: c tanh(x / c), of logits and of the scores of sketches. A cap of 0 stands for none.
//
// tanh(y) is computed as 1 - 2 / (exp(2 y) + 1). Near 0 that would subtract two nearly equal numbers:
// there it is the odd polynomial that the Cephes library uses in its tanhf. The relative error is at
// most 2e-7. An infinite x gives c with its sign, and NaN stays NaN.
#pragma once

#include "simd/body/exp.h"

namespace icecache::simd {
namespace {

ICECACHE_INLINE VecF soft_cap(VecF x, float cap) {
  constexpr float kNear = 0.625f;
  const VecF y = x / cap;
  const VecF square = y * y;
  VecF p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const VecF near = y + y * square * p;
  const VecF far = 1.0f - 2.0f / (exp(2.0f * y) + 1.0f);
  return cap * (square < kNear * kNear ? near : far);
}

void soft_cap(float* x, std::int64_t n, float cap) {
  if (!(cap > 0.0f)) return;
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, soft_cap(load(x + i), cap));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_part(x + i, soft_cap(load_part(x + i, rest), cap), rest);
  }
}

// Half a VecS.
typedef std::int16_t VecScore __attribute__((vector_size(2 * ICECACHE_SIMD_WIDTH)));

// Scores [n], a multiple of W, of which one of s stands for bias + unit s nats, as those of capped
// logits, of which one stands for capped_bias + unit s: from 0 to s, as no slope is above 1.
ICECACHE_INLINE void cap_scores(std::int16_t* scores, std::int64_t n, float cap, float unit,
                                float bias, float capped_bias) {
  const float per_nat = 1.0f / unit;
  for (std::int64_t i = 0; i < n; i += kWidth) {
    VecScore raw;
    load_bytes(&raw, scores + i);
    const VecF logit = __builtin_convertvector(raw, VecF) * unit + bias;
    VecF capped = (soft_cap(logit, cap) - capped_bias) * per_nat + 0.5f;
    capped = capped > 0.0f ? capped : VecF{};
    capped = capped < static_cast<float>(kMaxScore) ? capped : splat(kMaxScore);
    const VecScore rounded = __builtin_convertvector(capped, VecScore);
    const VecScore result = raw == kNoScore ? raw : rounded;
    store_bytes(scores + i, &result);
  }
}

}  // namespace
}  // namespace icecache::simd

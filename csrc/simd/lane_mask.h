// Which of 64 numbers reach a bound, as bits. SSE2 is the baseline of x86-64, and wider vectors
// gain little here: no level of its own.
#pragma once

#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace icecache::simd {

// Bit i: x[i] >= bound.
inline std::uint64_t lanes_at_least(const std::int16_t* x, std::int16_t bound) {
  std::uint64_t bits = 0;
#ifdef __SSE2__
  const __m128i limit = _mm_set1_epi16(bound);
  for (int i = 0; i < 64; i += 16) {
    const auto below = [&](int at) {
      return _mm_cmplt_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + at)), limit);
    };
    const int lanes = _mm_movemask_epi8(_mm_packs_epi16(below(i), below(i + 8)));
    bits |= static_cast<std::uint64_t>(~lanes & 0xffff) << i;
  }
#else
  for (int i = 0; i < 64; ++i) bits |= static_cast<std::uint64_t>(x[i] >= bound) << i;
#endif
  return bits;
}

}  // namespace icecache::simd

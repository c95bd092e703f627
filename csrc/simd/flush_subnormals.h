// FlushSubnormals: while it lives, this thread takes subnormal floats for zeros and makes none.
//
// Arithmetic with them is up to a hundred times slower. Where the numbers that matter are above
// 2^-100, as those around it see to, what is lost is below a float's rounding. The caller's mode
// comes back with the destructor. Nothing happens on machines that have no such mode or no need.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace icecache::simd {

class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) {
    constexpr unsigned kFlushResults = 0x8000, kZeroInputs = 0x0040;
    _mm_setcsr(before_ | kFlushResults | kZeroInputs);
  }
  ~FlushSubnormals() {
    _mm_setcsr(before_);
  }
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

#if defined(__SSE2__)
 private:
  unsigned before_;
#endif
};

}  // namespace icecache::simd

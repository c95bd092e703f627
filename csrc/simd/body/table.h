// The table of one level.
#pragma once

#include "simd/body/linear.h"
#include "simd/body/page.h"
#include "simd/body/scan.h"

namespace icecache::simd {
namespace {

constexpr Kernels make_table(std::string_view name) {
  return Kernels{name,     to_float,      from_float,    all_finite,  dot,
                 axpy,     matmul,        page_logits,   attend_page, sketch_scan,
                 far_scan, attend_logits, softmax_stats, softmax_exp, add_exp};
}

}  // namespace
}  // namespace icecache::simd

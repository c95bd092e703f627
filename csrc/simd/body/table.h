// The table of one level.
#pragma once

#include "simd/body/block.h"
#include "simd/body/linear.h"
#include "simd/body/project.h"
#include "simd/body/round.h"
#include "simd/body/rows.h"
#include "simd/body/scan.h"
#include "simd/body/score.h"

namespace icecache::simd {
namespace {

constexpr Kernels make_table(std::string_view name) {
  return Kernels{name,          to_float,    from_float,   largest,    all_finite,    dot,
                 axpy,          matmul,      project_rows, power_step, attend_block,  row_logits,
                 add_rows,      sketch_scan, score_mass,   score_rank, scale_columns, round_rows,
                 softmax_stats, add_exp,     soft_cap};
}

}  // namespace
}  // namespace icecache::simd

// The inner loops of the engine, one table of functions per ISA level, chosen once at run time.
//
// Every level computes the same function; levels differ in rounding only (each is tested against
// the scalar one). ICECACHE_SIMD=scalar|avx2|avx512 overrides the choice; a level that the CPU
// lacks is refused with its name. All pointers are non-null unless said otherwise, unaligned, not
// aliased. No function allocates, throws or keeps state; all may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "icecache/attention_state.h"
#include "icecache/types.h"

namespace icecache::simd {

// Slots of one page against a group of queries.
struct PageArgs {
  const float* queries = nullptr;  // [rows, D], scaled
  const void* keys = nullptr;      // [S, D]
  const void* values = nullptr;    // [S, D]; unused by page_logits
  DType dtype = DType::kFloat32;
  int rows = 0;             // queries: G, or G x T in prefill; any number
  int head_dim = 0;         // D, a multiple of 8, at most 256
  int page_size = 0;        // S: 8, 16 or 32
  std::uint32_t slots = 0;  // bit s: slot s takes part
};

// Quantised keys of P pages; see csrc/index/sketch.h for the layout.
//   bits = 4: codes[P][R / 8][S][4]; byte j of a slot in block b: dim 8 b + j in the low nibble,
//             dim 8 b + 4 + j in the high one
//   bits = 8: codes[P][R / 4][S][4]; byte j of a slot in block b: dim 4 b + j
struct SketchScanArgs {
  const std::uint8_t* codes = nullptr;
  const float* queries = nullptr;  // [G, R] per-dim code step already multiplied in
  const float* bias = nullptr;     // [G]
  float* scores = nullptr;         // out [G, score_stride >= P * S]
  std::int64_t score_stride = 0;
  std::int64_t pages = 0;  // P
  int group = 0, rank = 0, page_size = 0, bits = 0;
};

// Far-field weights of C nodes: out[g, c] = log_weight[c] + dq[g].mean[c] +
// min(1, (dq[g]^2 . variance[c]) / 2).
struct FarScanArgs {
  const float* log_weight = nullptr;  // [C], -inf for an empty node (then out is -inf)
  const float* mean = nullptr;        // [C, D]
  const float* variance = nullptr;    // [C, D], >= 0
  const float* dq = nullptr;          // [G, D]
  float* out = nullptr;               // [G, C]
  std::int64_t nodes = 0;
  int group = 0, head_dim = 0;
};

struct Kernels {
  std::string_view name;

  // dst[i] = float(src[i]); dst[i] = round-to-nearest-even(src[i]).
  void (*to_float)(const void* src, DType dtype, float* dst, std::size_t n);
  void (*from_float)(const float* src, void* dst, DType dtype, std::size_t n);
  // False if any of the n elements is NaN or Inf.
  bool (*all_finite)(const void* src, DType dtype, std::size_t n);

  float (*dot)(const float* a, const float* b, std::size_t n);
  // y += a x
  void (*axpy)(float a, const float* x, float* y, std::size_t n);
  // c[n, m] = a[n, k] b[k, m], row-major, overwritten.
  void (*matmul)(const float* a, const float* b, float* c, std::int64_t n, std::int64_t k,
                 std::int64_t m);

  // logits[row, s] = queries[row] . keys[s] for set slots, row stride S; others are left as they
  // are.
  void (*page_logits)(const PageArgs& args, float* logits);
  // Merges the set slots into the state of `rows` queries (state.group == rows).
  void (*attend_page)(const PageArgs& args, const AttentionState& state);

  void (*sketch_scan)(const SketchScanArgs& args);
  void (*far_scan)(const FarScanArgs& args);
  // Merges C values with given logits: logits [G, C] (-inf: left out), values [C, D] fp32.
  void (*attend_logits)(const float* logits, const float* values, std::int64_t count,
                        const AttentionState& state);

  // max and sum of exp(x - max) over n; (-inf, 0) when n == 0 or all are -inf.
  void (*softmax_stats)(const float* x, std::int64_t n, float* max, float* sum);
  // The same, and x becomes exp(x - max); zeros where all are -inf.
  void (*softmax_exp)(float* x, std::int64_t n, float* max, float* sum);
  // y[i] += exp(x[i] - shift); relative error of exp <= 1e-6; exp(-inf) is 0.
  void (*add_exp)(const float* x, float shift, float* y, std::int64_t n);
};

const Kernels& scalar_kernels();
// nullptr where the build or the CPU lacks the level.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The best level of this CPU, or the one ICECACHE_SIMD names. Throws InvalidArgument for a name
// that is unknown or not available here. The choice is made at the first call.
const Kernels& kernels();
// The level of that name, the best one for "". Throws InvalidArgument as kernels() does.
const Kernels& find_kernels(std::string_view name);
// Names of the levels that run here, best first.
std::vector<std::string> available_levels();

}  // namespace icecache::simd

// The inner loops of the engine, one table of functions per ISA level, chosen once at run time.
//
// Every level computes the same function; levels differ in rounding only (each is tested against
// the scalar one). ICECACHE_SIMD=scalar|avx2|avx512|avx512vnni overrides the choice; a level that
// the CPU lacks is refused with its name. All pointers are non-null unless said otherwise,
// unaligned, not aliased. No function allocates, throws or keeps state; all may be called from any
// thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "icecache/types.h"
#include "simd/attention_state.h"

namespace icecache::simd {

// Rows of DType::kInt8 are compared and added up as they are, their scale in a register: a row's
// logit is scale x (query . codes) + bias of the query. What the codes of a key mean, and so how a
// query is turned for them, csrc/simd/row_format.h says.

// Query rows against a block of tokens that lie anywhere in memory. With at most kFewRows rows,
// only tokens that a row sees are read; with more, all are, and must be finite.
constexpr int kMaxBlock = 64;
constexpr int kFewRows = 16;
struct BlockArgs {
  const float* queries = nullptr;       // [rows, D], scaled
  const void* const* keys = nullptr;    // [count] of row_bytes_of(dtype, D) bytes
  const void* const* values = nullptr;  // [count], the same
  const int* seen = nullptr;            // [rows] row r sees the first seen[r] >= 1; null: all
  DType dtype = DType::kFloat32;
  int count = 0;         // at most kMaxBlock
  int rows = 0;          // G, or G x T in prefill; any number
  int head_dim = 0;      // D, a multiple of 8, at most kMaxHeadDim
  float softcap = 0.0f;  // of the logits, as soft_cap
  // The block that comes next, [next_count] each: few rows ask for its memory as they go.
  const void* const* next_keys = nullptr;
  const void* const* next_values = nullptr;
  int next_count = 0;
  const float* bias = nullptr;  // [rows], with kInt8: added to the logits
};

// Rows that lie anywhere in memory, in one element type.
struct RowsArgs {
  const void* const* rows = nullptr;  // [N] of row_bytes_of(dtype, D) bytes
  DType dtype = DType::kFloat32;
  std::int64_t count = 0;       // N
  int group = 0;                // G
  int head_dim = 0;             // D, a multiple of 8, at most kMaxHeadDim
  const float* bias = nullptr;  // [G], with kInt8: added to the logits
};

// A score is the base-2 logarithm of a weight as a fixed-point number: from 0 to kMaxScore, in
// units of 2^coarse / 128. A slot without a token has kNoScore, whose weight is nothing beside that
// of any score. A score or kNoScore, less the offset that score_rank subtracts, still fits 16 bits.
constexpr float kScoreUnit = 0.693147181f / 128.0f;  // nats, of coarse = 0
constexpr std::int16_t kNoScore = -16384;
constexpr std::int16_t kMaxScore = 15000;
constexpr int kMaxCoarse = 7;  // a unit of an octave
// Scores are taken this many at a time.
constexpr int kScoreSlots = 32;

// Quantised queries against the quantised keys of P pages: scores[g, slot] = base[g] + sum over
// dims of query x code, shifted right. See csrc/index/sketch.h for what the codes mean.
//   bits = 4: codes[P][R / 8][S][4]; byte j of a slot in block b: dim 8 b + j in the low nibble,
//             dim 8 b + 4 + j in the high one
//   bits = 8: codes[P][R / 4][S][4]; byte j of a slot in block b: dim 4 b + j
// At most 4 KiB of codes behind the last page are asked for and never read.
// Outputs end with the last page rounded up to kScoreSlots: slots behind it hold no token.
// With a softcap, scores become those of capped logits: a score of s, which stood for a logit of
// bias[g] + unit x s, then stands for capped_bias[g] + unit x s, where capped_bias is bias, capped.
struct SketchScanArgs {
  const std::uint8_t* codes = nullptr;
  const std::uint32_t* masks = nullptr;  // [P] bit s: slot s holds a token
  const std::int8_t* queries = nullptr;  // [G, R] from -127 to 127
  const std::int32_t* base = nullptr;    // [G] such that no score is below 0
  std::int16_t* scores = nullptr;        // out [G, score_stride >= P * S, rounded up]
  std::int16_t* max = nullptr;           // out [G]; kNoScore where there is no token
  float* mass = nullptr;                 // out [P, mass_stride(G)], P rounded up: as ScoreMassArgs
  std::int64_t score_stride = 0;
  std::int64_t pages = 0;  // P
  int group = 0, rank = 0, page_size = 0, bits = 0;
  int shift = 0;  // such that no score exceeds kMaxScore
  int coarse = 0;
  float softcap = 0.0f;                // 0: none, and the following are not read
  float unit = 0.0f;                   // nats
  const float* bias = nullptr;         // [G]
  const float* capped_bias = nullptr;  // [G]
  // The queries' dims: [G, dims]. The first ones of the keys' R count; 0: all.
  int dims = 0;

  constexpr int query_dims() const { return dims == 0 ? rank : dims; }
};

// Floats of one row of a page's masses.
constexpr int mass_stride(int group) {
  return (group + 3) / 4 * 4;
}

// mass[p, g] = sum over the slots of page p of 2^(2^coarse / 128 (scores[g, slot] - max[g])), to
// which kNoScore adds 0. Every term is within 4.1 % below and 2.1 % above, the mean of many within
// 0.1 %.
struct ScoreMassArgs {
  const std::int16_t* scores = nullptr;  // [G, score_stride]
  const std::int16_t* max = nullptr;     // [G] at least the scores
  float* mass = nullptr;                 // out [slots / S, mass_stride(G)]; 0 in columns behind G
  std::int64_t score_stride = 0;
  std::int64_t slots = 0;  // a multiple of kScoreSlots
  int coarse = 0, group = 0, page_size = 0;
};

// rank[slot] = max over g of scores[g, slot] - offset[g], and its maxima: block_max[16 b + j] is
// that of the slots 256 b + 16 i + j, i < 16. With `joins`, which wants offsets from 0 on, ranks above
// kNoScore are `higher` by so much, at most kMaxScore, and those that stand in `rank` stay where they
// are larger.
struct ScoreRankArgs {
  const std::int16_t* scores = nullptr;  // [G, score_stride]
  const std::int16_t* offset = nullptr;  // [G] from -kMaxScore to kMaxScore
  std::int16_t* rank = nullptr;          // out [slots]
  std::int16_t* block_max = nullptr;     // out [ceil(slots / kRankBlock), kRankLanes]
  std::int64_t score_stride = 0;
  std::int64_t slots = 0;  // a multiple of kRankLanes
  int group = 0;
  bool joins = false;
  std::int16_t higher = 0;  // from -kMaxScore to kMaxScore
};
constexpr int kRankLanes = 16;
constexpr int kRankBlock = 256;

// Rows of coordinates [n, dims] as 8-bit integers in units of `scale`: of each row what rounding
// leaves. dims is a multiple of 8; magnitudes are at most 127 units.
struct RoundRowsArgs {
  const float* rows = nullptr;       // [n, dims]
  const float* mean = nullptr;       // [dims]
  const float* zero = nullptr;       // [dims]
  std::int8_t* rounded = nullptr;    // out [n, dims], ties to even
  std::int32_t* positive = nullptr;  // out [n] sum of the rounded ones above 0
  std::int32_t* negative = nullptr;  // out [n] sum of those below
  float* rest = nullptr;             // out [n] sum of (row - scale rounded) mean - row zero
  float scale = 1.0f;
  std::int64_t n = 0;
  int dims = 0;
};

// Some rows of a matrix x [*, dim]: rows[0], rows[stride], rows[2 stride], ... of `count`.
struct SomeRowsArgs {
  const float* x = nullptr;
  const std::int32_t* rows = nullptr;  // [count]
  std::int64_t count = 0;
  std::int64_t stride = 1;
  int dim = 0;
};

struct Kernels {
  std::string_view name;

  // dst[i] = float(src[i]); dst[i] = round-to-nearest-even(src[i]). Of kInt8, `src` is one row of n
  // elements; what makes such rows is in csrc/simd/row_format.h, not here.
  void (*to_float)(const void* src, DType dtype, float* dst, std::size_t n);
  void (*from_float)(const float* src, void* dst, DType dtype, std::size_t n);
  // The largest magnitude of n elements, infinite where one is NaN or Inf; 0 of none.
  float (*largest)(const void* src, DType dtype, std::size_t n);
  // False if any of the n elements is NaN or Inf.
  bool (*all_finite)(const void* src, DType dtype, std::size_t n);

  float (*dot)(const float* a, const float* b, std::size_t n);
  // y += a x
  void (*axpy)(float a, const float* x, float* y, std::size_t n);
  // c[n, m] = a[n, k] b[k, m], row-major, overwritten.
  void (*matmul)(const float* a, const float* b, float* c, std::int64_t n, std::int64_t k,
                 std::int64_t m);

  // out[i] = direction . rows[i * stride], direction [dim].
  void (*project_rows)(const SomeRowsArgs& args, const float* direction, float* out);
  // next += sum of p row over the rows, with p = direction . row - offset; returns the sum of p.
  float (*power_step)(const SomeRowsArgs& args, const float* direction, float offset, float* next);

  // Merges the tokens into the state of `rows` queries (state.group == rows).
  void (*attend_block)(const BlockArgs& args, const AttentionState& state);

  // logits[g * stride + i] = queries[g] . rows[i] (+ bias[g]); queries [G, D].
  void (*row_logits)(const RowsArgs& args, const float* queries, float* logits,
                     std::int64_t stride);
  // out[g] += sum over i of weights[g * stride + i] rows[i]; out [G, D], whatever the bias.
  void (*add_rows)(const RowsArgs& args, const float* weights, std::int64_t stride, float* out);

  void (*sketch_scan)(const SketchScanArgs& args);
  void (*score_mass)(const ScoreMassArgs& args);
  void (*score_rank)(const ScoreRankArgs& args);
  // rows[i, j] *= factors[j] of rows [n, dims]; returns the largest magnitude. dims: multiple of 8.
  float (*scale_columns)(float* rows, const float* factors, std::int64_t n, int dims);
  void (*round_rows)(const RoundRowsArgs& args);

  // max and sum of exp(x - max) over n; (-inf, 0) when n == 0 or all are -inf.
  void (*softmax_stats)(const float* x, std::int64_t n, float* max, float* sum);
  // y[i] += exp(x[i] - shift); relative error of exp <= 1e-6; exp(-inf) is 0.
  void (*add_exp)(const float* x, float shift, float* y, std::int64_t n);
  // x[i] = cap tanh(x[i] / cap); error <= 3e-7 cap; cap 0: as it is.
  void (*soft_cap)(float* x, std::int64_t n, float cap);
};

const Kernels& scalar_kernels();
// nullptr where the build or the CPU lacks the level.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512vnni_kernels();

// The best level of this CPU, or the one ICECACHE_SIMD names. Throws InvalidArgument for a name
// that is unknown or not available here. The choice is made at the first call.
const Kernels& kernels();
// The level of that name, the best one for "". Throws InvalidArgument as kernels() does.
const Kernels& find_kernels(std::string_view name);
// Names of the levels that run here, best first.
std::vector<std::string> available_levels();

}  // namespace icecache::simd

// What follows from the scores of a sketch: score_mass and score_rank.
#pragma once

#include "simd/body/tile.h"

namespace icecache::simd {
namespace {

// 2^x read from the bits of a float that is made as an integer: within 6.2 %, always too large, 4 %
// too large in the mean, which kMeanExcess takes out (Schraudolph, 1999).
constexpr float kBitsPerOctave = 8388608.0f;  // 2^23
constexpr float kBitsOfOne = 127.0f * kBitsPerOctave;
constexpr float kMeanExcess = 1.0406844f;  // mean over f in [0, 1) of (1 + f) / 2^f

// scale: bits of a unit. The difference is taken in integers: any unit leaves it exact. kAll: every
// slot has a score.
template <bool kAll>
ICECACHE_INLINE VecF score_weight(VecI score, std::int32_t max_score, float scale) {
  VecF bits = __builtin_convertvector(score - max_score, VecF) * scale + kBitsOfOne;
  bits = max(bits, VecF{});
  const VecI weight = __builtin_convertvector(bits, VecI);
  if (kAll) return reinterpret_cast<VecF>(weight);
  return reinterpret_cast<VecF>(score == std::int32_t{kNoScore} ? VecI{} : weight);
}

// The weights of one page's slots for one query, added up lane by lane.
template <bool kAll>
ICECACHE_INLINE VecF page_weight(const std::int16_t* scores, int page_size, std::int32_t max_score,
                                 float scale) {
  VecF sum = {};
  if (page_size >= kWidth) {
    for (int s = 0; s < page_size; s += kWidth) {
      sum += score_weight<kAll>(load_i16(scores + s), max_score, scale);
    }
    return sum;
  }
  std::int16_t padded[kWidth];
  for (int i = 0; i < kWidth; ++i) padded[i] = i < page_size ? scores[i] : kNoScore;
  return score_weight<false>(load_i16(padded), max_score, scale);
}

// kQueries columns of one page's mass, and zeros up to the fourth.
template <bool kAll, int kQueries>
ICECACHE_INLINE void page_mass(const ScoreMassArgs& args, const std::int16_t* scores, int first,
                               float scale, float* mass) {
  VecF sum[4] = {};
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
    sum[g] = page_weight<kAll>(scores + g * args.score_stride, args.page_size, args.max[first + g],
                               scale);
  }
  store4(mass, reduce4(sum[0], sum[1], sum[2], sum[3]) * (1.0f / kMeanExcess));
}

template <int kQueries>
ICECACHE_INLINE void mass_columns(const ScoreMassArgs& args, int first, float scale) {
  const int columns = mass_stride(args.group);
  const std::uint32_t full = args.page_size == 32 ? ~0u : (1u << args.page_size) - 1;
  for (std::int64_t page = 0; page < args.pages; ++page) {
    const std::int16_t* scores = args.scores + first * args.score_stride + page * args.page_size;
    float* mass = args.mass + page * columns + first;
    if (args.masks != nullptr && args.masks[page] == full) {
      page_mass<true, kQueries>(args, scores, first, scale, mass);
    } else {
      page_mass<false, kQueries>(args, scores, first, scale, mass);
    }
  }
}

void score_mass(const ScoreMassArgs& args) {
  const float scale = args.unit * 1.44269504088896341f * kBitsPerOctave;
  for (int first = 0; first < args.group; first += 4) {
    switch (smaller(4, args.group - first)) {
      case 1:
        mass_columns<1>(args, first, scale);
        break;
      case 2:
        mass_columns<2>(args, first, scale);
        break;
      case 3:
        mass_columns<3>(args, first, scale);
        break;
      default:
        mass_columns<4>(args, first, scale);
        break;
    }
  }
}

void score_rank(const ScoreRankArgs& args) {
  constexpr std::int64_t kLanes = kRankLanes;
  for (std::int64_t block = 0; block < args.slots; block += kRankBlock) {
    Vec16S best = Vec16S{} + std::int16_t{INT16_MIN};
    for (std::int64_t i = block; i < smaller(block + kRankBlock, args.slots); i += kLanes) {
      Vec16S rank, other;
      load_bytes(&rank, args.scores + i);
      rank -= args.offset[0];
      for (int g = 1; g < args.group; ++g) {
        load_bytes(&other, args.scores + g * args.score_stride + i);
        other -= args.offset[g];
        rank = rank > other ? rank : other;
      }
      store_bytes(args.rank + i, &rank);
      best = rank > best ? rank : best;
    }
    store_bytes(args.block_max + block / kRankBlock * kLanes, &best);
  }
}

}  // namespace
}  // namespace icecache::simd

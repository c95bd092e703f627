// What follows from the scores of a sketch: score_mass and score_rank.
#pragma once

#include "simd/body/tile.h"

namespace icecache::simd {
namespace {

// A score is an exponent as the upper half of a float has it: eight bits of octaves, seven of
// fractions. Read so, a weight is at most 6.2 % too large, 4 % in the mean, which kMeanExcess takes
// out (Schraudolph, 1999).
constexpr std::int16_t kBitsOfOne = 127 << 7;
constexpr float kMeanExcess = 1.0406844f;  // mean over f in [0, 1) of (1 + f) / 2^f

// The weights of 2 W slots, added up in pairs. `floor`: the difference that weighs nothing.
ICECACHE_INLINE VecF pair_weights(const std::int16_t* scores, std::int16_t max, std::int16_t floor,
                                  int coarse) {
  VecS bits;
  load_bytes(&bits, scores);
  bits -= max;
  bits = bits > floor ? bits : VecS{} + floor;
  bits = (bits << coarse) + kBitsOfOne;
  const VecU pairs = reinterpret_cast<VecU>(bits);
  return reinterpret_cast<VecF>(pairs << 16) + reinterpret_cast<VecF>(pairs & 0xffff0000u);
}

// kQueries columns of kScoreSlots slots' masses, and zeros up to the fourth. max: [kQueries].
template <int kQueries>
ICECACHE_INLINE void slots_mass(const ScoreMassArgs& args, std::int64_t slot, int first,
                                const std::int16_t* max, std::int16_t floor, float* mass) {
  Vec4F eights[kScoreSlots / 8];  // eight slots each: of four queries
#pragma GCC unroll 4
  for (int v = 0; v < kScoreSlots / (2 * kWidth); ++v) {
    VecF sum[4] = {};
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      sum[g] = pair_weights(args.scores + (first + g) * args.score_stride + slot + 2 * kWidth * v,
                            max[g], floor, args.coarse);
    }
    const VecF sums = add_lanes4(sum[0], sum[1], sum[2], sum[3]) * splat(1.0f / kMeanExcess);
    store_bytes(eights + v * kWidth / 4, &sums);
  }
  const int columns = mass_stride(args.group);
  if (args.page_size == 8) {
    for (int p = 0; p < 4; ++p) store4(mass + p * columns, eights[p]);
  } else if (args.page_size == 16) {
    store4(mass, eights[0] + eights[1]);
    store4(mass + columns, eights[2] + eights[3]);
  } else {
    store4(mass, (eights[0] + eights[1]) + (eights[2] + eights[3]));
  }
}

template <int kQueries>
ICECACHE_INLINE void mass_columns(const ScoreMassArgs& args, int first) {
  const auto floor = static_cast<std::int16_t>(-(kBitsOfOne >> args.coarse));
  const std::int64_t pages = kScoreSlots / args.page_size;  // together
  std::int16_t max[kQueries];
  for (int g = 0; g < kQueries; ++g) {  // from 0 on, where kNoScore weighs nothing
    max[g] = args.max[first + g] > 0 ? args.max[first + g] : std::int16_t{0};
  }
  float* mass = args.mass + first;
  for (std::int64_t slot = 0; slot < args.slots; slot += kScoreSlots) {
    slots_mass<kQueries>(args, slot, first, max, floor, mass);
    mass += pages * mass_stride(args.group);
  }
}

void score_mass(const ScoreMassArgs& args) {
  for (int first = 0; first < args.group; first += 4) {
    switch (smaller(4, args.group - first)) {
      case 1:
        mass_columns<1>(args, first);
        break;
      case 2:
        mass_columns<2>(args, first);
        break;
      case 3:
        mass_columns<3>(args, first);
        break;
      default:
        mass_columns<4>(args, first);
        break;
    }
  }
}

template <bool kJoins>
ICECACHE_INLINE void rank_slots(const ScoreRankArgs& args) {
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
      if (kJoins) {
        const Vec16S none = Vec16S{} + kNoScore, most = Vec16S{} + kMaxScore;
        const auto is_token = rank > none;
        rank = is_token ? rank : none;
        other = rank + args.higher;
        other = other < most ? other : most;
        rank = is_token ? other : none;
        load_bytes(&other, args.rank + i);
        rank = rank > other ? rank : other;
      }
      store_bytes(args.rank + i, &rank);
      best = rank > best ? rank : best;
    }
    store_bytes(args.block_max + block / kRankBlock * kLanes, &best);
  }
}

void score_rank(const ScoreRankArgs& args) {
  args.joins ? rank_slots<true>(args) : rank_slots<false>(args);
}

}  // namespace
}  // namespace icecache::simd

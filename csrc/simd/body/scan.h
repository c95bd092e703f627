// sketch_scan: integer dot products of quantised queries with quantised keys, of all slots, and the
// weights that follow.
//
// A block of codes holds W consecutive slots, 4 bytes each, so that one multiplication serves W
// slots and four dims; sums stay in 16 bits as long as they can.
#pragma once

#include "simd/body/exp.h"
#include "simd/body/score.h"
#include "simd/body/soft_cap.h"

namespace icecache::simd {
namespace {

constexpr int kScanVectors = 2;            // slot vectors per pass
constexpr int kScanAhead = 4096;           // bytes of codes on their way
constexpr std::int64_t kScanSlots = 1024;  // slots whose scores are finished while in the L1 cache

// Four query bytes, once for every lane.
ICECACHE_INLINE VecU four_bytes(const std::int8_t* p) {
  std::uint32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return VecU{} + x;
}

// Up to kScanQueries queries, spread over lanes: [dims / 4][query].
struct ScanQueries {
  alignas(64) VecU weights[kMaxSketchRank / 4][kScanQueries];
  std::int32_t base[kScanQueries] = {};
  int first = 0;
  int count = 0;

  ICECACHE_INLINE void load(const SketchScanArgs& args, int from) {
    first = from;
    // 8 bits are rare, and not worth the code of more queries at once.
    count = args.bits == 8 ? 1 : smaller(kScanQueries, args.group - from);
    for (int g = 0; g < count; ++g) {
      const int dims = args.query_dims();
      const std::int8_t* query = args.queries + static_cast<std::ptrdiff_t>(from + g) * dims;
      for (int j = 0; j < dims / 4; ++j) weights[j][g] = four_bytes(query + 4 * j);
      base[g] = args.base[from + g];
    }
  }
};

// Adds the dims of `count` blocks, as many as partial sums hold, from block `from` on. codes[v]: of
// W slots, in that block; `block_bytes`: from one block to the next.
template <int kBits, int kQueries>
ICECACHE_INLINE void scan_blocks(const std::uint8_t* const* codes, int block_bytes, int from,
                                 int count, const ScanQueries& queries, VecI (*sum)[kQueries]) {
  constexpr int kFours = kBits == 4 ? 2 : 1;  // four dims each, of one block
  VecI low[kScanVectors][kQueries] = {};
  VecI high[kScanVectors][kQueries] = {};
  std::ptrdiff_t at = 0;
  for (int b = from; b < from + count; ++b, at += block_bytes) {
    VecU lower[kScanVectors], upper[kScanVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kScanVectors; ++v) {
      const VecU bytes = load_u32(codes[v] + at);
      lower[v] = bytes & 0x0f0f0f0fu;
      upper[v] = (bytes >> 4) & 0x0f0f0f0fu;
    }
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
#pragma GCC unroll 2
      for (int v = 0; v < kScanVectors; ++v) {
        low[v][g] = dot4_add(low[v][g], lower[v], queries.weights[kFours * b][g]);
        if (kBits == 4) {
          low[v][g] = dot4_add(low[v][g], upper[v], queries.weights[kFours * b + 1][g]);
        } else {
          high[v][g] = dot4_add(high[v][g], upper[v], queries.weights[b][g]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kScanVectors; ++v) {
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      sum[v][g] += dot4_sum(low[v][g]);
      if (kBits == 8) sum[v][g] += dot4_sum(high[v][g]) << 4;
    }
  }
}

// Scores of kQueries x kScanVectors x W slots. codes[v]: of each slot vector, in its page's first
// block.
template <int kBits, int kQueries>
ICECACHE_INLINE void scan_pass(int dims, int shift, const ScanQueries& queries,
                               const std::uint8_t* const* codes, int block_bytes,
                               std::int16_t* scores, std::int64_t stride) {
  // Additions to a partial sum: two of 4 bits a block, one of each half of 8 bits.
  constexpr int kBlocks = kBits == 4 ? kDot4Adds / 2 : kDot4Adds;
  const int blocks = dims * kBits / 32;
  VecI sum[kScanVectors][kQueries];
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) sum[0][g] = sum[1][g] = VecI{} + queries.base[g];
  if (blocks == kBlocks) {
    scan_blocks<kBits, kQueries>(codes, block_bytes, 0, kBlocks, queries, sum);
  } else {
    for (int b = 0; b < blocks; b += kBlocks) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(b) * block_bytes;
      const std::uint8_t* from[kScanVectors] = {codes[0] + at, codes[1] + at};
      scan_blocks<kBits, kQueries>(from, block_bytes, b, smaller(kBlocks, blocks - b), queries,
                                   sum);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
    store_i16(scores + g * stride, sum[0][g] >> shift, sum[1][g] >> shift);
  }
}

// Pages that do not fill a pass: their blocks are copied side by side, what is missing as zeros,
// and the scores copied out.
template <int kBits, int kQueries>
void scan_narrow(const SketchScanArgs& args, const ScanQueries& queries, std::int64_t first,
                 std::int64_t end) {
  constexpr int kSlots = kScanVectors * kWidth;
  const int all_blocks = args.rank * kBits / 32, blocks = args.query_dims() * kBits / 32;
  const int width = 4 * args.page_size;  // bytes of a block
  const int together = kSlots / args.page_size;
  alignas(64) std::uint8_t codes[kMaxSketchRank / 4 * 4 * kSlots] = {};
  std::int16_t scores[kQueries * kSlots];
  for (std::int64_t page = first; page < end; page += together) {
    const int here = static_cast<int>(smaller<std::int64_t>(together, end - page));
    for (int p = 0; p < here; ++p) {
      const std::uint8_t* from = args.codes + (page + p) * all_blocks * width;
      for (int b = 0; b < blocks; ++b) {
        __builtin_memcpy(codes + b * 4 * kSlots + p * width, from + b * width,
                         static_cast<std::size_t>(width));
      }
    }
    const std::uint8_t* vectors[kScanVectors] = {codes, codes + 4 * kWidth};
    scan_pass<kBits, kQueries>(args.query_dims(), args.shift, queries, vectors, 4 * kSlots, scores,
                               kSlots);
    for (int g = 0; g < kQueries; ++g) {
      __builtin_memcpy(
          args.scores + (queries.first + g) * args.score_stride + page * args.page_size,
          scores + g * kSlots,
          sizeof(std::int16_t) * static_cast<std::size_t>(here * args.page_size));
    }
  }
}

// Lines that will be written, which else wait for what they hold now.
template <int kQueries>
ICECACHE_INLINE void prefetch_scores(std::int16_t* scores, std::int64_t stride) {
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
    __builtin_prefetch(scores + g * stride + kScanAhead / 16, 1, 2);
  }
}

template <int kBits, int kQueries>
void scan_pages(const SketchScanArgs& args, const ScanQueries& queries, std::int64_t first,
                std::int64_t end) {
  if (args.page_size < kWidth) return scan_narrow<kBits, kQueries>(args, queries, first, end);
  // Copies that no store may change.
  const int dims = args.query_dims(), shift = args.shift, page_size = args.page_size;
  const int block_bytes = 4 * page_size;
  const std::ptrdiff_t page_bytes =
      static_cast<std::ptrdiff_t>(args.rank) * kBits / 32 * block_bytes;
  const std::int64_t stride = args.score_stride;
  const std::uint8_t* codes = args.codes + first * page_bytes;
  std::int16_t* scores = args.scores + queries.first * stride + first * page_size;
  if (page_size == kWidth) {  // two pages a pass
    std::int64_t page = first;
    for (; page + 2 <= end; page += 2, codes += 2 * page_bytes, scores += 2 * page_size) {
      prefetch(codes + kScanAhead, static_cast<std::size_t>(2 * page_bytes));
      prefetch_scores<kQueries>(scores, stride);
      const std::uint8_t* both[kScanVectors] = {codes, codes + page_bytes};
      scan_pass<kBits, kQueries>(dims, shift, queries, both, block_bytes, scores, stride);
    }
    if (page < end) scan_narrow<kBits, kQueries>(args, queries, page, end);
    return;
  }
  for (std::int64_t page = first; page < end; ++page, codes += page_bytes) {
    prefetch(codes + kScanAhead, static_cast<std::size_t>(page_bytes));
    prefetch_scores<kQueries>(scores, stride);
    for (int s = 0; s < page_size; s += kScanVectors * kWidth) {
      const std::uint8_t* both[kScanVectors] = {codes + 4 * s, codes + 4 * (s + kWidth)};
      scan_pass<kBits, kQueries>(dims, shift, queries, both, block_bytes, scores, stride);
      scores += kScanVectors * kWidth;
    }
  }
}

void scan_queries(const SketchScanArgs& args, const ScanQueries& queries, std::int64_t first,
                  std::int64_t end) {
  if (args.bits == 8) {
    scan_pages<8, 1>(args, queries, first, end);
  } else if (queries.count == kScanQueries) {
    scan_pages<4, kScanQueries>(args, queries, first, end);
  } else if (queries.count == 3) {
    scan_pages<4, smaller(3, kScanQueries)>(args, queries, first, end);
  } else if (queries.count == 2) {
    scan_pages<4, 2>(args, queries, first, end);
  } else {
    scan_pages<4, 1>(args, queries, first, end);
  }
}

// Slots that hold no token get kNoScore.
ICECACHE_INLINE void clear_free_slots(const SketchScanArgs& args, std::int64_t first,
                                      std::int64_t end) {
  const std::uint32_t full = args.page_size == 32 ? ~0u : (1u << args.page_size) - 1;
  const Vec8S bit = {1, 2, 4, 8, 16, 32, 64, 128};
  for (std::int64_t page = first; page < end; ++page) {
    const std::uint32_t mask = args.masks[page];
    if (mask == full) continue;
    for (int s = 0; s < args.page_size; s += 8) {
      const auto m = static_cast<std::int16_t>(mask >> s & 255u);
      const Vec8S used = (bit & Vec8S{m, m, m, m, m, m, m, m}) == bit;
      std::int16_t* at = args.scores + page * args.page_size + s;
      for (int g = 0; g < args.group; ++g, at += args.score_stride) {
        const Vec8S kept = (used & load8(at)) | (~used & kNoScore);
        store_bytes(at, &kept);
      }
    }
  }
}

// The largest of n scores, a multiple of kScoreSlots, and `best`.
ICECACHE_INLINE std::int16_t max_score(const std::int16_t* scores, std::int64_t n,
                                       std::int16_t best) {
  Vec16S high = Vec16S{} + best;
  Vec16S higher = high;
  for (std::int64_t i = 0; i < n; i += 32) {
    Vec16S a, b;
    load_bytes(&a, scores + i);
    load_bytes(&b, scores + i + 16);
    high = a > high ? a : high;
    higher = b > higher ? b : higher;
  }
  high = high > higher ? high : higher;
  for (int j = 0; j < 16; ++j) best = high[j] > best ? high[j] : best;
  return best;
}

// Masses of the slots [first, end), which are relative to the scores `from`, made relative to the
// largest.
ICECACHE_INLINE void rescale_mass(const SketchScanArgs& args, std::int64_t first, std::int64_t end,
                                  const std::int16_t* from) {
  const int columns = mass_stride(args.group);
  const float unit = kScoreUnit * static_cast<float>(1 << args.coarse);
  float factor[kMaxGroup];
  for (int g = args.group; g < columns; ++g) factor[g] = 0.0f;
  bool same = true;
  for (int g = 0; g < args.group; ++g) {
    same = same && from[g] == args.max[g];
    factor[g] = exp(unit * static_cast<float>(from[g] - args.max[g]));
  }
  if (same) return;
  const std::int64_t end_page = end / args.page_size;
  for (int g = 0; g < columns; g += 4) {
    const Vec4F factors = load4(factor + g);
    for (std::int64_t page = first / args.page_size; page < end_page; ++page) {
      float* mass = args.mass + page * columns + g;
      store4(mass, load4(mass) * factors);
    }
  }
}

// Chunk by chunk: what follows from the scores is done while they are in the L1 cache. A chunk's
// masses are relative to the largest score so far until all are known.
void sketch_scan(const SketchScanArgs& args) {
  constexpr std::int64_t kMaxChunks = 64;  // whose maxima are kept; longer scans take longer chunks
  const std::int64_t used = args.pages * args.page_size;
  const std::int64_t slots = (used + kScoreSlots - 1) / kScoreSlots * kScoreSlots;
  const std::int64_t chunk_slots =
      (slots + kMaxChunks * kScanSlots - 1) / (kMaxChunks * kScanSlots) * kScanSlots;
  std::int16_t so_far[kMaxChunks][kMaxGroup];
  for (int g = 0; g < args.group; ++g) {
    args.max[g] = kNoScore;
    for (std::int64_t i = used; i < slots; ++i) args.scores[g * args.score_stride + i] = kNoScore;
  }
  ScanQueries queries;
  std::int64_t chunk = 0;
  for (std::int64_t first = 0; first < slots; first += chunk_slots, ++chunk) {
    const std::int64_t end = smaller(first + chunk_slots, slots);
    const std::int64_t page = first / args.page_size;
    const std::int64_t end_page = smaller(end / args.page_size, args.pages);
    for (int g = 0; g < args.group; g += queries.count) {
      queries.load(args, g);
      scan_queries(args, queries, page, end_page);
    }
    clear_free_slots(args, page, end_page);
    for (int g = 0; g < args.group; ++g) {
      if (args.softcap > 0.0f) {
        cap_scores(args.scores + g * args.score_stride + first, end - first, args.softcap,
                   args.unit, args.bias[g], args.capped_bias[g]);
      }
      args.max[g] =
          max_score(args.scores + g * args.score_stride + first, end - first, args.max[g]);
      so_far[chunk][g] = args.max[g];
    }
    score_mass({args.scores + first, args.max, args.mass + page * mass_stride(args.group),
                args.score_stride, end - first, args.coarse, args.group, args.page_size});
  }
  chunk = 0;
  for (std::int64_t first = 0; first < slots; first += chunk_slots, ++chunk) {
    rescale_mass(args, first, smaller(first + chunk_slots, slots), so_far[chunk]);
  }
}

}  // namespace
}  // namespace icecache::simd

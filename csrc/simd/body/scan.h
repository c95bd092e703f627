// Streams over what stands for all tokens: sketch_scan over quantised keys, far_scan over
// summaries.
#pragma once

#include "simd/body/tile.h"

namespace icecache::simd {
namespace {

// Where a pass of sketch_scan reads and writes.
struct ScanPass {
  const std::uint8_t* codes[kScanVectors];  // of each slot vector, in the page's first block
  std::int64_t slot = 0;                    // of the first score
  int query = 0;                            // first query
};

// Scores of kQueries x kVectors x W slots. kBits: 4 or 8. `block_bytes`: from one block of dims to
// the next, 4 S.
template <int kBits, int kQueries, int kVectors>
ICECACHE_INLINE void scan_pass(const SketchScanArgs& args, const ScanPass& pass, int block_bytes) {
  constexpr int kDims = 32 / kBits;  // dims in 4 bytes
  VecF acc[kQueries][kVectors];
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[g][v] = splat(args.bias[pass.query + g]);
  }
  const float* query = args.queries + static_cast<std::ptrdiff_t>(pass.query) * args.rank;
  std::ptrdiff_t offset = 0;
  for (int dim = 0; dim < args.rank; dim += kDims, offset += block_bytes) {
#pragma GCC unroll 8
    for (int j = 0; j < kDims; ++j) {
      VecF code[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Codes codes(load_u32(pass.codes[v] + offset));
        code[v] = kBits == 4 ? codes.nibble(j) : codes.byte(j);
      }
#pragma GCC unroll 4
      for (int g = 0; g < kQueries; ++g) {
        const VecF weight = splat(query[static_cast<std::ptrdiff_t>(g) * args.rank + dim + j]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[g][v] += weight * code[v];
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kQueries; ++g) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      store(args.scores + (pass.query + g) * args.score_stride + pass.slot + v * kWidth, acc[g][v]);
    }
  }
}

// All queries over the slots of one pass.
template <int kBits, int kVectors>
ICECACHE_INLINE void scan_queries(const SketchScanArgs& args, ScanPass pass, int block_bytes) {
  for (int g = 0; g < args.group;) {
    pass.query = g;
    const int count = smaller(kScanQueries, args.group - g);
    if (count == kScanQueries) {
      scan_pass<kBits, kScanQueries, kVectors>(args, pass, block_bytes);
    } else if (count == 3) {
      scan_pass<kBits, 3, kVectors>(args, pass, block_bytes);
    } else if (count == 2) {
      scan_pass<kBits, 2, kVectors>(args, pass, block_bytes);
    } else {
      scan_pass<kBits, 1, kVectors>(args, pass, block_bytes);
    }
    g += count;
  }
}

// Pages narrower than a vector (S = 8 where W = 16): their blocks are copied side by side into one
// page of W slots first, missing pages as zeros, and the scores copied out.
template <int kBits>
void scan_narrow(const SketchScanArgs& args) {
  const int blocks = args.rank * kBits / 32;
  const int width = 4 * args.page_size;  // bytes of a block
  const int together = kWidth / args.page_size;
  alignas(64) std::uint8_t codes[kMaxHeadDim / 4 * 4 * kWidth] = {};
  float scores[kMaxGroup * kWidth];
  for (std::int64_t page = 0; page < args.pages; page += together) {
    const int here = static_cast<int>(smaller<std::int64_t>(together, args.pages - page));
    for (int p = 0; p < here; ++p) {
      const std::uint8_t* from = args.codes + (page + p) * blocks * width;
      for (int b = 0; b < blocks; ++b) {
        __builtin_memcpy(codes + b * 4 * kWidth + p * width, from + b * width,
                         static_cast<std::size_t>(width));
      }
    }
    SketchScanArgs wide = args;
    wide.scores = scores;
    wide.score_stride = kWidth;
    ScanPass pass = {};
    pass.codes[0] = codes;
    scan_queries<kBits, 1>(wide, pass, 4 * kWidth);
    const std::int64_t slot = page * args.page_size;
    for (int g = 0; g < args.group; ++g) {
      for (int s = 0; s < here * args.page_size; ++s) {
        args.scores[g * args.score_stride + slot + s] = scores[g * kWidth + s];
      }
    }
  }
}

template <int kBits>
void scan_pages(const SketchScanArgs& args) {
  if (args.page_size < kWidth) return scan_narrow<kBits>(args);
  const int block_bytes = 4 * args.page_size;
  const std::ptrdiff_t page_bytes =
      static_cast<std::ptrdiff_t>(args.rank) * kBits / 32 * block_bytes;
  const int vectors = args.page_size / kWidth;
  ScanPass pass = {};
  if (vectors % kScanVectors == 0) {
    for (std::int64_t page = 0; page < args.pages; ++page) {
      for (int v = 0; v < vectors; v += kScanVectors) {
        for (int i = 0; i < kScanVectors; ++i) {
          pass.codes[i] = args.codes + page * page_bytes + (v + i) * 4 * kWidth;
        }
        pass.slot = page * args.page_size + v * kWidth;
        scan_queries<kBits, kScanVectors>(args, pass, block_bytes);
      }
    }
    return;
  }
  // One vector per page: two pages at a time.
  std::int64_t page = 0;
  for (; page + 2 <= args.pages; page += 2) {
    pass.codes[0] = args.codes + page * page_bytes;
    pass.codes[1] = pass.codes[0] + page_bytes;
    pass.slot = page * args.page_size;
    scan_queries<kBits, 2>(args, pass, block_bytes);
  }
  if (page < args.pages) {
    pass.codes[0] = args.codes + page * page_bytes;
    pass.slot = page * args.page_size;
    scan_queries<kBits, 1>(args, pass, block_bytes);
  }
}

void sketch_scan(const SketchScanArgs& args) {
  if (args.bits == 4) {
    scan_pages<4>(args);
  } else {
    scan_pages<8>(args);
  }
}

// Sums of dq . mean and dq^2 . variance for one query and four nodes.
ICECACHE_INLINE void far_tile(const float* dq, const float* const* mean,
                              const float* const* variance, int dim, float* first, float* second) {
  VecF linear[4] = {};
  VecF square[4] = {};
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const VecF q = load(dq + d);
    const VecF q2 = q * q;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      linear[c] += q * load(mean[c] + d);
      square[c] += q2 * load(variance[c] + d);
    }
  }
  if (d < dim) {
    const int rest = dim - d;
    const VecF q = load_part(dq + d, rest);
    const VecF q2 = q * q;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      linear[c] += q * load_part(mean[c] + d, rest);
      square[c] += q2 * load_part(variance[c] + d, rest);
    }
  }
  store4(first, reduce4(linear[0], linear[1], linear[2], linear[3]));
  store4(second, reduce4(square[0], square[1], square[2], square[3]));
}

void far_scan(const FarScanArgs& args) {
  for (std::int64_t node = 0; node < args.nodes; node += 4) {
    const int count = static_cast<int>(smaller<std::int64_t>(4, args.nodes - node));
    const float* mean[4];
    const float* variance[4];
    for (int c = 0; c < 4; ++c) {
      const std::ptrdiff_t row = (node + smaller(c, count - 1)) * args.head_dim;
      mean[c] = args.mean + row;
      variance[c] = args.variance + row;
    }
    for (int g = 0; g < args.group; ++g) {
      float linear[4];
      float square[4];
      far_tile(args.dq + static_cast<std::ptrdiff_t>(g) * args.head_dim, mean, variance,
               args.head_dim, linear, square);
      for (int c = 0; c < count; ++c) {
        const float weight = args.log_weight[node + c];
        const float second = 0.5f * square[c];
        // An empty node stays out whatever its moments hold.
        args.out[g * args.nodes + node + c] =
            weight == -kInfinity ? weight : weight + linear[c] + (second < 1.0f ? second : 1.0f);
      }
    }
  }
}

}  // namespace
}  // namespace icecache::simd

// One decode step of one layer on the device, as a chain of kernels without a host decision.
//
//   append   puts the new token into the window; the token that it displaces goes to its host page
//            and gets a sketch; logits of sink and window; the query in sketch coordinates
//   attend_all   full attention of the sequences that are resident: the device holds the keys and
//            values of all their tokens. The kernels below pass them by
//   scan     integer scores of all sketches, for every head of the group
//   rank     each head's log weight over all tokens, and how many tokens have each rank (score bin)
//   choose   candidates: the tokens of the best ranks; what the others weigh, node by node
//   resolve  which candidates have a row in the device's row cache; rows of the longest unused ones
//            for those that have not
//   rescore  exact logits; keys that are missing come straight from pinned host memory
//   pick     the token budget, spent by attention mass; the entries: sink, window, picked tokens,
//            and by how much the nodes of candidates weigh more or less than choose said
//   attend   sum of weight x value over far-field nodes, while pick runs, and over the entries,
//            split over blocks and merged by the last; values that are missing come from host
//            memory
//
// A step may bring several tokens for a sequence, each of which attends to those before it: drafts,
// and the token ahead of them. append_all then appends all tokens of residents, attend_all answers
// them in one launch, and the chain above runs once for each token of the others. The results are
// those of as many steps of one token, to the bit.
//
// The unit that moves and is cached is a token's row, not its page: a step picks few tokens of each
// page, and rows of 128 bytes and more already fill the link (docs/cuda.md).
//
// Everything is deterministic: integer atomics only, fixed orders of summation.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.h"
#include "icecache/types.h"

namespace icecache::gpu {

constexpr int kMaxCandidates = 512;    // a step's candidates, at most
constexpr int kRanks = 2048;           // bins of the histogram
constexpr float kRanksPerNat = 64.0f;  // so it spans 32 nats below the best
constexpr int kChunkTokens = 1024;     // index tokens of a chunk: what a sequence grows by
constexpr int kMaxStepGroup = 16;      // G, at most: of the CPU's kMaxGroup
constexpr int kMaxNear = 256;          // tokens of sink and window together
constexpr int kCodesPerWord = 8;       // 4-bit codes
constexpr int kRecentQueries = 64;     // kept for the metric of the next build
constexpr int kAttendLeast = 64;       // rows of a block of attend
constexpr int kAttendMost = 16;        // blocks of a pair, which one of them merges
constexpr int kExtentTokens = 256;     // tokens of an extent: what a resident sequence grows by
constexpr std::int64_t extents_of(std::int64_t tokens) {
  return (tokens + kExtentTokens - 1) / kExtentTokens;
}
constexpr int kAttendAllMost = 64;  // blocks of a pair in attend_all
constexpr int kMaxStepTokens = 16;  // of a sequence in one step
constexpr int kCounters = 5;        // of a pair
// Blocks of attend that a multiprocessor holds at once, by the fours of heads that each takes.
constexpr int attend_resident(int tiles) {
  return tiles == 1 ? 4 : 3;
}
// Blocks of attend_all that a multiprocessor holds at once: registers bound them.
constexpr int attend_all_resident(int tiles, int head_dim) {
  return head_dim > 128 ? 2 : tiles == 1 ? 4 : 3;
}
constexpr int kHeadTile = 4;  // scores and coefficients are stored in fours of heads

// Letters as in types.h, and
//   X = B * Hkv (sequence, KV head) pairs, x = b * Hkv + h;  H = G rounded up to kHeadTile;
//   E = near rows = sink_tokens + window_tokens;  M cached rows;  N index tokens, at most;
//   C = N / far_node_tokens.
//
// What a step reads of every index token is stored in chunks of device memory, which a sequence
// takes as it grows. A chunk belongs to one sequence and has a part for each head and layer of it:
//   codes [kChunkTokens, R / 8] uint32   sketches
//   row_of [kChunkTokens] int16          cached row of a token; -1: none
//   means [kChunkTokens / F, D]          mean values of far-field nodes, F = far_node_tokens
//
// All tokens of a resident sequence, in order of position, are stored in extents of device memory.
// An extent belongs to one sequence and has a part for each head and layer of it: keys
// [kExtentTokens, D], then values alike. What is in chunks and host pages is kept up to date beside
// that, so that a sequence whose extents are taken away goes on from there.
struct StepShape {
  int batch = 0, kv_heads = 0, group = 0, head_dim = 0;
  DType dtype = DType::kFloat32;
  int page_size = 0, sink_tokens = 0, window_tokens = 0;
  int select_tokens = 0;  // picked in a step, beside sink and window
  int candidates = 0;     // wanted; 1..kMaxCandidates
  int far_node_tokens = 0;
  int rank = 0;         // of a sketch: 32 or 64
  bool tail = true;     // far field
  int token_room = 0;   // N, a multiple of far_node_tokens and of page_size
  int cached_rows = 0;  // M
  int extents = 0;      // of a sequence, at most; 0: no sequence is ever resident
  float scale = 0.0f;
  int multiprocessors = 1;  // of the device

  constexpr int pairs() const { return batch * kv_heads; }
  constexpr int padded_group() const { return (group + kHeadTile - 1) / kHeadTile * kHeadTile; }
  constexpr int near_rows() const { return sink_tokens + window_tokens; }
  constexpr int rows() const { return near_rows() + cached_rows; }
  constexpr int nodes() const { return token_room / far_node_tokens; }
  constexpr int pages() const { return token_room / page_size; }
  // Tokens of a page, and of a far-field node, as powers.
  constexpr int page_shift() const { return page_size == 8 ? 3 : page_size == 16 ? 4 : 5; }
  constexpr int far_shift() const { return far_node_tokens == 64 ? 6 : 5; }
  constexpr int words() const { return rank / kCodesPerWord; }  // of a sketch
  constexpr int chunks() const { return (token_room + kChunkTokens - 1) / kChunkTokens; }
  // Of a part of a chunk: where row_of and means begin, and bytes in all; multiples of 256.
  constexpr int node_shift() const { return far_node_tokens == 64 ? 4 : 5; }  // nodes, as a power
  constexpr int row_of_at() const { return kChunkTokens * words() * 4; }
  constexpr int means_at() const { return row_of_at() + kChunkTokens * 2; }
  constexpr std::int64_t part_bytes() const {
    return means_at() + static_cast<std::int64_t>(head_dim << node_shift()) *
                            static_cast<std::int64_t>(size_of(dtype));
  }
  constexpr std::int64_t extent_part_bytes() const {
    return std::int64_t{2} * kExtentTokens * head_dim * static_cast<std::int64_t>(size_of(dtype));
  }
  // What a step attends to exactly, at most; and what attend adds to the nodes.
  constexpr int attended() const { return near_rows() + select_tokens; }
  constexpr int entries() const { return attended() + kMaxCandidates; }
  // Blocks of attend, at most, for each pair: about as many as run at once, of 64 rows and more.
  // Those of larger groups take two fours of heads each (attend_tiles), and more registers.
  constexpr int attend_tiles() const { return padded_group() <= kHeadTile ? 1 : 2; }
  constexpr int attend_groups() const {
    return (padded_group() / kHeadTile + attend_tiles() - 1) / attend_tiles();
  }
  constexpr int attend_blocks() const {
    const int share =
        multiprocessors * attend_resident(attend_tiles()) / (pairs() * attend_groups());
    const int most = (attended() + nodes() + kAttendLeast - 1) / kAttendLeast;
    return std::clamp(share, 1, std::min(most, kAttendMost));
  }
  // Blocks of attend_all, at most, for each pair.
  constexpr int attend_all_blocks() const {
    const int share = multiprocessors * attend_all_resident(attend_tiles(), head_dim) /
                      (pairs() * attend_groups());
    return std::clamp(share, 1,
                      std::clamp(extents * (kExtentTokens / kAttendLeast), 1, kAttendAllMost));
  }
  // Sums that blocks hand to those which merge them, at most: in attend_all of all tokens of a step.
  constexpr std::int64_t partial_sums() const {
    const int of_pair = extents > 0
                            ? std::max(attend_blocks(), kMaxStepTokens * attend_all_blocks())
                            : attend_blocks();
    return std::int64_t{of_pair} * pairs();
  }
  // Blocks of rank and choose for each pair, of which a multiprocessor holds `resident`.
  constexpr int blocks_of_pair(int resident) const {
    return std::clamp(multiprocessors * resident / pairs(), 1, chunks());
  }
};

// What a layer keeps on the device; arrays over X pairs.
struct LayerState {
  std::int32_t* lengths = nullptr;  // [X] tokens; -1: no sequence there
  void* row_keys = nullptr;         // [X, E + M, D]: sink, window (a ring), cached rows
  void* row_values = nullptr;
  std::byte** pages = nullptr;        // [B, N / S, Hkv] host pages [2][S][D]
  float* open_sum = nullptr;          // [X, D] values of the node that is being filled
  void* recent_queries = nullptr;     // [X, G, kRecentQueries, D], a ring by position
  float* mean_key = nullptr;          // [X, D]
  float* from_key = nullptr;          // [X, D, R]
  float* from_query = nullptr;        // [X, D, R]
  float* low = nullptr;               // [X, R] of the coordinates
  float* step = nullptr;              // [X, R] of one code
  std::int32_t* owner = nullptr;      // [X, M] index token of a cached row; -1: none
  std::int32_t* stamp = nullptr;      // [X, M] length at which the row was last used
  std::uint8_t* has_value = nullptr;  // [X, M] the row's value came, too
  // [X] tokens that extents hold, the first ones: all of a resident sequence.
  std::int32_t* resident = nullptr;
  // [X, kCounters] hits, misses, bytes moved, steps within the budget, steps of residents
  unsigned long long* counters = nullptr;
  // Of all layers: each pair's part of its sequence's chunks, of which this layer's own begins at
  // `in_chunk`; and the index tokens for which it has chunks and pages.
  std::byte** chunks = nullptr;  // [X, chunks]
  std::int64_t in_chunk = 0;
  std::int32_t* room = nullptr;  // [X]
  // Of all layers: likewise of extents, and the tokens that they have capacity for; 0: none.
  std::byte** extents = nullptr;  // [X, extents]
  std::int64_t in_extent = 0;
  std::int32_t* extent_room = nullptr;  // [X]
};

// What the kernels of a step hand to each other; used again by every layer.
struct StepScratch {
  // Arrays [U, X] have a place for each of the kMaxStepTokens tokens of a step, in which attend_all
  // answers all tokens of residents; other kernels use the first [X].
  std::int32_t* inputs = nullptr;  // [U, X] row * Hkv + h of queries, keys, ...; < 0: none
  // [X] before the step; < 0: not in it; or kFull, kResident (step_common.h)
  std::int32_t* lengths = nullptr;
  std::int32_t* resident_lengths = nullptr;  // [U, X] of residents, before the token; < 0: none
  std::int32_t* taken = nullptr;             // [X] tokens of the step that attend_all answers
  std::int8_t* query_codes = nullptr;        // [X, H, R]
  float* unit = nullptr;                     // [X] nats of one score
  float* bias = nullptr;                     // [X, H]
  float* near_logits = nullptr;              // [X, E, H]
  float* near_lse = nullptr;                 // [X, H]
  std::int16_t* scores = nullptr;            // [X, H / 4, N, 4]
  std::uint16_t* ranks = nullptr;            // [X, N]
  std::int32_t* chunk_max = nullptr;         // [X, scan chunks, H]
  float* chunk_sum = nullptr;                // [X, scan chunks, H]
  float* lse = nullptr;                // [X, H] log weight of everything, as far as sketches tell
  std::uint32_t* histogram = nullptr;  // [X, kRanks]
  std::uint32_t* blocks_ranked = nullptr;  // [X]
  std::int32_t* last_rank = nullptr;       // [X] of the candidates
  std::uint32_t* found = nullptr;          // [X] candidates
  std::int32_t* tokens = nullptr;          // [X, kMaxCandidates] index tokens of the candidates
  std::int32_t* token_rows = nullptr;  // [X, kMaxCandidates] rows; ~row where the key is missing
  float* logits = nullptr;             // [X, kMaxCandidates, H]
  // [X, C, H] weights of nodes: of all tokens, over those of the best score of their chunk, from
  // scan on; of those that are no candidates, over exp(lse), from choose on.
  float* mass = nullptr;
  // What is added to that: rows; nodes, whose means count from rows() on.
  std::int32_t* entry_count = nullptr;    // [X]
  std::int32_t* entry_rows = nullptr;     // [X, entries]
  std::int32_t* entry_sources = nullptr;  // [X, entries] index token of a missing value; -1: none
  float* entry_weights = nullptr;         // [X, entries, H]
  float* far_scale = nullptr;             // [X, H]
  // Of what blocks of attend, or of attend_all, hand to the one that merges them, T of a pair, or of
  // a token of it.
  float* partial = nullptr;              // [U, X, T, H, D]
  float* partial_sum = nullptr;          // [U, X, T, H]
  float* partial_max = nullptr;          // [U, X, T, H] base-2 logits that sums are relative to
  std::uint32_t* blocks_done = nullptr;  // [U, X]
};

// A step of one layer. Rows of queries, keys, values and out are contiguous; A rows, one for each
// token of each sequence that takes part.
struct StepParams {
  StepShape shape;
  LayerState layer;
  StepScratch scratch;
  int tokens = 1;  // of a sequence, at most; 1..kMaxStepTokens
  int token = 0;   // of them, that the kernels of the chain are for, whose `rows` are [B]
  // [tokens, B] row of each token of each sequence, in their order; < 0: none. Null: row b, A = B,
  // and one token.
  const std::int32_t* rows = nullptr;
  const void* queries = nullptr;  // [A, Hq, D]
  const void* keys = nullptr;     // [A, Hkv, D]
  const void* values = nullptr;
  void* out = nullptr;  // [A, Hq, D]; 0 for an empty sequence, NaN for one without room
};

// Throws InvalidArgument, with what is supported, for a shape that the kernels do not cover.
void check_shape(const StepShape& shape);
void launch_step(const StepParams& params, Stream stream);

// Bytes of the arrays above, each aligned to 256 bytes, and their places in one allocation. Those
// that layers share are placed by themselves.
std::size_t place(const StepShape& shape, std::byte* memory, LayerState& layer);
std::size_t place(const StepShape& shape, std::byte* memory, StepScratch& scratch);
std::size_t place_shared(const StepShape& shape, std::byte* memory, LayerState& layer);
// Copies all that a layer keeps for the Hkv pairs from `from` on to those from `to` on, but for
// what is in chunks.
void copy_pairs(const StepShape& shape, const LayerState& layer, std::int64_t from, std::int64_t to,
                Stream stream);

}  // namespace icecache::gpu

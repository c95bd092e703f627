// Reading out the tokens that a sequence holds, adding many at once, and taking the last ones back.
#pragma once

#include "cuda/step.h"

namespace icecache::gpu {

// Index tokens that a build put in an order of its own; those behind them came one by one, in order
// of position.
struct Arrangement {
  const std::int32_t* order = nullptr;  // [Hkv, count] position less sinks of each
  int count = 0;
};

// Copies the keys and values of all tokens of a sequence, in order of position. They come from its
// extents where it is resident, else from sinks, window and host pages.
struct FetchParams {
  StepShape shape;
  LayerState layer;
  int first_pair = 0;  // b * Hkv
  int length = 0;
  Arrangement arranged;
  void* keys = nullptr;  // [Hkv, length, D], contiguous
  void* values = nullptr;
};
void launch_fetch(const FetchParams& params, Stream stream);

// The keys and values of a prompt of one layer go to the sequence's extents, which have capacity
// for it. Until lay_out, the last kernel of the prompt's build, `resident` is ~length: a prompt whose
// build fails is not resident.
struct KeepParams {
  StepShape shape;
  LayerState layer;
  int first_pair = 0;
  int length = 0;              // T
  const void* keys = nullptr;  // [Hkv, T, D]
  const void* values = nullptr;
  std::int64_t key_head = 0, key_token = 0, value_head = 0, value_token = 0;  // strides, elements
};
void launch_keep(const KeepParams& params, Stream stream);

// Tokens of one layer, behind those that the sequence holds, whose attention is computed elsewhere:
// all that steps of one token each would leave behind, to the bit, but for statistics. The sequence
// has room for them.
struct ExtendParams {
  StepShape shape;
  LayerState layer;
  int first_pair = 0;
  int length = 0;              // before
  int count = 0;               // T, at least 1
  const void* keys = nullptr;  // [Hkv, T, D]
  const void* values = nullptr;
  const void* queries = nullptr;  // [Hq, T', D], those of the last T' <= T tokens
  int query_tokens = 0;           // T'
  std::int64_t key_head = 0, key_token = 0, value_head = 0, value_token = 0;  // strides, elements
  std::int64_t query_head = 0, query_token = 0;
};
void launch_extend(const ExtendParams& params, Stream stream);

constexpr int kExtentsAtOnce = 64;

// What extents a sequence has, from the `first` on; those before it stay. By value, so that nobody
// waits for a copy.
struct ExtentParams {
  StepShape shape;
  LayerState layer;
  int first_pair = 0;
  int first = 0, count = 0;
  std::int32_t room = 0;        // tokens, in all; 0: it has none
  std::int64_t head_bytes = 0;  // from a head's part of an extent to the next one's
  std::byte* extents[kExtentsAtOnce] = {};
};
void launch_give_extents(const ExtentParams& params, Stream stream);

// Takes back the last tokens of a sequence in some layers, so that it is there what it was at `kept`
// tokens: those that left the window since then come back from their pages. Layers that have no more
// than these stay as they are. Rows of arranged tokens stay where they are: kept >= near rows +
// arranged tokens, or there are none of those.
struct TruncateParams {
  StepShape shape;
  const LayerState* layers = nullptr;  // on the device: of the first of them
  int count = 0;                       // layers
  int first_pair = 0;
  int kept = 0;
};
void launch_truncate(const TruncateParams& params, Stream stream);

}  // namespace icecache::gpu

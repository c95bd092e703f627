// What a sequence holds, read out and taken back.
#pragma once

#include "cuda/step.h"

namespace icecache::gpu {

// Index tokens that a build put in an order of its own; those behind them came one by one, in order
// of position.
struct Arrangement {
  const std::int32_t* order = nullptr;  // [Hkv, count] position less sinks of each
  int count = 0;
};

// All tokens in order of position, from sinks, window and host pages.
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

// Takes back the last tokens, so that the sequence is what it was at `kept` tokens: those that left
// the window since then come back from their pages. Rows of arranged tokens stay where they are:
// kept >= near rows + arranged tokens, or there are none of those.
struct TruncateParams {
  StepShape shape;
  LayerState layer;
  int first_pair = 0;
  int length = 0;  // before
  int kept = 0;
};
void launch_truncate(const TruncateParams& params, Stream stream);

}  // namespace icecache::gpu

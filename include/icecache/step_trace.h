// StepTrace: what one decode step looked at. Positions are token positions in the sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "icecache/types.h"

namespace icecache {

struct PageInfo {
  PageId page = kNoPage;
  std::int32_t node = -1;               // far-field node, -1 where there is none
  std::vector<std::int32_t> positions;  // in slot order
};
struct FarNodeInfo {
  std::vector<float> weight;  // [G] log weight of its unpicked tokens for the query
  std::int32_t tokens = 0;    // members, picked ones included
};

// Recorded with telemetry = "trace"; one per layer and KV head.
struct StepTrace {
  std::vector<std::int32_t> sink, window, selected;  // positions
  std::vector<PageInfo> pages;                       // the whole map of pages
  std::vector<FarNodeInfo> far_nodes;                // indexed by PageInfo::node
  // Log weights as floats: shares made of them are off by a factor of exp(|lse| / 2^24).
  std::vector<float> near_lse;   // [G] log weight attended exactly
  std::vector<float> total_lse;  // [G] with the rest
};

}  // namespace icecache

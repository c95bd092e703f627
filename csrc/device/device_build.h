// DeviceBuild: what DeviceCache::prefill() leaves to an index thread. The prompt of one (sequence,
// layer) becomes a space of tokens for each head, their order there, sketches, far-field means and
// host pages. Kernels: cuda/build.h; spaces are fitted on the host, from a sample. Where a fit
// would bring nothing yet, the space is a fixed one, and nothing is sampled or sorted.
//
// Failure: all memory is taken by the constructor; until run() nothing of the layer was touched.
#pragma once

#include <span>
#include <vector>

#include "cuda/build.h"

namespace icecache {

class DeviceBuild {
 public:
  // `params` without the arrays that this object owns. Throws OutOfPages.
  DeviceBuild(const gpu::BuildParams& params, gpu::Stream stream);
  // `pages`: host pages [Hkv, N / S] that the sequence gets. Returns when all is done, with the
  // order of the index tokens [Hkv, indexed]: the position of each, less sinks.
  std::vector<std::int32_t> run(std::span<std::byte* const> pages);

 private:
  void fit_spaces();
  void take_fixed_space();
  void order_tokens();

  gpu::BuildParams p_;
  gpu::Stream stream_;
  std::vector<std::vector<std::int32_t>> levels_;  // bounds of the segments, see bisection_levels()
  std::vector<std::int32_t> bounds_;               // of all levels, one behind the other
  gpu::Buffer sampled_, from_value_, coordinates_, range_, segments_, directions_, order_;
  gpu::Buffer sort_keys_, room_;
};

}  // namespace icecache

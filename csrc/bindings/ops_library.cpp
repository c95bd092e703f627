// Torch operators on LibTorch's stable ABI: one binary for torch >= 2.11. Documented, and given
// their fake kernels, in python/icecache/ops.py.
#include "bindings/ops_kernels.h"

// icecache::ParallelFor on torch's own threads; python/icecache/engine.py names this library to
// the engine.
extern "C" __attribute__((visibility("default"))) void icecache_torch_parallel_for(
    std::int64_t count, void (*body)(std::int64_t i, void* context), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) body(i, context);
  });
}

STABLE_TORCH_LIBRARY(icecache, m) {
  m.def(
      "paged_attention(Tensor queries, Tensor pages, Tensor block_table, Tensor slot_masks, "
      "float scale) -> (Tensor, Tensor)");
  m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(icecache, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&icecache::ops::paged_attention));
  m.impl("merge_states", TORCH_BOX(&icecache::ops::merge_states));
}

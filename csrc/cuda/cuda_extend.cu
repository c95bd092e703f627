#include "cuda/extend_kernels.h"
#include "cuda/launch.h"

namespace icecache::gpu {
namespace {

template <typename T, int D>
void launch_extend_of(const ExtendParams& p, Stream stream) {
  const StepShape& s = p.shape;
  const auto heads = static_cast<unsigned>(s.kv_heads);
  const int before = std::max(0, p.length - s.near_rows());
  const int after = std::max(0, p.length + p.count - s.near_rows());
  if (after > before) {
    const int nodes = ((after - 1) >> s.far_shift()) - (before >> s.far_shift()) + 1;
    launch("extend index", extend_index_kernel<T, D>, dim3(static_cast<unsigned>(nodes), heads),
           kBlock, stream, p);
  }
  if (s.extents > 0) {
    launch("extend extents", extend_extents_kernel<T, D>, dim3(blocks_for(p.count, 16), heads),
           kBlock, stream, p);
  }
  launch("extend near", extend_near_kernel<T, D>, dim3(heads), kBlock, stream, p);
}

}  // namespace

void launch_extend(const ExtendParams& p, Stream stream) {
  with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    with_head_dim(p.shape.head_dim, [&](auto head_dim) {
      launch_extend_of<T, decltype(head_dim)::value>(p, stream);
    });
  });
}

}  // namespace icecache::gpu

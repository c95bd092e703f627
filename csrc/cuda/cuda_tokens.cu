#include "cuda/launch.h"
#include "cuda/token_kernels.h"

namespace icecache::gpu {
namespace {

// Of a kernel over the rows of `length` tokens of every head.
dim3 grid_of_rows(const StepShape& s, int length) {
  return dim3(blocks_for(static_cast<std::int64_t>(length) * 16, kTokenBlock),
              static_cast<unsigned>(s.kv_heads));
}

}  // namespace

void launch_fetch(const FetchParams& p, Stream stream) {
  if (p.length == 0) return;
  with_type(p.shape.dtype, [&](auto type) {
    launch("fetch", fetch_kernel<decltype(type)>, grid_of_rows(p.shape, p.length), kTokenBlock,
           stream, p);
  });
}

void launch_keep(const KeepParams& p, Stream stream) {
  with_type(p.shape.dtype, [&](auto type) {
    launch("keep", keep_kernel<decltype(type)>, grid_of_rows(p.shape, p.length), kTokenBlock,
           stream, p);
  });
}

void launch_give_extents(const ExtentParams& p, Stream stream) {
  launch("give_extents", give_extents_kernel, dim3(static_cast<unsigned>(p.shape.kv_heads)),
         kExtentsAtOnce, stream, p);
}

void launch_truncate(const TruncateParams& p, Stream stream) {
  with_type(p.shape.dtype, [&](auto type) {
    launch("truncate", truncate_kernel<decltype(type)>,
           dim3(static_cast<unsigned>(p.shape.kv_heads), static_cast<unsigned>(p.count)),
           kTokenBlock, stream, p);
  });
}

}  // namespace icecache::gpu

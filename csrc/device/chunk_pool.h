// ChunkPool: chunks of device memory, which sequences take as they grow (csrc/cuda/step.h).
//
// Threads: one at a time. Streams: new memory is there for all of them. A chunk that comes back may
// be handed out again at once: work that reads it must be over, or ahead of what writes it next.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/device.h"
#include "cuda/step.h"
#include "icecache/error.h"

namespace icecache {

class ChunkPool {
 public:
  // `stream` outlives the pool.
  ChunkPool(std::size_t chunk_bytes, gpu::Stream stream)
      : chunk_bytes_(chunk_bytes), stream_(stream) {}

  // Takes memory for `chunks` in all, at once; from then on there are no more. Throws OutOfPages
  // where the device has less, InvalidArgument where more are there already.
  void limit(std::size_t chunks) {
    if (chunks < chunks_) {
      throw InvalidArgument(message("tokens must be at least ", chunks_ * gpu::kChunkTokens,
                                    ", for which there is memory by now, got ",
                                    chunks * gpu::kChunkTokens));
    }
    if (chunks > chunks_) add(chunks - chunks_);
    limited_ = true;
  }
  // Appends `count` chunks to `to`; all or none. Throws OutOfPages.
  void take(std::size_t count, std::vector<std::byte*>& to) {
    if (free_.size() < count) {
      if (limited_) {
        throw OutOfPages(message("device memory: room for ", count * gpu::kChunkTokens,
                                 " more tokens is wanted, ", free_.size() * gpu::kChunkTokens,
                                 " of ", chunks_ * gpu::kChunkTokens, " are free (limit_tokens)"));
      }
      add(count - free_.size());
    }
    to.insert(to.end(), free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
    free_.resize(free_.size() - count);
  }
  // Takes back all but the first `kept`.
  void give_back(std::vector<std::byte*>& from, std::size_t kept = 0) {
    free_.insert(free_.end(), from.begin() + static_cast<std::ptrdiff_t>(kept), from.end());
    from.resize(kept);
  }
  std::size_t chunk_bytes() const { return chunk_bytes_; }
  std::size_t free_chunks() const { return free_.size(); }
  std::size_t bytes() const { return chunks_ * chunk_bytes_; }

 private:
  void add(std::size_t count) {
    gpu::Buffer slab(count * chunk_bytes_, stream_);
    gpu::synchronize(stream_);
    free_.reserve(chunks_ + count);
    slabs_.push_back(std::move(slab));
    for (std::size_t i = 0; i < count; ++i) {
      free_.push_back(slabs_.back().data() + i * chunk_bytes_);
    }
    chunks_ += count;
  }

  const std::size_t chunk_bytes_;
  const gpu::Stream stream_;
  std::vector<gpu::Buffer> slabs_;
  std::vector<std::byte*> free_;
  std::size_t chunks_ = 0;
  bool limited_ = false;
};

}  // namespace icecache

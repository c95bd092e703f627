// What DeviceCache is made of. Its sources alone see this.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda/build.h"
#include "cuda/device.h"
#include "cuda/tokens.h"
#include "device/chunk_pool.h"
#include "device/device_shape.h"
#include "icecache/device_cache.h"
#include "pages/page_set.h"
#include "threads/thread_pool.h"

namespace icecache {

// What a layer of a sequence is built of.
struct DeviceCache::Prompt {
  const TensorView &keys, &values, &queries;
  bool is_new;  // else the sequence's own tokens, or the first of them
};

struct DeviceCache::Impl {
  static_assert(kRoomStep == gpu::kChunkTokens);
  Impl(const CacheShape& cache_shape, const Config& given, int batch, std::int64_t most, int on);
  // Steps that are under way read the pages.
  ~Impl() {
    pages_ahead = 0;
    gpu::synchronize_device();
  }

  struct Layer {
    gpu::Buffer memory;
    gpu::LayerState state;
    std::vector<PageSet> pages;  // [B] of all heads, [room / S, Hkv]
    // [B][Hkv, tokens of the last build]: gpu::Arrangement.
    std::vector<std::vector<std::int32_t>> order;
    JobGroup job;                // builds that were not waited for
    bool pending = false;        // there are some
    std::vector<char> building;  // [B] of this sequence
  };

  Layer& layer_of(int layer) {
    if (layer < 0 || layer >= shape.num_layers) {
      throw InvalidArgument(
          message("layer must be from 0 to ", shape.num_layers - 1, ", got ", layer));
    }
    return layers[static_cast<std::size_t>(layer)];
  }
  void check_sequence(const char* name, int sequence) const {
    if (sequence < 0 || sequence >= step.batch) {
      throw InvalidArgument(
          message(name, " must be from 0 to ", step.batch - 1, ", got ", sequence));
    }
  }
  void check_view(const char* name, const TensorView& view, int heads, std::int64_t tokens) const {
    const std::int64_t aligned = 16 / static_cast<std::int64_t>(size_of(shape.dtype));
    if (view.dtype != shape.dtype || view.heads != heads || view.dim != shape.head_dim ||
        view.tokens < 1 || (tokens > 0 && view.tokens != tokens)) {
      throw InvalidArgument(message(name, " must be [", heads, ", ",
                                    tokens > 0 ? std::to_string(tokens) : "T", ", ", shape.head_dim,
                                    "] of ", name_of(shape.dtype), ", got [", view.heads, ", ",
                                    view.tokens, ", ", view.dim, "] of ", name_of(view.dtype)));
    }
    if (view.head_stride % aligned != 0 || view.token_stride % aligned != 0 ||
        reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) {
      throw InvalidArgument(
          message(name, " must have strides and an address that are multiples of 16 bytes"));
    }
  }

  // Index tokens of a sequence of `length`.
  std::int64_t indexed(std::int64_t length) const {
    return std::max<std::int64_t>(0, length - step.near_rows());
  }
  // Pages that so many index tokens fill, of all heads.
  std::size_t full_pages(std::int64_t tokens) const {
    return static_cast<std::size_t>(tokens / step.page_size * step.kv_heads);
  }
  // Index tokens for which a sequence with so many chunks has room.
  std::int64_t room_of(std::size_t count) const {
    return std::min<std::int64_t>(static_cast<std::int64_t>(count) * gpu::kChunkTokens,
                                  step.token_room);
  }
  // Extents (cuda/step.h), in device_residents.cpp. Nothing here waits for the device.
  //
  // Gives a sequence extents for `tokens` at least; where too few are free, those of longer
  // sequences, the longest first. False, and nothing changes, where that would not be enough.
  bool keep_resident(int sequence, std::int64_t tokens, gpu::Stream stream);
  // A prompt goes to the extents of its sequence, which is given some at its first layer.
  void keep_prompt(int layer, int sequence, const Prompt& prompt, gpu::Stream stream);
  // Takes a sequence's extents: from now on it is not resident.
  void give_up_extents(int sequence, gpu::Stream stream);
  void fork_extents(int sequence, int from, gpu::Stream stream);
  // Tells the device of the extents from `first` on.
  void give_extents(int sequence, std::size_t first, gpu::Stream stream) const;

  // Has host memory taken for the pages that layers without a prompt will want, of sequences that
  // have room, while the model computes: page-locking takes longer than all else in a build. Where
  // limit_tokens() was called, of one longest sequence besides.
  void take_pages_ahead();

  gpu::BuildParams build_params(const Layer& layer, int sequence, const Prompt& prompt) const;
  // Tells the device what chunks a sequence has, and its room.
  void give_chunks(int sequence, gpu::Stream stream) const {
    const std::vector<std::byte*>& own = chunks[sequence];
    const std::int64_t part = step.part_bytes() * shape.num_layers;
    const std::int64_t first = std::int64_t{sequence} * step.kv_heads;
    std::vector<std::byte*> table(static_cast<std::size_t>(step.kv_heads) * step.chunks());
    for (int h = 0; h < step.kv_heads; ++h) {
      for (std::size_t c = 0; c < own.size(); ++c) {
        table[static_cast<std::size_t>(h) * step.chunks() + c] = own[c] + h * part;
      }
    }
    const std::vector<std::int32_t> room(static_cast<std::size_t>(step.kv_heads),
                                         static_cast<std::int32_t>(room_of(own.size())));
    gpu::copy_to_device(shared.chunks + first * step.chunks(), table.data(),
                        table.size() * sizeof(std::byte*), stream);
    gpu::copy_to_device(shared.room + first, room.data(), room.size() * sizeof(std::int32_t),
                        stream);
    gpu::synchronize(stream);  // the table goes
  }
  // Pages of a sequence that goes on from the first `tokens` index tokens of another (or itself):
  // full ones are shared, the rest is copied. What is under way must not write them.
  PageSet pages_from(const PageSet& source, std::int64_t tokens, const PageOwner& owner) const {
    const auto heads = static_cast<std::size_t>(step.kv_heads);
    const std::size_t full = full_pages(tokens);
    PageSet own(source, full, owner);
    for (std::size_t i = full; i < full + heads && tokens % step.page_size != 0; ++i) {
      std::memcpy(own.data(i), source.data(i), pool.page_bytes());
    }
    return own;
  }
  void give_pages(Layer& layer, int sequence, PageSet pages, gpu::Stream stream) const {
    write_table(layer, sequence, pages, 0, stream);  // waits: pages of before may go
    layer.pages[sequence] = std::move(pages);
  }
  // Tells the device the addresses of a sequence's pages from `first` on.
  void write_table(const Layer& layer, int sequence, const PageSet& pages, std::size_t first,
                   gpu::Stream stream) const {
    const std::vector<std::byte*> table = pages.table(first);
    const std::int64_t at = std::int64_t{sequence} * step.kv_heads * step.pages();
    gpu::copy_to_device(layer.state.pages + at + first, table.data(),
                        table.size() * sizeof(std::byte*), stream);
    gpu::synchronize(stream);  // the table goes
  }
  // Whether a build, or pages of its own in place of shared ones, are needed before a sequence can
  // be what it was at `kept` tokens.
  bool has_to_build(const Layer& layer, int sequence, std::int64_t kept) const {
    return layer.order[sequence].size() / static_cast<std::size_t>(step.kv_heads) >
           static_cast<std::size_t>(indexed(kept));
  }
  bool shares_what_is_written(const Layer& layer, int sequence, std::int64_t kept) const {
    return layer.pages[sequence].is_shared(full_pages(indexed(kept)));
  }
  // Takes back all but `kept` tokens in `count` layers, which need neither.
  void launch_truncate(int layer, int count, int sequence, std::int64_t kept,
                       gpu::Stream stream) const {
    gpu::TruncateParams p;
    p.shape = step;
    p.layers = states.as<gpu::LayerState>() + layer;
    p.count = count;
    p.first_pair = sequence * step.kv_heads;
    p.kept = static_cast<int>(kept);
    gpu::launch_truncate(p, stream);
  }
  // Copies the `length` tokens of a sequence [Hkv, length, D] in order of position.
  void fetch(const Layer& layer, int sequence, std::int64_t length, void* keys, void* values,
             gpu::Stream stream) const {
    const std::vector<std::int32_t>& order = layer.order[sequence];
    const gpu::Buffer on_device(std::max<std::size_t>(1, order.size()) * sizeof(std::int32_t),
                                stream);
    gpu::copy_to_device(on_device.data(), order.data(), order.size() * sizeof(std::int32_t),
                        stream);
    gpu::FetchParams p;
    p.shape = step;
    p.layer = layer.state;
    p.first_pair = sequence * step.kv_heads;
    p.length = static_cast<int>(length);
    p.arranged.order = on_device.as<std::int32_t>();
    p.arranged.count = static_cast<int>(order.size()) / step.kv_heads;
    p.keys = keys;
    p.values = values;
    gpu::launch_fetch(p, stream);
  }

  const CacheShape shape;
  const Config config;  // resolved
  const int device;
  const std::int64_t max_tokens;
  const gpu::StepShape step;
  PagePool pool;
  gpu::OwnStream start;  // of the memory below
  ChunkPool chunk_pool;
  std::vector<std::vector<std::byte*>> chunks;  // [B] of all layers
  ChunkPool extent_pool;
  std::vector<std::vector<std::byte*>> extents;  // [B] of all layers
  std::vector<std::int64_t> named;               // [B] tokens that reserve() was asked for
  gpu::Buffer shared_memory;
  gpu::LayerState shared;  // what layers share of theirs
  gpu::Buffer scratch_memory;
  gpu::StepScratch scratch;
  std::vector<Layer> layers;
  gpu::Buffer states;                        // of all layers: gpu::LayerState
  std::size_t spare_pages = 0;               // of that sequence
  std::atomic<std::size_t> pages_ahead = 0;  // that are to be free
  JobGroup supply;                           // the job that sees to it
  ThreadPool supplier;
  ThreadPool jobs;  // last: the threads of these two use all of the above
};

}  // namespace icecache

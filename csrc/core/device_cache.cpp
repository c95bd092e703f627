#include "icecache/device_cache.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/device_build.h"
#include "core/device_shape.h"
#include "core/page_set.h"
#include "core/thread_pool.h"
#include "cuda/build.h"
#include "cuda/cuda_info.h"
#include "cuda/device.h"
#include "icecache/error.h"

namespace icecache {
namespace {

constexpr std::int64_t kMaxBuilds = 8;  // at a time; each takes device memory for coordinates

PagePool::Options pool_options(const CacheShape& shape, const Config& config) {
  PagePool::Options options;
  options.page_bytes =
      2 * static_cast<std::size_t>(config.page_size) * shape.head_dim * size_of(shape.dtype);
  options.capacity_bytes = static_cast<std::size_t>(config.host_memory);
  options.pinned = true;
  return options;
}

int checked(int device) {
  const CudaInfo info = cuda_info();
  if (info.devices == 0) throw Unavailable("device=cuda: " + info.message);
  if (device < 0 || device >= info.devices) {
    throw InvalidArgument(message("device must be from 0 to ", info.devices - 1, ", got ", device));
  }
  return device;
}

}  // namespace

struct DeviceCache::Impl {
  Impl(const CacheShape& cache_shape, const Config& given, int batch, std::int64_t most, int on)
      : shape(cache_shape),
        config(given.resolved(shape)),
        device(on),
        max_tokens(most),
        step(step_shape(shape, config, given, batch, most)),
        pool(pool_options(shape, config)),
        layers(static_cast<std::size_t>(shape.num_layers)),
        jobs(1, static_cast<int>(std::min(config.index_threads, kMaxBuilds))) {
    const std::size_t layer_bytes = gpu::place(step, nullptr, layers.front().state);
    const std::size_t scratch_bytes = gpu::place(step, nullptr, scratch);
    scratch_memory = gpu::Buffer(scratch_bytes, start.get());
    gpu::place(step, scratch_memory.data(), scratch);
    // Kernels ask for some of it before they know whether they need it.
    gpu::fill(scratch_memory.data(), 0, scratch_bytes, start.get());
    for (Layer& layer : layers) {
      layer.memory = gpu::Buffer(layer_bytes, start.get());
      gpu::place(step, layer.memory.data(), layer.state);
      // Lengths of -1: no sequences. Metrics of 0 are never read before a prefill sets them.
      gpu::fill(layer.state.lengths, 0xff, sizeof(std::int32_t) * step.pairs(), start.get());
      gpu::fill(layer.state.counters, 0, sizeof(unsigned long long) * 4 * step.pairs(),
                start.get());
      layer.pages.resize(static_cast<std::size_t>(batch));
      layer.building.resize(static_cast<std::size_t>(batch));
    }
    gpu::synchronize(start.get());
  }
  // Steps that are under way read the pages.
  ~Impl() { gpu::synchronize_device(); }

  struct Layer {
    gpu::Buffer memory;
    gpu::LayerState state;
    std::vector<PageSet> pages;  // [B] of all heads, [Hkv, N / S]
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

  const CacheShape shape;
  const Config config;  // resolved
  const int device;
  const std::int64_t max_tokens;
  const gpu::StepShape step;
  PagePool pool;
  gpu::OwnStream start;  // of the memory below
  gpu::Buffer scratch_memory;
  gpu::StepScratch scratch;
  std::vector<Layer> layers;
  ThreadPool jobs;  // last: its threads use all of the above
};

DeviceCache::DeviceCache(const CacheShape& shape, const Config& config, int batch,
                         std::int64_t max_tokens, int device) {
  shape.validate();
  const gpu::DeviceScope here(checked(device));
  impl_ = std::make_unique<Impl>(shape, config, batch, max_tokens, device);
}

DeviceCache::~DeviceCache() {
  const gpu::DeviceScope here(impl_->device);
  impl_.reset();
}

void DeviceCache::prefill(int layer_number, int sequence, const TensorView& keys,
                          const TensorView& values, const TensorView& queries, Stream stream) {
  Impl& self = *impl_;
  Impl::Layer& layer = self.layer_of(layer_number);
  const gpu::StepShape& s = self.step;
  self.check_sequence("sequence", sequence);
  self.check_view("keys", keys, s.kv_heads, 0);
  self.check_view("values", values, s.kv_heads, keys.tokens);
  self.check_view("queries", queries, s.kv_heads * s.group, 0);
  if (keys.tokens > s.near_rows() + s.token_room) {
    throw InvalidArgument(message("a prompt must have at most max_tokens = ", self.max_tokens,
                                  " tokens, got ", keys.tokens));
  }
  const gpu::DeviceScope here(self.device);
  gpu::check_stream(stream, self.device);
  if (layer.building[sequence] != 0) wait(layer_number);  // one build of a sequence at a time
  // Pages that a fork shares are not written.
  if (layer.pages[sequence].size() == 0 || layer.pages[sequence].is_shared()) {
    layer.pages[sequence] = PageSet(self.pool, static_cast<std::size_t>(s.kv_heads) * s.pages(),
                                    {sequence, layer_number, -1});
  }

  gpu::BuildParams p;
  p.shape = s;
  p.layer = layer.state;
  p.first_pair = sequence * s.kv_heads;
  p.length = static_cast<int>(keys.tokens);
  p.indexed = std::max(0, p.length - s.near_rows());
  p.first = p.indexed > 0 || p.length > 2 * s.sink_tokens ? s.sink_tokens : 0;
  p.keys = keys.data;
  p.values = values.data;
  p.key_head = keys.head_stride;
  p.key_token = keys.token_stride;
  p.value_head = values.head_stride;
  p.value_token = values.token_stride;
  p.queries = queries.data;
  p.query_head = queries.head_stride;
  p.query_token = queries.token_stride;
  p.query_tokens = static_cast<int>(queries.tokens);
  p.key_samples = std::min(gpu::kMaxSampledKeys, p.length - p.first);
  p.query_samples =
      static_cast<int>(std::min<std::int64_t>(gpu::kMaxQueries / s.group, queries.tokens)) *
      s.group;
  auto ready = std::make_shared<gpu::Event>();
  ready->record(stream);
  layer.pending = true;
  layer.building[sequence] = 1;
  self.jobs.submit(layer.job, [&self, &layer, p, ready, sequence] {
    const gpu::DeviceScope on(self.device);
    const gpu::OwnStream build;
    ready->wait_on(build.get());
    DeviceBuild(p, build.get()).run(layer.pages[sequence].table());
  });
}

bool DeviceCache::built(int layer) {
  return impl_->layer_of(layer).job.done();
}

void DeviceCache::wait(int layer_number) {
  Impl::Layer& layer = impl_->layer_of(layer_number);
  if (!layer.pending) return;
  layer.pending = false;
  std::fill(layer.building.begin(), layer.building.end(), 0);
  impl_->jobs.wait(layer.job);
}

void DeviceCache::step(int layer_number, const void* queries, const void* keys, const void* values,
                       void* out, Stream stream, const std::int32_t* rows) {
  Impl& self = *impl_;
  Impl::Layer& layer = self.layer_of(layer_number);
  const gpu::DeviceScope here(self.device);
  wait(layer_number);
  gpu::StepParams params;
  params.shape = self.step;
  params.layer = layer.state;
  params.scratch = self.scratch;
  params.rows = rows;
  params.queries = queries;
  params.keys = keys;
  params.values = values;
  params.out = out;
  gpu::launch_step(params, stream);
}

void DeviceCache::rebuild(int layer_number, int sequence, Stream stream) {
  Impl& self = *impl_;
  const gpu::StepShape& s = self.step;
  const std::int64_t tokens = length(layer_number, sequence, stream);
  if (tokens <= s.near_rows()) return;
  const gpu::DeviceScope here(self.device);
  const std::int64_t d = s.head_dim;
  const auto bytes = static_cast<std::size_t>(tokens * s.kv_heads * d) * size_of(s.dtype);
  const gpu::Buffer keys(bytes, stream), values(bytes, stream);
  gather(layer_number, sequence, keys.data(), values.data(), stream);
  const auto view = [&](void* data, int heads, std::int64_t rows) {
    return TensorView{data, s.dtype, heads, rows, d, rows * d, d};
  };
  auto* queries = static_cast<std::byte*>(self.layers[layer_number].state.recent_queries) +
                  std::int64_t{sequence} * s.kv_heads * s.group * gpu::kRecentQueries * d *
                      static_cast<std::int64_t>(size_of(s.dtype));
  // The ring is read before the build writes it: a copy.
  const std::int64_t rows = std::int64_t{s.kv_heads} * s.group;
  const auto query_bytes =
      static_cast<std::size_t>(rows * gpu::kRecentQueries * d) * size_of(s.dtype);
  const gpu::Buffer recent(query_bytes, stream);
  gpu::copy_on_device(recent.data(), queries, query_bytes, stream);
  prefill(layer_number, sequence, view(keys.data(), s.kv_heads, tokens),
          view(values.data(), s.kv_heads, tokens),
          view(recent.data(), static_cast<int>(rows), gpu::kRecentQueries), stream);
  wait(layer_number);
}

void DeviceCache::fork(int sequence, int from, Stream stream) {
  Impl& self = *impl_;
  const gpu::StepShape& s = self.step;
  self.check_sequence("sequence", sequence);
  self.check_sequence("from", from);
  if (sequence == from) return;
  const gpu::DeviceScope here(self.device);
  for (int number = 0; number < self.shape.num_layers; ++number) {
    Impl::Layer& layer = self.layers[number];
    const PageSet& source = layer.pages[from];
    if (source.size() == 0) {
      throw InvalidArgument(message("from must be a sequence that holds tokens, got ", from));
    }
    const std::int64_t tokens =
        std::max<std::int64_t>(0, length(number, from, stream) - s.near_rows());
    const auto full = static_cast<std::size_t>(tokens / s.page_size);
    const auto pages = static_cast<std::size_t>(s.pages());
    PageSet own(source, full, pages, {sequence, number, -1});
    for (std::size_t i = full; i < own.size() && tokens % s.page_size != 0; i += pages) {
      std::memcpy(own.data(i), source.data(i), self.pool.page_bytes());
    }
    const std::vector<std::byte*> table = own.table();
    layer.pages[sequence] = std::move(own);
    const std::int64_t pair = static_cast<std::int64_t>(sequence) * s.kv_heads;
    gpu::copy_pairs(s, layer.state, static_cast<std::int64_t>(from) * s.kv_heads, pair, stream);
    gpu::copy_to_device(layer.state.pages + pair * s.pages(), table.data(),
                        table.size() * sizeof(std::byte*), stream);
    gpu::synchronize(stream);
  }
}

void DeviceCache::release(int sequence, Stream stream) {
  Impl& self = *impl_;
  self.check_sequence("sequence", sequence);
  const gpu::DeviceScope here(self.device);
  for (int number = 0; number < self.shape.num_layers; ++number) {
    wait(number);
    Impl::Layer& layer = self.layers[number];
    gpu::fill(layer.state.lengths + sequence * self.step.kv_heads, 0xff,
              sizeof(std::int32_t) * self.step.kv_heads, stream);
  }
  gpu::synchronize(stream);  // steps that read the pages
  for (Impl::Layer& layer : self.layers) layer.pages[sequence] = PageSet();
}

std::int64_t DeviceCache::length(int layer_number, int sequence, Stream stream) {
  Impl& self = *impl_;
  Impl::Layer& layer = self.layer_of(layer_number);
  self.check_sequence("sequence", sequence);
  const gpu::DeviceScope here(self.device);
  wait(layer_number);
  std::int32_t tokens = 0;
  gpu::copy_to_host(&tokens, layer.state.lengths + sequence * self.step.kv_heads, sizeof tokens,
                    stream);
  gpu::synchronize(stream);
  return std::max(0, tokens);
}

void DeviceCache::gather(int layer_number, int sequence, void* keys, void* values, Stream stream) {
  Impl& self = *impl_;
  const gpu::StepShape& s = self.step;
  const std::int64_t tokens = length(layer_number, sequence, stream);
  const gpu::DeviceScope here(self.device);
  gpu::FetchParams p;
  p.shape = s;
  p.layer = self.layer_of(layer_number).state;
  p.first_pair = sequence * s.kv_heads;
  p.near = static_cast<int>(std::min<std::int64_t>(tokens, s.near_rows()));
  p.indexed = static_cast<int>(tokens) - p.near;
  p.keys = keys;
  p.values = values;
  gpu::launch_fetch(p, stream);
}

DeviceCacheStats DeviceCache::stats(int layer_number, int kv_head, Stream stream) {
  Impl& self = *impl_;
  Impl::Layer& layer = self.layer_of(layer_number);
  if (kv_head < -1 || kv_head >= self.step.kv_heads) {
    throw InvalidArgument(message("kv_head must be from 0 to ", self.step.kv_heads - 1,
                                  ", or -1 for all, got ", kv_head));
  }
  const gpu::DeviceScope here(self.device);
  std::vector<unsigned long long> counters(static_cast<std::size_t>(self.step.pairs()) * 4);
  gpu::copy_to_host(counters.data(), layer.state.counters,
                    counters.size() * sizeof(unsigned long long), stream);
  gpu::synchronize(stream);
  DeviceCacheStats sum;
  for (std::size_t i = 0; i < counters.size(); i += 4) {
    if (kv_head >= 0 && static_cast<int>(i / 4) % self.step.kv_heads != kv_head) continue;
    sum.hits += static_cast<std::int64_t>(counters[i]);
    sum.misses += static_cast<std::int64_t>(counters[i + 1]);
    sum.bytes_moved += static_cast<std::int64_t>(counters[i + 2]);
    sum.steps += static_cast<std::int64_t>(counters[i + 3]);
  }
  return sum;
}

DeviceCacheMemory DeviceCache::memory() const {
  const Impl& self = *impl_;
  const gpu::StepShape& s = self.step;
  DeviceCacheMemory memory;
  const auto layers = static_cast<std::int64_t>(self.layers.size());
  memory.scratch_bytes = static_cast<std::int64_t>(self.scratch_memory.bytes());
  memory.rows_bytes =
      layers * s.pairs() * s.rows() * s.head_dim * 2 * static_cast<std::int64_t>(size_of(s.dtype));
  const std::int64_t all = layers * static_cast<std::int64_t>(self.layers.front().memory.bytes());
  memory.index_bytes = all - memory.rows_bytes;
  memory.device_bytes = all + memory.scratch_bytes;
  memory.host_bytes = static_cast<std::int64_t>(self.pool.used_pages() * self.pool.page_bytes());
  return memory;
}

const CacheShape& DeviceCache::shape() const {
  return impl_->shape;
}

const Config& DeviceCache::config() const {
  return impl_->config;
}

int DeviceCache::batch() const {
  return impl_->step.batch;
}

std::int64_t DeviceCache::max_tokens() const {
  return impl_->max_tokens;
}

}  // namespace icecache

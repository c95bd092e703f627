#include <limits>

#include "cuda/cuda_info.h"
#include "device/device_build.h"
#include "device/device_cache_impl.h"
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

DeviceCache::Impl::Impl(const CacheShape& cache_shape, const Config& given, int batch,
                        std::int64_t most, int on)
    : shape(cache_shape),
      config(given.resolved(shape)),
      device(on),
      max_tokens(most),
      step(step_shape(shape, config, given, batch, most)),
      pool(pool_options(shape, config)),
      chunk_pool(static_cast<std::size_t>(step.part_bytes() * step.kv_heads * shape.num_layers),
                 start.get()),
      chunks(static_cast<std::size_t>(batch)),
      extent_pool(
          static_cast<std::size_t>(step.extent_part_bytes() * step.kv_heads * shape.num_layers),
          start.get()),
      extents(static_cast<std::size_t>(batch)),
      named(static_cast<std::size_t>(batch)),
      layers(static_cast<std::size_t>(shape.num_layers)),
      supplier(1, 1),
      jobs(1, static_cast<int>(std::min(config.index_threads, kMaxBuilds))) {
  const std::size_t layer_bytes = gpu::place(step, nullptr, layers.front().state);
  const std::size_t scratch_bytes = gpu::place(step, nullptr, scratch);
  const std::size_t shared_bytes = gpu::place_shared(step, nullptr, shared);
  shared_memory = gpu::Buffer(shared_bytes, start.get());
  gpu::place_shared(step, shared_memory.data(), shared);
  gpu::fill(shared_memory.data(), 0, shared_bytes, start.get());
  scratch_memory = gpu::Buffer(scratch_bytes, start.get());
  gpu::place(step, scratch_memory.data(), scratch);
  // Kernels ask for some of it before they know whether they need it.
  gpu::fill(scratch_memory.data(), 0, scratch_bytes, start.get());
  for (Layer& layer : layers) {
    layer.memory = gpu::Buffer(layer_bytes, start.get());
    layer.state = shared;
    layer.state.in_chunk = (&layer - layers.data()) * step.part_bytes();
    layer.state.in_extent = (&layer - layers.data()) * step.extent_part_bytes();
    gpu::place(step, layer.memory.data(), layer.state);
    // Lengths of -1: no sequences. Metrics of 0 are never read before a prefill sets them.
    gpu::fill(layer.state.lengths, 0xff, sizeof(std::int32_t) * step.pairs(), start.get());
    gpu::fill(layer.state.counters, 0, sizeof(unsigned long long) * gpu::kCounters * step.pairs(),
              start.get());
    // Never a length.
    gpu::fill(layer.state.resident, 0x80, sizeof(std::int32_t) * step.pairs(), start.get());
    layer.pages.resize(static_cast<std::size_t>(batch));
    layer.order.resize(static_cast<std::size_t>(batch));
    layer.building.resize(static_cast<std::size_t>(batch));
  }
  std::vector<gpu::LayerState> of_layers;
  for (const Layer& layer : layers) of_layers.push_back(layer.state);
  states = gpu::Buffer(of_layers.size() * sizeof(gpu::LayerState), start.get());
  gpu::copy_to_device(states.data(), of_layers.data(), states.bytes(), start.get());
  const std::int64_t wanted = gpu::extents_of(config.device_tokens);
  if (wanted > 0) {
    extent_pool.limit(static_cast<std::size_t>(
        std::min(wanted, std::int64_t{batch} * std::int64_t{step.extents})));
  }
  gpu::synchronize(start.get());
}

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
  build(layer_number, sequence, {keys, values, queries, true}, stream);
}

gpu::BuildParams DeviceCache::Impl::build_params(const Layer& layer, int sequence,
                                                 const Prompt& prompt) const {
  const auto& [keys, values, queries, is_new] = prompt;
  gpu::BuildParams p;
  p.shape = step;
  p.layer = layer.state;
  p.first_pair = sequence * step.kv_heads;
  p.length = static_cast<int>(keys.tokens);
  p.indexed = std::max(0, p.length - step.near_rows());
  p.first = p.indexed > 0 || p.length > 2 * step.sink_tokens ? step.sink_tokens : 0;
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
      static_cast<int>(std::min<std::int64_t>(gpu::kMaxQueries / step.group, queries.tokens)) *
      step.group;
  // Within the budget all tokens are attended; rebuild() fits a space when there are more.
  p.is_fitted = !is_new || extents[sequence].empty() || p.length > config.dense_tokens;
  return p;
}

void DeviceCache::Impl::take_pages_ahead() {
  std::size_t wanted = spare_pages;
  for (std::size_t b = 0; b < chunks.size(); ++b) {
    if (chunks[b].empty()) continue;
    const std::size_t pages = full_pages(room_of(chunks[b].size()));
    for (const Layer& layer : layers) wanted += layer.pages[b].size() == 0 ? pages : 0;
  }
  pages_ahead = wanted;
  if (wanted == 0 || !supply.done()) return;  // a job that is under way sees the number
  supplier.submit(supply, [this] {
    const gpu::DeviceScope on(device);
    while (pool.take_ahead(pages_ahead)) {
    }
  });
}

void DeviceCache::build(int layer_number, int sequence, const Prompt& prompt, Stream stream) {
  const TensorView &keys = prompt.keys, &values = prompt.values, &queries = prompt.queries;
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
  make_room(sequence, self.chunks[sequence].empty() ? self.max_tokens : keys.tokens, stream);
  // Pages that a fork shares are not written.
  if (layer.pages[sequence].size() == 0 || layer.pages[sequence].is_shared()) {
    const std::int64_t room = self.room_of(self.chunks[sequence].size());
    layer.pages[sequence] =
        PageSet(self.pool, self.full_pages(room), static_cast<std::size_t>(s.kv_heads),
                {sequence, layer_number, -1});
    self.take_pages_ahead();
  }
  // Others lose extents when nothing of this call can fail any more.
  self.keep_prompt(layer_number, sequence, prompt, stream);

  const gpu::BuildParams p = self.build_params(layer, sequence, prompt);
  auto ready = std::make_shared<gpu::Event>();
  ready->record(stream);
  layer.pending = true;
  layer.building[sequence] = 1;
  // By value: pages may be added meanwhile.
  self.jobs.submit(layer.job,
                   [&self, &layer, p, ready, sequence, table = layer.pages[sequence].table()] {
                     const gpu::DeviceScope on(self.device);
                     const gpu::OwnStream build;
                     ready->wait_on(build.get());
                     layer.order[sequence] = DeviceBuild(p, build.get()).run(table);
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
                       void* out, Stream stream, const std::int32_t* rows, int tokens) {
  static_assert(kStepTokens == gpu::kMaxStepTokens);
  Impl& self = *impl_;
  Impl::Layer& layer = self.layer_of(layer_number);
  const int most = rows == nullptr ? 1 : kStepTokens;
  if (tokens < 1 || tokens > most) {
    throw InvalidArgument(message("tokens must be from 1 to ", most,
                                  rows == nullptr ? " without rows" : "", ", got ", tokens));
  }
  const gpu::DeviceScope here(self.device);
  wait(layer_number);
  gpu::StepParams params;
  params.shape = self.step;
  params.layer = layer.state;
  params.scratch = self.scratch;
  params.rows = rows;
  params.tokens = tokens;
  params.queries = queries;
  params.keys = keys;
  params.values = values;
  params.out = out;
  gpu::launch_step(params, stream);
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

HeadStats DeviceCache::stats(int layer_number, int kv_head, Stream stream) {
  Impl& self = *impl_;
  Impl::Layer& layer = self.layer_of(layer_number);
  if (kv_head < -1 || kv_head >= self.step.kv_heads) {
    throw InvalidArgument(message("kv_head must be from 0 to ", self.step.kv_heads - 1,
                                  ", or -1 for all, got ", kv_head));
  }
  const gpu::DeviceScope here(self.device);
  std::vector<unsigned long long> counters(static_cast<std::size_t>(self.step.pairs()) *
                                           gpu::kCounters);
  gpu::copy_to_host(counters.data(), layer.state.counters,
                    counters.size() * sizeof(unsigned long long), stream);
  gpu::synchronize(stream);
  HeadStats sum;
  sum.mass = sum.worst_mass = std::numeric_limits<double>::quiet_NaN();
  for (std::size_t i = 0; i < counters.size(); i += gpu::kCounters) {
    if (kv_head >= 0 && static_cast<int>(i / gpu::kCounters) % self.step.kv_heads != kv_head)
      continue;
    sum.hits += static_cast<std::int64_t>(counters[i]);
    sum.misses += static_cast<std::int64_t>(counters[i + 1]);
    sum.bytes_moved += static_cast<std::int64_t>(counters[i + 2]);
    sum.steps += static_cast<std::int64_t>(counters[i + 3]);
    sum.dense_steps += static_cast<std::int64_t>(counters[i + 4]);
  }
  return sum;
}

DeviceCacheMemory DeviceCache::memory() const {
  const Impl& self = *impl_;
  const gpu::StepShape& s = self.step;
  const gpu::DeviceScope here(self.device);
  DeviceCacheMemory memory;
  const auto layers = static_cast<std::int64_t>(self.layers.size());
  memory.scratch_bytes = static_cast<std::int64_t>(self.scratch_memory.bytes());
  memory.rows_bytes =
      layers * s.pairs() * s.rows() * s.head_dim * 2 * static_cast<std::int64_t>(size_of(s.dtype));
  const auto all =
      static_cast<std::int64_t>(self.layers.size() * self.layers.front().memory.bytes() +
                                self.shared_memory.bytes() + self.chunk_pool.bytes());
  memory.index_bytes = all - memory.rows_bytes;
  memory.resident_bytes = static_cast<std::int64_t>(self.extent_pool.bytes());
  for (std::size_t b = 0; b < self.extents.size(); ++b) {
    const bool holds = std::any_of(self.layers.begin(), self.layers.end(),
                                   [&](const auto& layer) { return layer.pages[b].size() > 0; });
    if (!holds) continue;
    (self.extents[b].empty() ? memory.sparse_sequences : memory.resident_sequences) += 1;
  }
  memory.device_bytes = all + memory.scratch_bytes + memory.resident_bytes;
  memory.token_bytes = static_cast<std::int64_t>(self.chunk_pool.chunk_bytes()) / gpu::kChunkTokens;
  const gpu::MemoryInfo on_device = gpu::memory_info();
  memory.free_bytes = static_cast<std::int64_t>(on_device.free);
  memory.total_bytes = static_cast<std::int64_t>(on_device.total);
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

int DeviceCache::device() const {
  return impl_->device;
}

}  // namespace icecache

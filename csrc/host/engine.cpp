#include "icecache/engine.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <set>
#include <utility>

#include "host/engine_impl.h"
#include "host/tensor_overlap.h"
#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

Integrity parse_integrity(const std::string& text) {
  if (text == "always") return Integrity::kAlways;
  return text == "sampled" ? Integrity::kSampled : Integrity::kOff;
}

PagePool::Options pool_options(const CacheShape& shape, const Config& config) {
  PagePool::Options options;
  options.page_bytes = 2 * static_cast<std::size_t>(config.page_size) *
                       row_bytes_of(config.stored_dtype(shape.dtype), shape.head_dim);
  options.capacity_bytes = static_cast<std::size_t>(config.host_memory);
  options.integrity = parse_integrity(config.integrity);
  options.poison_freed = config.integrity == "always";
  return options;
}

const CacheShape& validated(const CacheShape& shape) {
  shape.validate();
  return shape;
}

}  // namespace

Engine::Impl::Impl(const CacheShape& cache_shape, const Config& user_config)
    : shape(validated(cache_shape)),
      config(user_config.resolved(shape)),
      mutex(threads),
      pool(pool_options(shape, config)),
      stats(static_cast<std::size_t>(shape.num_layers) * shape.num_kv_heads),
      workspaces(static_cast<std::size_t>(config.num_threads)),
      threads(static_cast<int>(config.num_threads), static_cast<int>(config.index_threads)) {
  if (config.device_tokens != 0) {
    throw InvalidArgument(
        message("device_tokens must be 0 on the CPU, whose memory holds all tokens anyway, got ",
                config.device_tokens, "; dense_tokens or exact attend to everything there"));
  }
}

SequenceCache& Engine::Impl::sequence(SeqId id) {
  const auto found = sequences.find(id);
  if (found == sequences.end()) {
    throw InvalidArgument(message("sequence must be one of this engine's ", sequences.size(),
                                  " live sequences, got ", id));
  }
  return found->second;
}

LayerCache& Engine::Impl::layer_of(SeqId id, int layer) {
  check_layer(layer);
  LayerCache& cache = sequence(id).layers[layer];
  settle(cache, layer);
  return cache;
}

void Engine::Impl::finish(LayerCache& layer, int number) noexcept {
  threads.finish(layer.jobs);
  if (const auto update = std::exchange(layer.update, nullptr); update != nullptr) {
    try {
      update->run_failed();
    } catch (...) {
      layer.error = std::current_exception();
    }
  }
  for (std::size_t h = 0; h < layer.job_stats.size(); ++h) {
    collect(number, static_cast<int>(h), layer.job_stats[h]);
    layer.job_stats[h] = {};
  }
}

void Engine::Impl::settle(LayerCache& layer, int number) {
  finish(layer, number);
  if (layer.error) std::rethrow_exception(std::exchange(layer.error, nullptr));
  threads.wait(layer.jobs);
}

void Engine::Impl::settle(SequenceCache& sequence) {
  for (std::size_t l = 0; l < sequence.layers.size(); ++l) {
    settle(sequence.layers[l], static_cast<int>(l));
  }
}

void Engine::Impl::rest(SequenceCache& sequence) noexcept {
  for (std::size_t l = 0; l < sequence.layers.size(); ++l) {
    finish(sequence.layers[l], static_cast<int>(l));
    for (JobGroup& builds : sequence.layers[l].builds) threads.finish(builds);
  }
}

void Engine::Impl::rest() noexcept {
  for (auto& [id, sequence] : sequences) rest(sequence);
}

bool Engine::Impl::drop_builds_for(std::size_t pages) {
  std::size_t room = pool.free_pages();
  const auto for_each_head = [this](const auto& body) {
    for (auto& [id, sequence] : sequences) {
      for (LayerCache& layer : sequence.layers) {
        for (HeadCache& head : layer.heads) body(head);
      }
    }
  };
  for_each_head([&](const HeadCache& head) { room += head.build_pages(); });
  if (pages > room) return false;
  for_each_head([](HeadCache& head) { head.drop_builds(); });
  return true;
}

bool Engine::Impl::has_pages(std::size_t pages) {
  // Promised pages are those of work that has not started, once all that has is over.
  const auto fit = [&] { return pages + promised_pages.load() <= pool.free_pages(); };
  if (pages == 0 || fit()) return true;
  if (pages > pool.capacity_pages()) return false;
  if (promised_pages.load() != 0) rest();
  while (!fit()) {
    if (!evict_one()) return false;
  }
  return true;
}

Engine::Impl::Promise Engine::Impl::promise(std::size_t pages) {
  struct Kept {
    Kept(std::atomic<std::size_t>& all, std::size_t pages) : total(all), count(pages) {
      total.fetch_add(count);
    }
    ~Kept() { total.fetch_sub(count); }
    std::atomic<std::size_t>& total;
    const std::size_t count;
  };
  return std::make_shared<const Kept>(promised_pages, pages);
}

void Engine::Impl::collect_all(SequenceCache& sequence) noexcept {
  for (std::size_t l = 0; l < sequence.layers.size(); ++l) {
    std::vector<HeadCache>& heads = sequence.layers[l].heads;
    for (std::size_t h = 0; h < heads.size(); ++h) {
      collect(static_cast<int>(l), static_cast<int>(h), heads[h].take_stats(heads[h].length()));
    }
  }
}

void Engine::Impl::collect(int layer, int head, const HeadStats& add) noexcept {
  stats[static_cast<std::size_t>(layer) * shape.num_kv_heads + head] += add;
}

Engine::Engine(const CacheShape& shape, const Config& config)
    : impl_(std::make_unique<Impl>(shape, config)) {}

Engine::~Engine() {
  // What another thread was about to change when the process forked cannot be taken apart.
  if (impl_->mutex.is_lost()) [[maybe_unused]]
    const Impl* leaked = impl_.release();
}

std::int64_t Engine::length(SeqId sequence, int layer) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->layer_of(sequence, layer).length();
}

void Engine::synchronize() {
  const std::lock_guard lock(impl_->mutex);
  impl_->rest();
}

void Engine::gather(SeqId sequence, int layer, const TensorView& keys,
                    const TensorView& values) const {
  const std::lock_guard lock(impl_->mutex);
  const LayerCache& cache = impl_->layer_of(sequence, layer);
  impl_->check_view("keys", keys, impl_->shape.num_kv_heads);
  impl_->check_view("values", values, impl_->shape.num_kv_heads);
  for (const TensorView* view : {&keys, &values}) {
    if (view->tokens != cache.length() || view->token_stride != view->dim) {
      throw InvalidArgument(message("keys and values must be contiguous rows of ", cache.length(),
                                    " tokens, got ", view->tokens, " tokens with stride ",
                                    view->token_stride));
    }
  }
  if (const TensorView written[] = {keys, values}; rows_overlap(written)) {
    throw InvalidArgument(
        "keys and values must have memory of their own for every row, got rows "
        "that share");
  }
  for (int h = 0; h < impl_->shape.num_kv_heads; ++h) {
    cache.heads[h].gather(keys.at(h, 0), values.at(h, 0));
  }
}

HeadStats Engine::stats(int layer, int kv_head) const {
  const std::lock_guard lock(impl_->mutex);
  if (layer < 0 || layer >= impl_->shape.num_layers || kv_head < 0 ||
      kv_head >= impl_->shape.num_kv_heads) {
    throw InvalidArgument(message("layer and kv_head must be below ", impl_->shape.num_layers,
                                  " and ", impl_->shape.num_kv_heads, ", got ", layer, " and ",
                                  kv_head));
  }
  HeadStats sum =
      impl_->stats[static_cast<std::size_t>(layer) * impl_->shape.num_kv_heads + kv_head];
  for (const auto& [id, sequence] : impl_->sequences) {
    sequence.layers[layer].heads[kv_head].add_last_stats(sum);
  }
  return sum;
}

void Engine::reset_stats() {
  const std::lock_guard lock(impl_->mutex);
  for (auto& [id, sequence] : impl_->sequences) impl_->collect_all(sequence);
  std::fill(impl_->stats.begin(), impl_->stats.end(), HeadStats{});
}

void Engine::Impl::count_retained(MemoryStats& memory) const {
  std::vector<bool> held(pool.capacity_pages());
  const auto mark = [&](bool retained) {
    std::int64_t sequences_of_kind = 0;
    for (const auto& [id, sequence] : sequences) {
      if ((sequence.retained != 0) != retained) continue;
      ++sequences_of_kind;
      for (const LayerCache& layer : sequence.layers) {
        for (const HeadCache& head : layer.heads) head.mark_pages(held);
      }
    }
    return sequences_of_kind;
  };
  mark(false);
  const auto before = std::count(held.begin(), held.end(), true);
  memory.retained_sequences = mark(true);
  memory.retained_bytes = (std::count(held.begin(), held.end(), true) - before) *
                          static_cast<std::int64_t>(pool.page_bytes());
}

MemoryStats Engine::memory() const {
  const std::lock_guard lock(impl_->mutex);
  MemoryStats memory;
  const std::int64_t page_bytes = static_cast<std::int64_t>(impl_->pool.page_bytes());
  std::int64_t run_pages = 0;
  std::set<const SemanticIndex*> counted;  // forks share them
  for (auto& [id, sequence] : impl_->sequences) {
    impl_->settle(sequence);
    for (const LayerCache& layer : sequence.layers) {
      for (const HeadCache& head : layer.heads) {
        memory.index_bytes += static_cast<std::int64_t>(head.index_bytes(counted));
        memory.query_bytes += static_cast<std::int64_t>(head.query_bytes());
        run_pages += static_cast<std::int64_t>(head.run_pages());
      }
    }
  }
  const std::int64_t used = static_cast<std::int64_t>(impl_->pool.used_pages());
  memory.pool_bytes = used * page_bytes;
  memory.pool_capacity = static_cast<std::int64_t>(impl_->pool.capacity_pages()) * page_bytes;
  const std::int64_t cached =
      std::clamp<std::int64_t>(used - run_pages, 0, impl_->config.device_pages);
  memory.device_bytes = memory.index_bytes + (run_pages + cached) * page_bytes;
  memory.sequences = static_cast<std::int64_t>(impl_->sequences.size());
  memory.evicted_sequences = impl_->evicted;
  impl_->count_retained(memory);
  return memory;
}

std::int64_t Engine::pool_bytes() const {
  return static_cast<std::int64_t>(impl_->pool.used_pages() * impl_->pool.page_bytes());
}

StepTrace Engine::trace(SeqId sequence, int layer, int kv_head) const {
  const std::lock_guard lock(impl_->mutex);
  const LayerCache& cache = impl_->layer_of(sequence, layer);
  if (kv_head < 0 || kv_head >= impl_->shape.num_kv_heads) {
    throw InvalidArgument(
        message("kv_head must be from 0 to ", impl_->shape.num_kv_heads - 1, ", got ", kv_head));
  }
  return cache.heads[kv_head].trace();
}

void Engine::check_integrity() const {
  const std::lock_guard lock(impl_->mutex);
  impl_->rest();
  for (const auto& [id, sequence] : impl_->sequences) {
    for (const LayerCache& layer : sequence.layers) {
      for (const HeadCache& head : layer.heads) head.check_integrity();
    }
  }
  impl_->pool.check_integrity();
}

const CacheShape& Engine::shape() const {
  return impl_->shape;
}
const Config& Engine::config() const {
  return impl_->config;
}

}  // namespace icecache

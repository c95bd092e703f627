// The sequences of an engine: how they begin, part, are cut, are retained and end.
#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "host/engine_impl.h"
#include "icecache/error.h"

namespace icecache {

SeqId Engine::new_sequence() {
  const std::lock_guard lock(impl_->mutex);
  const SeqId id = impl_->next_sequence;
  SequenceCache cache;
  for (int l = 0; l < impl_->shape.num_layers; ++l) {
    LayerCache layer;
    for (int h = 0; h < impl_->shape.num_kv_heads; ++h) {
      HeadContext context;
      context.pool = &impl_->pool;
      context.owner = {id, l, h};
      context.config = &impl_->config;
      context.head_dim = impl_->shape.head_dim;
      context.group = impl_->shape.group();
      context.dtype = impl_->shape.dtype;
      context.scale = impl_->shape.softmax_scale();
      context.logit_softcap = impl_->shape.logit_softcap;
      layer.heads.emplace_back(context, impl_->config.exact || impl_->config.is_dense_layer(l));
    }
    layer.job_stats.resize(layer.heads.size());
    cache.layers.push_back(std::move(layer));
  }
  impl_->sequences.emplace(id, std::move(cache));
  ++impl_->next_sequence;
  return id;
}

SeqId Engine::fork(SeqId sequence) {
  return impl_->fork(sequence, std::nullopt);
}

SeqId Engine::fork(SeqId sequence, std::int64_t length) {
  return impl_->fork(sequence, length);
}

SeqId Engine::Impl::fork(SeqId id, std::optional<std::int64_t> length) {
  const std::lock_guard lock(mutex);
  SequenceCache& source = sequence(id);
  settle(source);
  for (LayerCache& layer : source.layers) wait_for_builds(layer, layer.length());
  if (length) check_length(id, source, *length);
  SequenceCache copy = source;
  copy.retained = 0;
  if (length) truncate(copy, *length);
  sequences.emplace(next_sequence, std::move(copy));
  if (source.retained != 0) source.retained = ++retained_clock;
  return next_sequence++;
}

void Engine::Impl::truncate(std::span<const Kept> layers) {
  std::vector<HeadCache::Truncation> truncations;
  for (const auto& [layer, length] : layers) {
    for (const HeadCache& head : layer->heads) truncations.push_back(head.prepare_truncate(length));
  }
  auto next = truncations.begin();
  for (const auto& [layer, length] : layers) {
    for (HeadCache& head : layer->heads) head.truncate(std::move(*next++), true);
    layer->undecided.end = std::min(layer->undecided.end, length);
  }
}

void Engine::Impl::truncate(SequenceCache& sequence, std::int64_t length) {
  std::vector<Kept> kept;
  for (LayerCache& layer : sequence.layers) {
    kept.push_back({&layer, static_cast<std::int32_t>(length)});
  }
  truncate(kept);
}

void Engine::Impl::check_length(SeqId id, const SequenceCache& sequence, std::int64_t length) {
  std::int64_t longest = 0;
  for (const LayerCache& layer : sequence.layers) {
    longest = std::max<std::int64_t>(longest, layer.length());
  }
  if (length < 0 || length > longest) {
    throw InvalidArgument(message("length must be from 0 to ", longest, " (the tokens of sequence ",
                                  id, "), got ", length));
  }
}

void Engine::truncate(SeqId sequence, std::int64_t length) {
  const std::lock_guard lock(impl_->mutex);
  SequenceCache& cache = impl_->changeable(sequence);
  impl_->settle(cache);
  Impl::check_length(sequence, cache, length);
  Impl::truncate(cache, length);
}

void Engine::release(SeqId sequence) {
  const std::lock_guard lock(impl_->mutex);
  impl_->rest(impl_->sequence(sequence));
  impl_->collect_all(impl_->sequence(sequence));
  impl_->sequences.erase(sequence);
}

SequenceCache& Engine::Impl::changeable(SeqId id) {
  SequenceCache& cache = sequence(id);
  if (cache.retained != 0) {
    throw InvalidArgument(message(
        "sequence must not be a retained one, which takes no tokens, got ", id, "; fork it"));
  }
  return cache;
}

LayerCache& Engine::Impl::layer_to_change(SeqId id, int layer) {
  check_layer(layer);
  changeable(id);
  return layer_of(id, layer);
}

void Engine::retain(SeqId sequence) {
  const std::lock_guard lock(impl_->mutex);
  impl_->sequence(sequence).retained = ++impl_->retained_clock;
}

bool Engine::contains(SeqId sequence) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->sequences.contains(sequence);
}

bool Engine::Impl::evict_one() noexcept {
  auto oldest = sequences.end();
  for (auto it = sequences.begin(); it != sequences.end(); ++it) {
    if (it->second.retained == 0) continue;
    if (oldest == sequences.end() || it->second.retained < oldest->second.retained) oldest = it;
  }
  if (oldest == sequences.end()) return false;
  rest(oldest->second);
  collect_all(oldest->second);
  sequences.erase(oldest);
  ++evicted;
  return true;
}

}  // namespace icecache

// The calls of every step: append, step, observe; engine_attend.cpp has attend.
#include <algorithm>
#include <set>
#include <string>

#include "core/engine_impl.h"
#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Tokens times heads whose copying takes longer than waking a thread.
constexpr std::int64_t kTokensWorthThreads = 256;

}  // namespace

void Engine::Impl::check_view(std::string_view name, const TensorView& view,
                              std::int64_t heads) const {
  if (view.heads != heads || view.dim != shape.head_dim || view.tokens < 0) {
    throw InvalidArgument(message(name, " must be [", heads, ", T, ", shape.head_dim, "], got [",
                                  view.heads, ", ", view.tokens, ", ", view.dim, "]"));
  }
  if (view.dtype != shape.dtype) {
    throw InvalidArgument(message(name, " must be ", name_of(shape.dtype), " as the cache, got ",
                                  name_of(view.dtype)));
  }
  if (view.data == nullptr && view.tokens > 0) {
    throw InvalidArgument(message(name, " must point to data, got a null pointer"));
  }
}

void Engine::Impl::check_call(std::span<const SeqId> ids, std::size_t views,
                              std::string_view name) const {
  if (ids.size() != views) {
    throw InvalidArgument(
        message(name, " must have one entry per sequence (", ids.size(), "), got ", views));
  }
  if (ids.size() < 2) return;
  std::set<SeqId> seen;
  for (const SeqId id : ids) {
    if (!seen.insert(id).second) {
      throw InvalidArgument(message("sequences must differ within one call, got ", id, " twice"));
    }
  }
}

void Engine::append(std::span<const SeqId> ids, int layer, std::span<const TensorView> keys,
                    std::span<const TensorView> values) {
  const std::lock_guard lock(impl_->mutex);
  impl_->append(ids, layer, keys, values);
}

void Engine::attend(std::span<const SeqId> ids, int layer, std::span<const TensorView> queries,
                    std::span<const TensorView> outputs) {
  const std::lock_guard lock(impl_->mutex);
  impl_->check_attend(ids, queries, outputs);
  impl_->attend(ids, layer, queries, outputs);
}

void Engine::step(std::span<const SeqId> ids, int layer, std::span<const TensorView> keys,
                  std::span<const TensorView> values, std::span<const TensorView> queries,
                  std::span<const TensorView> outputs, std::span<const Phase> phases) {
  const std::lock_guard lock(impl_->mutex);
  impl_->check_attend(ids, queries, outputs);
  if (!phases.empty()) impl_->check_call(ids, phases.size(), "phases");
  for (std::size_t b = 0; b < ids.size() && b < keys.size(); ++b) {
    if (queries[b].tokens == keys[b].tokens) continue;
    throw InvalidArgument(message("queries must have as many tokens as keys (", keys[b].tokens,
                                  "), got ", queries[b].tokens));
  }
  impl_->append(ids, layer, keys, values);
  try {
    impl_->attend(ids, layer, queries, outputs, phases);
  } catch (...) {
    for (std::size_t b = 0; b < ids.size(); ++b) {
      LayerCache& cache = impl_->sequence(ids[b]).layers[layer];
      const auto before = cache.length() - static_cast<std::int32_t>(keys[b].tokens);
      for (HeadCache& head : cache.heads) head.take_back(before);
    }
    throw;
  }
}

void Engine::Impl::append(std::span<const SeqId> ids, int layer, std::span<const TensorView> keys,
                          std::span<const TensorView> values) {
  Impl& self = *this;
  self.check_call(ids, keys.size(), "keys");
  self.check_call(ids, values.size(), "values");
  std::vector<LayerCache*> layers;
  for (const SeqId id : ids) layers.push_back(&self.layer_of(id, layer));
  std::size_t needed = 0;
  std::vector<std::int32_t> before;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    self.check_view("keys", keys[b], self.shape.num_kv_heads);
    self.check_view("values", values[b], self.shape.num_kv_heads);
    if (keys[b].tokens != values[b].tokens) {
      throw InvalidArgument(message("values must have as many tokens as keys (", keys[b].tokens,
                                    "), got ", values[b].tokens));
    }
    before.push_back(layers[b]->length());
    if (before[b] + keys[b].tokens > INT32_MAX) {
      throw InvalidArgument(message("a sequence must be shorter than ", INT32_MAX, " tokens, got ",
                                    before[b] + keys[b].tokens));
    }
    for (const HeadCache& head : layers[b]->heads) needed += head.pages_for(keys[b].tokens);
    for (const auto& [name, view] : {std::pair{"keys", keys[b]}, {"values", values[b]}}) {
      for (std::int64_t h = 0; h < view.heads; ++h) {
        for (std::int64_t t = 0; t < view.tokens; ++t) {
          if (!simd::kernels().all_finite(view.at(h, t), view.dtype, view.dim)) {
            throw InvalidArgument(message(name, " must be finite, got NaN or Inf in sequence ",
                                          ids[b], ", layer ", layer, ", KV head ", h, ", position ",
                                          before[b] + t));
          }
        }
      }
    }
  }
  // The first layer answers for all: a step that will not fit is refused before any layer took it.
  const std::size_t all = needed * (layer == 0 ? self.shape.num_layers : 1);
  if (!self.has_pages(all) && !self.drop_rebuilds_for(all)) {
    throw OutOfPages(message("host_memory is exhausted: these tokens need ", all, " pages of ",
                             self.pool.page_bytes(), " bytes", layer == 0 ? " over all layers" : "",
                             ", ", self.pool.free_pages(), " of ", self.pool.capacity_pages(),
                             " are free; raise host_memory (", self.config.host_memory,
                             " bytes) or release sequences"));
  }
  try {
    const std::int64_t rows = static_cast<std::int64_t>(ids.size()) * self.shape.num_kv_heads;
    const auto append_row = [&](std::int64_t i, int) {
      const std::int64_t b = i / self.shape.num_kv_heads, h = i % self.shape.num_kv_heads;
      layers[b]->heads[h].append(keys[b], values[b], h);
    };
    std::int64_t tokens = 0;
    for (const TensorView& view : keys) tokens += view.tokens * self.shape.num_kv_heads;
    if (tokens >= kTokensWorthThreads) {
      self.threads.parallel_for(rows, append_row);
    } else {
      for (std::int64_t i = 0; i < rows; ++i) append_row(i, 0);
    }
  } catch (...) {
    for (std::size_t b = 0; b < ids.size(); ++b) {
      for (HeadCache& head : layers[b]->heads) head.take_back(before[b]);
    }
    throw;
  }
}

void Engine::Impl::check_attend(std::span<const SeqId> ids, std::span<const TensorView> queries,
                                std::span<const TensorView> outputs) const {
  check_call(ids, queries.size(), "queries");
  check_call(ids, outputs.size(), "outputs");
  for (std::size_t b = 0; b < ids.size(); ++b) {
    check_view("queries", queries[b], shape.num_q_heads);
    check_view("outputs", outputs[b], shape.num_q_heads);
    if (outputs[b].tokens != queries[b].tokens) {
      throw InvalidArgument(message("outputs must have as many tokens as queries (",
                                    queries[b].tokens, "), got ", outputs[b].tokens));
    }
  }
}

void Engine::observe(std::span<const SeqId> ids, int layer, std::span<const TensorView> queries) {
  const std::lock_guard lock(impl_->mutex);
  impl_->check_call(ids, queries.size(), "queries");
  std::vector<LayerCache*> layers;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    layers.push_back(&impl_->layer_of(ids[b], layer));
    impl_->check_view("queries", queries[b], impl_->shape.num_q_heads);
  }
  std::vector<Impl::FollowUp> work;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    work.push_back(impl_->prepare_update(*layers[b], layer, queries[b]));
  }
  for (Impl::FollowUp& item : work) impl_->start(std::move(item));
}

}  // namespace icecache

// The calls of every step: append, step, observe; engine_attend.cpp has attend.
#include <algorithm>
#include <set>
#include <string>

#include "host/engine_impl.h"
#include "host/tensor_overlap.h"
#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Tokens times heads whose copying takes longer than waking a thread.
constexpr std::int64_t kTokensWorthThreads = 256;

void check_finite(std::string_view name, const TensorView& view, SeqId id, int layer,
                  std::int64_t first_position) {
  for (std::int64_t h = 0; h < view.heads; ++h) {
    for (std::int64_t t = 0; t < view.tokens; ++t) {
      if (simd::kernels().all_finite(view.at(h, t), view.dtype, view.dim)) continue;
      throw InvalidArgument(message(name, " must be finite, got NaN or Inf in sequence ", id,
                                    ", layer ", layer, ", KV head ", h, ", position ",
                                    first_position + t));
    }
  }
}

void check_lse(const TensorView& view, std::int64_t heads, std::int64_t tokens) {
  if (view.heads != heads || view.tokens != tokens || view.dim != 1) {
    throw InvalidArgument(message("lse must be [", heads, ", ", tokens, ", 1] as queries, got [",
                                  view.heads, ", ", view.tokens, ", ", view.dim, "]"));
  }
  if (view.dtype != DType::kFloat32) {
    throw InvalidArgument(message("lse must be float32, got ", name_of(view.dtype)));
  }
  if (view.data == nullptr && tokens > 0) {
    throw InvalidArgument("lse must point to data, got a null pointer");
  }
}

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

void Engine::Impl::check_layer(int layer) const {
  if (layer < 0 || layer >= shape.num_layers) {
    throw InvalidArgument(
        message("layer must be from 0 to ", shape.num_layers - 1, ", got ", layer));
  }
}

void Engine::Impl::check_written(const Named& written, std::initializer_list<Named> others) {
  if (rows_overlap(written.second)) {
    throw InvalidArgument(
        message(written.first, " must have memory of its own for every row, got rows that share"));
  }
  for (const auto& [name, views] : others) {
    if (rows_overlap(written.second, views)) {
      throw InvalidArgument(message(written.first, " must not share memory with ", name));
    }
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
  impl_->check_layer(layer);
  impl_->check_append(ids, keys, values);
  impl_->append(ids, layer, keys, values);
}

void Engine::attend(std::span<const SeqId> ids, int layer, std::span<const TensorView> queries,
                    std::span<const TensorView> outputs, std::span<const Phase> phases,
                    std::span<const TensorView> lse) {
  const std::lock_guard lock(impl_->mutex);
  const Impl::AttendArgs args{queries, outputs, lse, phases};
  impl_->check_layer(layer);
  impl_->check_attend(ids, args);
  Impl::check_written({"outputs", outputs}, {{"queries", queries}});
  Impl::check_written({"lse", lse}, {{"queries", queries}, {"outputs", outputs}});
  impl_->attend(ids, layer, args);
}

void Engine::step(std::span<const SeqId> ids, int layer, std::span<const TensorView> keys,
                  std::span<const TensorView> values, std::span<const TensorView> queries,
                  std::span<const TensorView> outputs, std::span<const Phase> phases,
                  std::span<const TensorView> lse) {
  const std::lock_guard lock(impl_->mutex);
  const Impl::AttendArgs args{queries, outputs, lse, phases};
  impl_->check_layer(layer);
  impl_->check_attend(ids, args);
  impl_->check_append(ids, keys, values);
  for (std::size_t b = 0; b < ids.size(); ++b) {
    if (queries[b].tokens == keys[b].tokens) continue;
    throw InvalidArgument(message("queries must have as many tokens as keys (", keys[b].tokens,
                                  "), got ", queries[b].tokens));
  }
  Impl::check_written({"outputs", outputs},
                      {{"queries", queries}, {"keys", keys}, {"values", values}});
  Impl::check_written(
      {"lse", lse},
      {{"queries", queries}, {"outputs", outputs}, {"keys", keys}, {"values", values}});
  impl_->append(ids, layer, keys, values);
  try {
    impl_->attend(ids, layer, args);
  } catch (...) {
    for (std::size_t b = 0; b < ids.size(); ++b) {
      LayerCache& cache = impl_->sequence(ids[b]).layers[layer];
      const auto before = cache.length() - static_cast<std::int32_t>(keys[b].tokens);
      for (HeadCache& head : cache.heads) head.take_back(before);
    }
    throw;
  }
}

void Engine::take_back(std::span<const SeqId> ids, int layer,
                       std::span<const std::int64_t> counts) {
  const std::lock_guard lock(impl_->mutex);
  impl_->check_layer(layer);
  impl_->check_call(ids, counts.size(), "counts");
  for (std::size_t b = 0; b < ids.size(); ++b) {
    const std::int64_t length = impl_->layer_to_change(ids[b], layer).length();
    if (counts[b] < 0 || counts[b] > length) {
      throw InvalidArgument(message("counts must be from 0 to ", length,
                                    " (the tokens of sequence ", ids[b], "), got ", counts[b]));
    }
  }
  std::vector<Impl::Kept> kept;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    LayerCache& cache = impl_->sequence(ids[b]).layers[layer];
    kept.push_back({&cache, cache.length() - static_cast<std::int32_t>(counts[b])});
  }
  Impl::truncate(kept);
}

void Engine::Impl::check_append(std::span<const SeqId> ids, std::span<const TensorView> keys,
                                std::span<const TensorView> values) const {
  check_call(ids, keys.size(), "keys");
  check_call(ids, values.size(), "values");
  for (std::size_t b = 0; b < ids.size(); ++b) {
    check_view("keys", keys[b], shape.num_kv_heads);
    check_view("values", values[b], shape.num_kv_heads);
    if (keys[b].tokens == values[b].tokens) continue;
    throw InvalidArgument(message("values must have as many tokens as keys (", keys[b].tokens,
                                  "), got ", values[b].tokens));
  }
}

void Engine::Impl::append(std::span<const SeqId> ids, int layer, std::span<const TensorView> keys,
                          std::span<const TensorView> values) {
  Impl& self = *this;
  std::vector<LayerCache*> layers;
  for (const SeqId id : ids) layers.push_back(&self.layer_to_change(id, layer));
  std::size_t needed = 0;
  std::vector<std::int32_t> before;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    before.push_back(layers[b]->length());
    if (keys[b].tokens > INT32_MAX - before[b]) {  // their sum may not fit
      throw InvalidArgument(message("a sequence must be of at most ", INT32_MAX, " tokens, got ",
                                    keys[b].tokens, " more for one of ", before[b]));
    }
    for (const HeadCache& head : layers[b]->heads) needed += head.pages_for(keys[b].tokens);
  }
  // The first layer answers for all: a step that will not fit is refused before any layer took it.
  const std::size_t all = needed * (layer == 0 ? self.shape.num_layers : 1);
  // What can never fit is not even read: an expanded tensor is of any length.
  if (all <= self.pool.capacity_pages()) {
    for (std::size_t b = 0; b < ids.size(); ++b) {
      check_finite("keys", keys[b], ids[b], layer, before[b]);
      check_finite("values", values[b], ids[b], layer, before[b]);
    }
  }
  if (!self.has_pages(all) && !self.drop_builds_for(all)) {
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

void Engine::Impl::check_attend(std::span<const SeqId> ids, const AttendArgs& args) const {
  check_call(ids, args.queries.size(), "queries");
  check_call(ids, args.outputs.size(), "outputs");
  if (!args.lse.empty()) check_call(ids, args.lse.size(), "lse");
  for (std::size_t b = 0; b < ids.size(); ++b) {
    const std::int64_t tokens = args.queries[b].tokens;
    check_view("queries", args.queries[b], shape.num_q_heads);
    check_view("outputs", args.outputs[b], shape.num_q_heads);
    if (args.outputs[b].tokens != tokens) {
      throw InvalidArgument(message("outputs must have as many tokens as queries (", tokens,
                                    "), got ", args.outputs[b].tokens));
    }
    if (!args.lse.empty()) check_lse(args.lse[b], shape.num_q_heads, tokens);
  }
  check_phases(ids, args.phases);
}

void Engine::Impl::check_phases(std::span<const SeqId> ids, std::span<const Phase> phases) const {
  if (!phases.empty()) check_call(ids, phases.size(), "phases");
  for (const Phase phase : phases) {
    if (phase > Phase::kVerify) {
      throw InvalidArgument(message("phases must be from 0 to 3, got ", static_cast<int>(phase)));
    }
  }
}

void Engine::observe(std::span<const SeqId> ids, int layer, std::span<const TensorView> queries,
                     std::span<const Phase> phases) {
  const std::lock_guard lock(impl_->mutex);
  impl_->check_layer(layer);
  impl_->check_call(ids, queries.size(), "queries");
  impl_->check_phases(ids, phases);
  std::vector<LayerCache*> layers;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    layers.push_back(&impl_->layer_to_change(ids[b], layer));
    impl_->check_view("queries", queries[b], impl_->shape.num_q_heads);
  }
  for (LayerCache* cache : layers) {
    impl_->decide(*cache, layer, cache->length());
    for (HeadCache& head : cache->heads) head.observe_until(cache->length());
  }
  std::vector<Impl::FollowUp> work;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    const Phase phase = phases.empty() ? Phase::kAuto : phases[b];
    work.push_back(impl_->prepare_update(*layers[b], layer, queries[b], phase));
  }
  for (Impl::FollowUp& item : work) impl_->start(std::move(item));
}

}  // namespace icecache

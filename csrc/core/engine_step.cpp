// The calls of every step: append, attend, observe.
#include <algorithm>
#include <set>
#include <string>

#include "core/engine_impl.h"
#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Query tokens of one task in exact attention.
constexpr int kBlock = 64;
// Steps of decoding from one whose queries shape the metric to the next.
constexpr std::int32_t kObserveEvery = 8;
// A rebuild takes over after this share of the index's tokens, all layers in turn.
constexpr std::int32_t kRebuildShare = 4;
constexpr std::int32_t kShortestRebuild = 8;
// Tokens times heads whose copying takes longer than waking a thread.
constexpr std::int64_t kTokensWorthThreads = 256;

// Rows [tokens, G, D] fp32 of one KV head's group, times `scale`.
void load_queries(const TensorView& queries, int kv_head, int group, std::int64_t first,
                  std::int64_t tokens, float scale, float* out) {
  const std::int64_t d = queries.dim;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (int g = 0; g < group; ++g) {
      float* row = out + (t * group + g) * d;
      simd::kernels().to_float(queries.at(kv_head * group + g, first + t), queries.dtype, row, d);
      for (std::int64_t i = 0; i < d; ++i) row[i] *= scale;
    }
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
      LayerCache& cache = impl_->layer_of(ids[b], layer);
      const auto before = cache.length() - static_cast<std::int32_t>(keys[b].tokens);
      impl_->threads.wait(cache.rebuilds);
      for (HeadCache& head : cache.heads) head.truncate(before);
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
  if (all > self.pool.free_pages()) {
    for (auto& [id, sequence] : self.sequences) self.drop_rebuilds(sequence);
  }
  if (all > self.pool.free_pages()) {
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
      for (HeadCache& head : layers[b]->heads) head.truncate(before[b]);
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

void Engine::Impl::attend(std::span<const SeqId> ids, int layer,
                          std::span<const TensorView> queries, std::span<const TensorView> outputs,
                          std::span<const Phase> phases) {
  Impl& self = *this;
  const int group = self.shape.group(), d = self.shape.head_dim, hkv = self.shape.num_kv_heads;
  struct Task {
    std::size_t item;
    int head;
    std::int64_t first, tokens;
    bool sparse, alone;
  };
  std::vector<LayerCache*> layers;
  std::vector<Task> tasks;
  const auto phase_of = [&](std::size_t b) { return phases.empty() ? Phase::kAuto : phases[b]; };
  // True where a sequence's tokens come from decoding, not from a prompt.
  const auto decodes = [&](std::size_t b) {
    return phase_of(b) == Phase::kAuto && queries[b].tokens <= config.decode_tokens;
  };
  // True where the step itself does all that is due, and nothing is left to index threads.
  const auto is_alone = [&](std::size_t b) {
    const HeadCache& head = layers[b]->heads.front();
    return decodes(b) && (head.sparse() || (head.is_short() && queries[b].tokens <= kBlock));
  };
  for (std::size_t b = 0; b < ids.size(); ++b) {
    layers.push_back(&self.layer_of(ids[b], layer));
    const std::int64_t tokens = queries[b].tokens;
    if (tokens > layers[b]->length()) {
      throw InvalidArgument(message("queries must be of tokens already appended (",
                                    layers[b]->length(), " in sequence ", ids[b], "), got ",
                                    tokens));
    }
    if (layers[b]->heads.front().rebuild_is_ready()) self.threads.wait(layers[b]->rebuilds);
    for (int h = 0; h < hkv; ++h) {
      if (decodes(b) && layers[b]->heads[h].sparse()) {
        if (tokens > 0) tasks.push_back({b, h, 0, tokens, true, true});
        continue;
      }
      for (std::int64_t first = 0; first < tokens; first += kBlock) {
        tasks.push_back(
            {b, h, first, std::min<std::int64_t>(kBlock, tokens - first), false, is_alone(b)});
      }
    }
  }
  std::vector<HeadStats> task_stats(tasks.size());
  const float scale = self.shape.softmax_scale();
  self.threads.parallel_for(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, int) {
    const Task& task = tasks[i];
    HeadCache& head = layers[task.item]->heads[task.head];
    const std::int32_t first =
        head.length() - static_cast<std::int32_t>(queries[task.item].tokens - task.first);
    const std::size_t rows = static_cast<std::size_t>(task.tokens) * group;
    thread_local std::vector<float> scaled, result, max, sum;
    scaled.resize(rows * d);
    result.resize(rows * d);
    load_queries(queries[task.item], task.head, group, task.first, task.tokens, scale,
                 scaled.data());
    if (task.sparse) {
      for (std::int64_t t = 0; t < task.tokens; ++t) {
        const std::int64_t at = t * group * d;
        const std::int32_t position = first + static_cast<std::int32_t>(t);
        head.decode(scaled.data() + at, position, result.data() + at, task_stats[i]);
      }
    } else {
      max.resize(rows);
      sum.resize(rows);
      const AttentionState state{result.data(), max.data(), sum.data(), static_cast<int>(rows), d};
      state.clear();
      head.attend_exact(scaled.data(), static_cast<int>(task.tokens), first, state, task_stats[i]);
      finish(state, result.data());
      if (decodes(task.item)) task_stats[i].dense_steps = task.tokens;
    }
    if (task.alone) {
      for (std::int64_t t = 0; t < task.tokens; ++t) {
        if (task.sparse && (first + t) % kObserveEvery != 0) continue;
        float* rows_of_token = scaled.data() + t * group * d;
        for (int x = 0; x < group * d; ++x) rows_of_token[x] /= scale;
        head.observe(rows_of_token, group);
      }
    }
    const TensorView& out = outputs[task.item];
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      for (int g = 0; g < group; ++g) {
        simd::kernels().from_float(result.data() + (t * group + g) * d,
                                   out.at(task.head * group + g, task.first + t), out.dtype, d);
      }
    }
  });
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    self.collect(layer, tasks[i].head, task_stats[i]);
  }
  for (std::size_t b = 0; b < ids.size(); ++b) {
    if (is_alone(b)) {
      if (layers[b]->heads.front().sparse()) self.schedule_rebuild(*layers[b], layer);
    } else {
      self.schedule_update(*layers[b], queries[b], phase_of(b));
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
  for (std::size_t b = 0; b < ids.size(); ++b) impl_->schedule_update(*layers[b], queries[b]);
}

void Engine::Impl::schedule_update(LayerCache& layer, const TensorView& queries, Phase phase) {
  if (layer.heads.front().dense() || queries.tokens == 0) return;
  // A chunk of prefill builds by itself what is due.
  threads.wait(layer.rebuilds);
  for (HeadCache& head : layer.heads) head.drop_rebuild();
  const int group = shape.group();
  // Whole tokens; the first rows of the first one may be more than is needed.
  const std::int64_t all = queries.tokens * group;
  const std::int64_t needed = layer.heads.front().needed_queries(all);
  const std::int64_t tokens = (needed + group - 1) / group;
  const std::size_t head_rows = static_cast<std::size_t>(tokens) * group;
  auto rows = std::make_shared<std::vector<float>>(head_rows * shape.head_dim * shape.num_kv_heads);
  for (int h = 0; h < shape.num_kv_heads; ++h) {
    load_queries(queries, h, group, queries.tokens - tokens, tokens, 1.0f,
                 rows->data() + h * head_rows * shape.head_dim);
  }
  const auto update = [this, &layer, rows, head_rows, all, needed, phase](int h) {
    HeadCache& head = layer.heads[h];
    const float* end = rows->data() + (h + 1) * head_rows * shape.head_dim;
    head.observe(end - needed * shape.head_dim, needed, all - needed);
    if (phase != Phase::kPrefill) head.update_index(layer.job_stats[h]);
  };
  // Builds take long: one job per head, so that all index threads share them.
  if (phase != Phase::kPrefill &&
      (layer.heads.front().build_is_due() || tokens > config.decode_tokens)) {
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      threads.submit(layer.jobs, [update, h] { update(h); });
    }
  } else {
    threads.submit(layer.jobs, [update, heads = shape.num_kv_heads] {
      for (int h = 0; h < heads; ++h) update(h);
    });
  }
}

void Engine::Impl::schedule_rebuild(LayerCache& layer, int number) {
  const std::int32_t share =
      layer.heads.front().indexed_tokens() / (kRebuildShare * shape.num_layers);
  const std::int32_t turn = std::max(kShortestRebuild, share);
  for (HeadCache& head : layer.heads) {
    if (const auto rebuild = head.start_rebuild(number * turn, turn); rebuild != nullptr) {
      threads.submit(layer.rebuilds, [rebuild] { rebuild->run(); });
    }
  }
}

}  // namespace icecache

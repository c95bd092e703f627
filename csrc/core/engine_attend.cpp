// Attention, and what it leaves to the background.
#include <algorithm>
#include <optional>
#include <vector>

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

}  // namespace

// One call of attend():
//  1. plan() cuts it into tasks.
//  2. compute() carries them out on all threads. It writes the outputs, and may move tokens into
//     the index, which the same step would move again.
//  3. prepare() makes ready what follows in the background.
//  4. commit() lets the sequences have what the call learnt: it cannot fail.
// What throws does so before the fourth, which alone changes what a later call can tell.
class Engine::Impl::AttendCall {
 public:
  AttendCall(Impl& engine, std::span<const SeqId> ids, int layer,
             std::span<const TensorView> queries, std::span<const TensorView> outputs,
             std::span<const Phase> phases)
      : engine_(engine), layer_(layer), queries_(queries), outputs_(outputs), phases_(phases) {
    for (const SeqId id : ids) caches_.push_back(&engine_.layer_of(id, layer));
  }

  void plan(std::span<const SeqId> ids);
  void compute();
  void prepare();
  void commit() noexcept;

 private:
  struct Task {
    std::size_t item;
    int head;
    std::int64_t first, tokens;
    bool sparse, alone;
    HeadStats stats = {};
    std::optional<QueryMoments> moments = {};  // those of the head become these
    StepTrace trace = {};
  };

  Phase phase_of(std::size_t b) const { return phases_.empty() ? Phase::kAuto : phases_[b]; }
  // True where a sequence's tokens come from decoding, not from a prompt.
  bool decodes(std::size_t b) const {
    return phase_of(b) == Phase::kAuto && queries_[b].tokens <= engine_.config.decode_tokens;
  }
  // True where the step itself does all that is due, and nothing is left to index threads.
  bool is_alone(std::size_t b) const {
    return decodes(b) &&
           (caches_[b]->sparse() || (caches_[b]->is_short() && queries_[b].tokens <= kBlock));
  }
  void run(Task& task);
  void observe(Task& task, std::int32_t first, float* scaled) const;

  Impl& engine_;
  const int layer_;
  const std::span<const TensorView> queries_, outputs_;
  const std::span<const Phase> phases_;
  std::vector<LayerCache*> caches_;
  std::vector<Task> tasks_;
  std::vector<FollowUp> follow_ups_;
};

void Engine::Impl::AttendCall::plan(std::span<const SeqId> ids) {
  for (std::size_t b = 0; b < caches_.size(); ++b) {
    LayerCache& cache = *caches_[b];
    const std::int64_t tokens = queries_[b].tokens;
    if (tokens > cache.length()) {
      throw InvalidArgument(message("queries must be of tokens already appended (", cache.length(),
                                    " in sequence ", ids[b], "), got ", tokens));
    }
    if (cache.rebuild_is_ready()) engine_.threads.wait(cache.rebuilds);
    for (int h = 0; h < engine_.shape.num_kv_heads; ++h) {
      if (decodes(b) && cache.heads[h].sparse()) {
        if (tokens > 0) tasks_.push_back({b, h, 0, tokens, true, true});
        continue;
      }
      for (std::int64_t first = 0; first < tokens; first += kBlock) {
        tasks_.push_back(
            {b, h, first, std::min<std::int64_t>(kBlock, tokens - first), false, is_alone(b)});
      }
    }
  }
}

void Engine::Impl::AttendCall::compute() {
  std::size_t pages = 0;
  for (const Task& task : tasks_) {
    if (!task.sparse) continue;
    pages += caches_[task.item]->heads[task.head].pages_for_decode(task.tokens);
  }
  if (engine_.has_pages(pages)) {
    engine_.threads.parallel_for(static_cast<std::int64_t>(tasks_.size()),
                                 [this](std::int64_t i, int) { run(tasks_[i]); });
  } else {
    // One after another: which head gets the last page does not depend on timing.
    for (Task& task : tasks_) run(task);
  }
}

void Engine::Impl::AttendCall::run(Task& task) {
  const CacheShape& shape = engine_.shape;
  const int group = shape.group(), d = shape.head_dim;
  HeadCache& head = caches_[task.item]->heads[task.head];
  const TensorView& queries = queries_[task.item];
  const std::int32_t first = head.length() - static_cast<std::int32_t>(queries.tokens - task.first);
  const std::size_t rows = static_cast<std::size_t>(task.tokens) * group;
  thread_local std::vector<float> scaled, result;
  scaled.resize(rows * d);
  result.resize(rows * d);
  load_queries(queries, task.head, group, task.first, task.tokens, shape.softmax_scale(),
               scaled.data());
  if (task.sparse) {
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      const std::int64_t at = t * group * d;
      const std::int32_t position = first + static_cast<std::int32_t>(t);
      head.decode(scaled.data() + at, position, result.data() + at, task.stats, task.trace);
    }
  } else {
    head.attend_exact(scaled.data(), static_cast<int>(task.tokens), first, result.data(),
                      task.stats);
    if (decodes(task.item)) task.stats.dense_steps = task.tokens;
  }
  if (task.alone) observe(task, first, scaled.data());
  const TensorView& out = outputs_[task.item];
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    for (int g = 0; g < group; ++g) {
      simd::kernels().from_float(result.data() + (t * group + g) * d,
                                 out.at(task.head * group + g, task.first + t), out.dtype, d);
    }
  }
}

void Engine::Impl::AttendCall::observe(Task& task, std::int32_t first, float* scaled) const {
  const int group = engine_.shape.group(), d = engine_.shape.head_dim;
  const float scale = engine_.shape.softmax_scale();
  HeadCache& head = caches_[task.item]->heads[task.head];
  std::int64_t count = 0;  // rows that shape the metric, moved to the front
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    if (task.sparse && (first + t) % kObserveEvery != 0) continue;
    for (int x = 0; x < group * d; ++x) scaled[count * d + x] = scaled[t * group * d + x] / scale;
    count += group;
  }
  if (count > 0) task.moments = head.observed(scaled, count);
}

void Engine::Impl::AttendCall::prepare() {
  for (std::size_t b = 0; b < caches_.size(); ++b) {
    if (!is_alone(b)) {
      follow_ups_.push_back(engine_.prepare_update(*caches_[b], layer_, queries_[b], phase_of(b)));
    } else if (caches_[b]->sparse()) {
      follow_ups_.push_back(engine_.prepare_rebuild(*caches_[b], layer_));
    }
  }
}

void Engine::Impl::AttendCall::commit() noexcept {
  for (Task& task : tasks_) {
    HeadCache& head = caches_[task.item]->heads[task.head];
    engine_.collect(layer_, task.head, task.stats);
    if (task.moments) head.set_moments(std::move(*task.moments));
    if (task.sparse && engine_.config.telemetry == "trace") head.set_trace(std::move(task.trace));
  }
  for (FollowUp& work : follow_ups_) engine_.start(std::move(work));
}

void Engine::Impl::attend(std::span<const SeqId> ids, int layer,
                          std::span<const TensorView> queries, std::span<const TensorView> outputs,
                          std::span<const Phase> phases) {
  AttendCall call(*this, ids, layer, queries, outputs, phases);
  call.plan(ids);
  call.compute();
  call.prepare();
  call.commit();
}

Engine::Impl::FollowUp Engine::Impl::prepare_update(LayerCache& layer, int number,
                                                    const TensorView& queries, Phase phase) {
  FollowUp work;
  work.layer = &layer;
  work.number = number;
  if (layer.heads.front().dense() || queries.tokens == 0) return work;
  const bool indexes = phase != Phase::kPrefill;
  work.update = std::make_shared<LayerUpdate>(layer.heads, layer.job_stats, queries, indexes);
  std::size_t pages = 0;
  for (const HeadCache& head : layer.heads) pages += indexes ? head.pages_for_update() : 0;
  work.alone = !has_pages(pages);
  const Promise kept = work.alone ? nullptr : promise(pages);
  const std::shared_ptr<LayerUpdate>& update = work.update;
  // Builds take long: one job per head, so that all index threads share them.
  if (indexes && !work.alone && (layer.build_is_due() || queries.tokens > config.decode_tokens)) {
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      work.jobs.add(layer.jobs, [update, kept, h] { update->run(h); });
    }
  } else {
    work.jobs.add(layer.jobs, [update, kept] {
      for (int h = 0; h < update->heads(); ++h) update->run(h);
    });
  }
  return work;
}

Engine::Impl::FollowUp Engine::Impl::prepare_rebuild(LayerCache& layer, int number) {
  FollowUp work;
  work.layer = &layer;
  work.number = number;
  const std::int32_t share =
      layer.heads.front().indexed_tokens() / (kRebuildShare * shape.num_layers);
  const std::int32_t turn = std::max(kShortestRebuild, share);
  std::size_t pages = 0;
  for (const HeadCache& head : layer.heads) {
    work.rebuilds.push_back(head.make_rebuild(number * turn, turn));
    if (work.rebuilds.back() != nullptr) pages += work.rebuilds.back()->most_pages();
  }
  if (pages > 0 && !has_pages(pages)) {
    work.postponed = turn;
    work.rebuilds.clear();
    return work;
  }
  const Promise kept = pages > 0 ? promise(pages) : nullptr;
  for (const auto& rebuild : work.rebuilds) {
    if (rebuild == nullptr) continue;
    work.jobs.add(layer.rebuilds, [rebuild, kept] { rebuild->run(); });
  }
  return work;
}

void Engine::Impl::start(FollowUp work) noexcept {
  LayerCache& layer = *work.layer;
  if (work.alone) rest();
  if (work.update != nullptr) {
    // It builds by itself what is due.
    threads.finish(layer.rebuilds);
    for (HeadCache& head : layer.heads) head.drop_rebuild();
    layer.update = std::move(work.update);
  }
  for (std::size_t h = 0; h < work.rebuilds.size(); ++h) {
    if (work.rebuilds[h] != nullptr) layer.heads[h].start_rebuild(std::move(work.rebuilds[h]));
  }
  if (work.postponed > 0) {
    for (HeadCache& head : layer.heads) head.postpone_rebuild(work.postponed);
  }
  threads.submit(std::move(work.jobs));
  if (work.alone) finish(layer, work.number);
}

}  // namespace icecache

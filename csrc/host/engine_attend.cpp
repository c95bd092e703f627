// Attention, and what it leaves to the background.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "host/engine_impl.h"
#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Query tokens of one task in exact attention, and of a call that may be done in one.
constexpr int kQueryBlock = 64;
// Query rows of one task of a prompt, which bound what a thread needs for them. With up to 16 query
// heads per KV head kQueryBlock tokens have no more.
constexpr int kQueryRows = 16 * kQueryBlock;
// Steps of decoding from one whose queries shape the metric to the next.
constexpr std::int32_t kObserveEvery = 8;
// All layers build a segment, one after the other, within this share of its tokens.
constexpr std::int32_t kBuildShare = 8;
constexpr std::int32_t kShortestTurn = 4;
// Tokens until a build is tried again for which there were no pages.
constexpr std::int32_t kPostponed = 64;

}  // namespace

// One call of attend():
//  1. plan() cuts it into tasks. Tokens before the call's own stay from now on: what they change in
//     the index, decide() does.
//  2. compute() makes segments of the chunks of prompts that are due, and then carries the tasks
//     out, on all threads. It writes the outputs, and may move tokens into a growing index, which
//     the same step would move again.
//  3. prepare() makes ready what follows in the background.
//  4. commit() lets the sequences have what the call learnt: it cannot fail.
// What throws does so before the fourth, which alone changes what a later call can tell.
class Engine::Impl::AttendCall {
 public:
  AttendCall(Impl& engine, std::span<const SeqId> ids, int layer, const AttendArgs& args)
      : engine_(engine), layer_(layer), args_(args) {
    for (const SeqId id : ids) caches_.push_back(&engine_.layer_to_change(id, layer));
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
    HeadStats stats = {};                          // beside those of `decoded`
    std::vector<HeadCache::Decoded> decoded = {};  // [tokens] if it is alone; the head's then
    StepTrace trace = {};
  };

  Phase phase_of(std::size_t b) const {
    return args_.phases.empty() ? Phase::kAuto : args_.phases[b];
  }
  // True where a sequence's tokens come from decoding, not from a prompt.
  bool decodes(std::size_t b) const {
    const std::int64_t tokens = args_.queries[b].tokens;
    return phase_of(b) == Phase::kVerify
               ? tokens <= kQueryBlock
               : phase_of(b) == Phase::kAuto && tokens <= engine_.config.decode_tokens;
  }
  // True where a prompt's tokens attend within prefill_budget.
  bool picks_in_prompt(std::size_t b) const {
    return !decodes(b) && phase_of(b) != Phase::kVerify &&
           caches_[b]->heads.front().picks_in_prompts();
  }
  // Query tokens of a task that begins with token `first` of a call.
  std::int64_t block_tokens(std::size_t b, std::int64_t first) const;
  // Makes segments of the chunks that are due by the end of the call, where there are pages.
  void build_chunks();
  // The head that chunks_[i] are of.
  HeadCache& head_of_chunks(std::size_t i) const {
    const std::size_t heads = engine_.shape.num_kv_heads;
    return caches_[i / heads]->heads[i % heads];
  }
  // Of a sequence's tokens in this call, how many a head attends for exactly, before those that it
  // answers within the token budget.
  std::int64_t exact_tokens(std::size_t b, int head) const;
  // True where nothing of the call is left to index threads, but what decide() gives them.
  bool is_alone(std::size_t b) const {
    const LayerCache& cache = *caches_[b];
    return decodes(b) && (!cache.heads.front().grows() || cache.sparse() || cache.is_short());
  }
  void run(Task& task, AttendWorkspace& workspace);
  void observe(Task& task, std::int32_t first, float* scaled) const;

  Impl& engine_;
  const int layer_;
  const AttendArgs args_;
  std::vector<LayerCache*> caches_;
  std::vector<Task> tasks_;
  std::vector<std::vector<Segment>> chunks_;  // [B, Hkv], of prompts within prefill_budget
  std::vector<FollowUp> follow_ups_;
};

void Engine::Impl::AttendCall::plan(std::span<const SeqId> ids) {
  for (std::size_t b = 0; b < caches_.size(); ++b) {
    LayerCache& cache = *caches_[b];
    const std::int64_t tokens = args_.queries[b].tokens;
    if (tokens > cache.length()) {
      throw InvalidArgument(message("queries must be of tokens already appended (", cache.length(),
                                    " in sequence ", ids[b], "), got ", tokens));
    }
    engine_.decide(cache, layer_, cache.length() - static_cast<std::int32_t>(tokens));
    engine_.wait_for_builds(cache, cache.length());
    for (int h = 0; h < engine_.shape.num_kv_heads; ++h) {
      const std::int64_t exact = exact_tokens(b, h);
      for (std::int64_t first = 0, count = 0; first < exact; first += count) {
        count = std::min(block_tokens(b, first), exact - first);
        tasks_.push_back({b, h, first, count, false, is_alone(b)});
      }
      if (exact < tokens) tasks_.push_back({b, h, exact, tokens - exact, true, true});
    }
  }
}

std::int64_t Engine::Impl::AttendCall::block_tokens(std::size_t b, std::int64_t first) const {
  const std::int64_t most = std::min(kQueryBlock, kQueryRows / engine_.shape.group());
  if (!picks_in_prompt(b)) return most;
  // Blocks are those of the sequence, wherever the call begins.
  const std::int64_t position = caches_[b]->length() - args_.queries[b].tokens + first;
  return std::min(most, HeadCache::kPromptBlock - position % HeadCache::kPromptBlock);
}

void Engine::Impl::AttendCall::build_chunks() {
  bool any = false;
  for (std::size_t b = 0; b < caches_.size(); ++b) any = any || picks_in_prompt(b);
  if (!any) return;
  const int heads = engine_.shape.num_kv_heads;
  std::vector<int> counts(caches_.size(), 0);
  std::size_t pages = 0;
  for (std::size_t b = 0; b < caches_.size(); ++b) {
    const HeadCache& head = caches_[b]->heads.front();
    if (picks_in_prompt(b)) counts[b] = head.due_chunks(head.length());
    pages += heads * head.pages_for_chunks(counts[b]);
  }
  chunks_.resize(caches_.size() * heads);
  if (pages == 0 || !engine_.has_pages(pages)) return;
  engine_.threads.parallel_for(static_cast<std::int64_t>(chunks_.size()), [&](std::int64_t i, int) {
    const std::int64_t b = i / heads, h = i % heads;
    if (counts[b] == 0) return;
    chunks_[i] =
        caches_[b]->heads[h].build_chunks(counts[b], args_.queries[b], static_cast<int>(h));
  });
}

std::int64_t Engine::Impl::AttendCall::exact_tokens(std::size_t b, int head) const {
  const std::int64_t tokens = args_.queries[b].tokens;
  if (!decodes(b) || phase_of(b) != Phase::kAuto) return tokens;
  const HeadCache& cache = caches_[b]->heads[head];
  const auto first = static_cast<std::int32_t>(cache.length() - tokens);
  std::int32_t exact = 0;
  while (exact < tokens && !cache.sparse_at(first + exact)) ++exact;
  return exact;
}

void Engine::Impl::AttendCall::compute() {
  build_chunks();
  std::size_t pages = 0;
  for (const Task& task : tasks_) {
    if (!task.alone) continue;
    pages += caches_[task.item]->heads[task.head].pages_for_decode();
  }
  if (engine_.has_pages(pages)) {
    engine_.threads.parallel_for(
        static_cast<std::int64_t>(tasks_.size()),
        [this](std::int64_t i, int thread) { run(tasks_[i], engine_.workspaces[thread]); });
  } else {
    // One after another: which head gets the last page does not depend on timing.
    for (Task& task : tasks_) run(task, engine_.workspaces.front());
  }
}

void Engine::Impl::AttendCall::run(Task& task, AttendWorkspace& workspace) {
  const CacheShape& shape = engine_.shape;
  const int group = shape.group(), d = shape.head_dim;
  HeadCache& head = caches_[task.item]->heads[task.head];
  const TensorView& queries = args_.queries[task.item];
  const std::int32_t first = head.length() - static_cast<std::int32_t>(queries.tokens - task.first);
  if (task.first == 0) head.observe_until(first);
  for (std::int64_t t = 0; task.alone && t < task.tokens; ++t) {
    task.decoded.push_back({first + static_cast<std::int32_t>(t), {}, {}});
  }
  const std::size_t rows = static_cast<std::size_t>(task.tokens) * group;
  auto &scaled = workspace.queries, &result = workspace.outputs, &lse = workspace.lse;
  scaled.resize(rows * d);
  result.resize(rows * d);
  lse.resize(args_.lse.empty() ? 0 : rows);
  float* const any_lse = lse.empty() ? nullptr : lse.data();
  load_queries(queries, task.head, group, task.first, task.tokens, shape.softmax_scale(),
               scaled.data());
  if (task.sparse) {
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      const std::int64_t row = t * group;
      const std::int32_t position = first + static_cast<std::int32_t>(t);
      head.insert_due(position, task.stats, workspace);
      head.decode(scaled.data() + row * d, position,
                  {result.data() + row * d, any_lse == nullptr ? nullptr : any_lse + row},
                  task.decoded[t].stats, task.trace, workspace);
    }
  } else if (picks_in_prompt(task.item)) {
    head.attend_prompt(scaled.data(), static_cast<int>(task.tokens), first,
                       chunks_[task.item * shape.num_kv_heads + task.head],
                       {result.data(), any_lse}, task.stats, workspace);
  } else {
    if (task.alone && head.sparse()) head.insert_due(first, task.stats, workspace);
    head.attend_exact(scaled.data(), static_cast<int>(task.tokens), first, {result.data(), any_lse},
                      task.stats, workspace);
    if (decodes(task.item) && !task.alone) task.stats.dense_steps = task.tokens;
    for (HeadCache::Decoded& token : task.decoded) token.stats.dense_steps = 1;
  }
  if (task.alone && !head.dense()) observe(task, first, scaled.data());
  const TensorView& out = args_.outputs[task.item];
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    for (int g = 0; g < group; ++g) {
      const std::int64_t row = t * group + g, q_head = task.head * group + g;
      simd::kernels().from_float(result.data() + row * d, out.at(q_head, task.first + t), out.dtype,
                                 d);
      if (lse.empty()) continue;
      std::memcpy(args_.lse[task.item].at(q_head, task.first + t), &lse[row], sizeof(float));
    }
  }
}

void Engine::Impl::AttendCall::observe(Task& task, std::int32_t first, float* scaled) const {
  const DType dtype = engine_.shape.dtype;
  const std::int64_t count = std::int64_t{engine_.shape.group()} * engine_.shape.head_dim;
  const float scale = engine_.shape.softmax_scale();
  const HeadCache& head = caches_[task.item]->heads[task.head];
  for (HeadCache::Decoded& token : task.decoded) {
    if (head.sparse_at(token.position) && token.position % kObserveEvery != 0) continue;
    float* rows = scaled + (token.position - first) * count;
    for (std::int64_t x = 0; x < count; ++x) rows[x] /= scale;
    auto queries = std::make_shared<std::vector<std::byte>>(count * size_of(dtype));
    simd::kernels().from_float(rows, queries->data(), dtype, static_cast<std::size_t>(count));
    token.queries = std::move(queries);
  }
}

void Engine::Impl::AttendCall::prepare() {
  for (std::size_t i = 0; i < chunks_.size(); ++i)
    head_of_chunks(i).reserve_chunks(chunks_[i].size());
  for (std::size_t b = 0; b < caches_.size(); ++b) {
    if (is_alone(b)) continue;
    follow_ups_.push_back(
        engine_.prepare_update(*caches_[b], layer_, args_.queries[b], phase_of(b)));
    for (Task& task : tasks_) {
      if (task.item != b) continue;
      for (const HeadCache::Decoded& token : task.decoded) task.stats += token.stats;
      task.decoded.clear();  // the update observes
    }
  }
  // A head's tasks follow one another: the first one gets the tokens of all.
  for (std::size_t i = 1, first = 0; i < tasks_.size(); ++i) {
    if (tasks_[i].item != tasks_[first].item || tasks_[i].head != tasks_[first].head) first = i;
    if (first == i) continue;
    std::vector<HeadCache::Decoded>& decoded = tasks_[i].decoded;
    tasks_[first].decoded.insert(tasks_[first].decoded.end(),
                                 std::make_move_iterator(decoded.begin()),
                                 std::make_move_iterator(decoded.end()));
  }
  for (Task& task : tasks_) {
    if (task.first == 0) caches_[task.item]->heads[task.head].join_decoded(task.decoded);
  }
}

void Engine::Impl::AttendCall::commit() noexcept {
  for (std::size_t i = 0; i < chunks_.size(); ++i)
    head_of_chunks(i).add_chunks(std::move(chunks_[i]));
  for (Task& task : tasks_) {
    HeadCache& head = caches_[task.item]->heads[task.head];
    engine_.collect(layer_, task.head, task.stats);
    if (task.first == 0) head.set_decoded(std::move(task.decoded));
    if (task.sparse && engine_.config.telemetry == "trace") head.set_trace(std::move(task.trace));
  }
  for (std::size_t b = 0; b < caches_.size(); ++b) {
    const std::int32_t end = caches_[b]->length();
    const std::int32_t first =
        is_alone(b) ? end - static_cast<std::int32_t>(args_.queries[b].tokens) : end;
    caches_[b]->undecided = {first, end};
  }
  for (FollowUp& work : follow_ups_) engine_.start(std::move(work));
}

void Engine::Impl::attend(std::span<const SeqId> ids, int layer, const AttendArgs& args) {
  AttendCall call(*this, ids, layer, args);
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
  if (layer.heads.front().stays_whole() || queries.tokens == 0) return work;
  const bool packs = phase == Phase::kPrefill;
  work.update = std::make_shared<LayerUpdate>(layer.heads, layer.job_stats, queries, packs);
  std::size_t pages = 0;
  for (const HeadCache& head : layer.heads) pages += head.pages_for_update(packs);
  work.alone = !has_pages(pages);
  const Promise kept = work.alone ? nullptr : promise(pages);
  const std::shared_ptr<LayerUpdate>& update = work.update;
  // Builds take long: one job per head, so that all index threads share them.
  const bool is_long =
      layer.build_is_due(packs) || (!packs && queries.tokens > config.decode_tokens);
  if (is_long && !work.alone) {
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

void Engine::Impl::wait_for_builds(LayerCache& layer, std::int32_t length) {
  for (const HeadCache::Work work : HeadCache::kWorks) {
    if (layer.build_is_ready(work, length)) threads.wait(layer.group_of(work));
  }
}

void Engine::Impl::decide(LayerCache& layer, int number, std::int32_t position) {
  std::int32_t& first = layer.undecided.first;
  for (const std::int32_t end = std::min(layer.undecided.end, position); first < end; ++first) {
    const std::int32_t length = first + 1;
    wait_for_builds(layer, length);
    for (std::size_t h = 0; h < layer.heads.size(); ++h) {
      HeadStats stats = layer.heads[h].take_stats(length);
      layer.heads[h].use_builds(length, stats);
      collect(number, static_cast<int>(h), stats);
    }
    start(prepare_builds(layer, number, length));
  }
}

bool Engine::Impl::has_turn(std::int32_t length, std::int32_t turn, int number) const {
  const std::int32_t turns = length / turn;
  return turns >= number && (turns - number) % shape.num_layers == 0;
}

Engine::Impl::FollowUp Engine::Impl::prepare_builds(LayerCache& layer, int number,
                                                    std::int32_t length) {
  FollowUp follow;
  follow.layer = &layer;
  follow.number = number;
  follow.postponed_to = length + kPostponed;
  for (const HeadCache::Work work : HeadCache::kWorks) {
    const std::int32_t tokens = layer.heads.front().due_work(work, length);
    if (tokens == 0) continue;
    const std::int32_t turn = std::max(kShortestTurn, tokens / (kBuildShare * shape.num_layers));
    if (!has_turn(length, turn, number)) continue;
    // When the layer after the next one begins; and behind the call that the token is in, which
    // would need it before anybody knows whether the token stays.
    const std::int32_t ready_at =
        length + std::max(2 * turn, static_cast<std::int32_t>(config.window_tokens));
    std::size_t pages = 0;
    std::vector<FollowUp::Build> builds;
    for (std::size_t h = 0; h < layer.heads.size(); ++h) {
      layer.heads[h].observe_until(length);
      builds.push_back({work, h, layer.heads[h].make_build(work, length, ready_at)});
      if (builds.back().build == nullptr)
        builds.pop_back();
      else
        pages += builds.back().build->most_pages();
    }
    if (!has_pages(pages)) {
      follow.postponed.push_back(work);
      continue;
    }
    const Promise kept = promise(pages);
    for (FollowUp::Build& item : builds) {
      follow.jobs.add(layer.group_of(work), [build = item.build, kept] { build->run(); });
      follow.builds.push_back(std::move(item));
    }
  }
  return follow;
}

void Engine::Impl::start(FollowUp work) noexcept {
  LayerCache& layer = *work.layer;
  if (work.alone) rest();
  if (work.update != nullptr) {
    // It builds by itself what is due.
    for (JobGroup& builds : layer.builds) threads.finish(builds);
    for (HeadCache& head : layer.heads) head.drop_builds();
    layer.update = std::move(work.update);
  }
  for (FollowUp::Build& item : work.builds) {
    layer.heads[item.head].start_build(item.work, std::move(item.build));
  }
  for (const HeadCache::Work kind : work.postponed) {
    for (HeadCache& head : layer.heads) head.postpone_build(kind, work.postponed_to);
  }
  threads.submit(std::move(work.jobs));
  if (work.alone) finish(layer, work.number);
}

}  // namespace icecache

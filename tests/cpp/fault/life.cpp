#include "fault/life.h"

#include <cmath>
#include <cstring>
#include <new>

#include "fault/injector.h"
#include "icecache/error.h"

namespace icecache::fault {
namespace {

constexpr int kLayers = 2, kQueryHeads = 4, kHeads = 2, kDim = 16;

TensorView view(std::vector<float>& x, int heads, std::int64_t tokens) {
  return {x.data(), DType::kFloat32, heads, tokens, kDim, tokens * kDim, kDim};
}

}  // namespace

// The arguments of one call for some sequences, made while nothing is counted.
struct Life::Tensors {
  std::vector<std::vector<float>> keys, values, queries, outputs;
  std::vector<TensorView> k, v, q, o;

  void add(Life& life, int tokens) {
    keys.push_back(life.rows(kHeads * tokens));
    values.push_back(life.rows(kHeads * tokens));
    queries.push_back(life.rows(kQueryHeads * tokens));
    outputs.emplace_back(kQueryHeads * tokens * kDim, 0.0f);
    k.push_back(view(keys.back(), kHeads, tokens));
    v.push_back(view(values.back(), kHeads, tokens));
    q.push_back(view(queries.back(), kQueryHeads, tokens));
    o.push_back(view(outputs.back(), kQueryHeads, tokens));
  }
};

Life::Life(const LifeOptions& options) : options_(options) {
  shape_.num_layers = kLayers;
  shape_.num_q_heads = kQueryHeads;
  shape_.num_kv_heads = kHeads;
  shape_.head_dim = kDim;
  config_.index = options.index;
  config_.segment_tokens = 8;
  if (options.picks_in_prompts) {
    config_.prefill_budget = 16;
    config_.prefill_chunk = 64;
  }
  config_.faiss_search = options.faiss_search;
  config_.kv_dtype = options.kv_dtype;
  config_.page_size = 8;
  config_.token_budget = 24;
  config_.sink_tokens = 4;
  config_.window_tokens = 8;
  config_.candidates = 24;
  config_.host_memory = 4 << 20;
  config_.num_threads = options.num_threads;
  config_.index_threads = options.index_threads;
  config_.telemetry = "trace";
  config_.integrity = "always";
  config_.dci_promotion = 0.1;
}

// Values in [-1, 1) by splitmix64; neighbours in a sequence are somewhat alike.
std::vector<float> Life::rows(int count) {
  std::vector<float> x(static_cast<std::size_t>(count) * kDim);
  for (float& value : x) {
    std::uint64_t z = (random_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    value = static_cast<float>(z >> 40) / 8388608.0f - 1.0f;
  }
  return x;
}

void Life::fail(const std::string& what) {
  if (record_.failure.empty()) record_.failure = what;
}

bool Life::attempt(const std::string& name, const std::function<void()>& call) {
  const auto once = [&] {
    const Counted counted;
    call();
  };
  try {
    once();
    return false;
  } catch (const std::bad_alloc&) {
  } catch (const std::exception& error) {
    const bool told = dynamic_cast<const OutOfPages*>(&error) != nullptr ||
                      std::strstr(error.what(), "threads") != nullptr;
    if (!told) fail(name + " threw " + error.what());
  }
  if (!fired()) fail(name + " threw without a fault");
  if (options_.checks_at_once) verify("after " + name + " threw");
  try {
    once();
  } catch (const std::exception& error) {
    fail(name + ", done again, threw " + error.what());
  }
  return true;
}

std::int64_t Life::length(SeqId id) const {
  return static_cast<std::int64_t>(models_.at(id)[0].keys[0].size()) / kDim;
}

void Life::verify(const std::string& when) {
  if (engine_ == nullptr) return;
  try {
    engine_->check_integrity();
    if (engine_->memory().sequences != static_cast<std::int64_t>(models_.size())) {
      fail(when + " the number of sequences is another");
    }
    for (const auto& [id, model] : models_) {
      for (int layer = 0; layer < kLayers; ++layer) {
        const auto tokens = static_cast<std::int64_t>(model[layer].keys[0].size()) / kDim;
        if (engine_->length(id, layer) != tokens) {
          return fail(when + " a length is " + std::to_string(engine_->length(id, layer)) +
                      ", not " + std::to_string(tokens));
        }
        std::vector<float> keys(kHeads * tokens * kDim), values(keys.size());
        engine_->gather(id, layer, view(keys, kHeads, tokens), view(values, kHeads, tokens));
        for (int h = 0; h < kHeads; ++h) {
          const auto at = static_cast<std::ptrdiff_t>(h * tokens * kDim);
          if (!holds(keys.data() + at, model[layer].keys[h]) ||
              !holds(values.data() + at, model[layer].values[h])) {
            return fail(when + " keys or values are others");
          }
        }
      }
    }
  } catch (const std::exception& error) {
    fail(when + ": " + error.what());
  }
}

bool Life::holds(const float* got, const std::vector<float>& given) const {
  constexpr float kNear = 0.02f;  // numbers are in [-1, 1)
  const bool exact = options_.kv_dtype != "int8";
  const auto sinks = static_cast<std::size_t>(config_.sink_tokens * kDim);
  for (std::size_t i = 0; i < given.size(); ++i) {
    const float bound = exact || i < sinks ? 0.0f : kNear;
    if (!(std::abs(got[i] - given[i]) <= bound)) return false;
  }
  return true;
}

SeqId Life::create() {
  SeqId id = -1;
  attempt("new_sequence", [&] { id = engine_->new_sequence(); });
  models_[id].assign(
      kLayers, {std::vector<std::vector<float>>(kHeads), std::vector<std::vector<float>>(kHeads)});
  return id;
}

SeqId Life::fork(SeqId from) {
  SeqId id = -1;
  attempt("fork", [&] { id = engine_->fork(from); });
  models_[id] = models_[from];
  return id;
}

SeqId Life::fork(SeqId from, std::int64_t length) {
  SeqId id = -1;
  attempt("fork of the first tokens", [&] { id = engine_->fork(from, length); });
  models_[id] = models_[from];
  cut(id, length);
  return id;
}

void Life::truncate(SeqId id, std::int64_t length) {
  attempt("truncate", [&] { engine_->truncate(id, length); });
  cut(id, length);
}

void Life::cut(SeqId id, std::int64_t length) {
  for (Layer& layer : models_[id]) {
    for (auto* side : {&layer.keys, &layer.values}) {
      for (std::vector<float>& x : *side) x.resize(length * kDim);
    }
  }
}

void Life::release(SeqId id) {
  attempt("release", [&] { engine_->release(id); });
  models_.erase(id);
}

namespace {

// Adds rows [Hkv, T, D] to those that a layer must hold.
void extend(std::vector<std::vector<float>>& to, const std::vector<float>& rows) {
  const auto per_head = static_cast<std::ptrdiff_t>(rows.size() / kHeads);
  for (int h = 0; h < kHeads; ++h) {
    to[h].insert(to[h].end(), rows.begin() + h * per_head, rows.begin() + (h + 1) * per_head);
  }
}

}  // namespace

void Life::append(SeqId id, int tokens) {
  for (int layer = 0; layer < kLayers; ++layer) {
    Tensors t;
    t.add(*this, tokens);
    attempt("append", [&] { engine_->append({&id, 1}, layer, t.k, t.v); });
    extend(models_[id][layer].keys, t.keys[0]);
    extend(models_[id][layer].values, t.values[0]);
  }
}

void Life::attend(SeqId id, int tokens) {
  for (int layer = 0; layer < kLayers; ++layer) {
    Tensors t;
    t.add(*this, tokens);
    attempt("attend", [&] { engine_->attend({&id, 1}, layer, t.q, t.o); });
    record_.outputs.insert(record_.outputs.end(), t.outputs[0].begin(), t.outputs[0].end());
  }
}

void Life::observe(SeqId id, int tokens) {
  for (int layer = 0; layer < kLayers; ++layer) {
    Tensors t;
    t.add(*this, tokens);
    attempt("observe", [&] { engine_->observe({&id, 1}, layer, t.q); });
  }
}

void Life::step(const std::vector<SeqId>& ids, int tokens, Phase phase) {
  const std::vector<Phase> phases(ids.size(), phase);
  for (int layer = 0; layer < kLayers; ++layer) {
    Tensors t;
    for (std::size_t b = 0; b < ids.size(); ++b) t.add(*this, tokens);
    const bool threw =
        attempt("step", [&] { engine_->step(ids, layer, t.k, t.v, t.q, t.o, phases); });
    if (threw && tokens > 1 && phase == Phase::kAuto) record_.several_tokens_threw = true;
    for (std::size_t b = 0; b < ids.size(); ++b) {
      extend(models_[ids[b]][layer].keys, t.keys[b]);
      extend(models_[ids[b]][layer].values, t.values[b]);
      record_.outputs.insert(record_.outputs.end(), t.outputs[b].begin(), t.outputs[b].end());
    }
  }
}

// The calls that only read.
void Life::look(SeqId id) {
  HeadStats stats;
  MemoryStats memory;
  StepTrace trace;
  std::int64_t tokens = 0;
  std::vector<float> keys(kHeads * length(id) * kDim), values(keys.size());
  attempt("stats", [&] { stats = engine_->stats(1, 0); });
  attempt("memory", [&] { memory = engine_->memory(); });
  attempt("trace", [&] { trace = engine_->trace(id, 1, 1); });
  attempt("length", [&] { tokens = engine_->length(id, 0); });
  attempt("gather", [&] {
    engine_->gather(id, 0, view(keys, kHeads, length(id)), view(values, kHeads, length(id)));
  });
  attempt("check_integrity", [&] { engine_->check_integrity(); });
  if (tokens != length(id)) fail("length() is another");
}

// Whatever has happened, an index answers again in the end.
void Life::check_decoding(const std::vector<SeqId>& ids) {
  const std::int64_t before = engine_->stats(0, 0).steps;
  step(ids, 1);
  if (engine_->stats(0, 0).steps != before + static_cast<std::int64_t>(ids.size())) {
    fail("the last steps are not within the budget");
  }
}

void Life::script() {
  attempt("construction", [&] { engine_ = std::make_unique<Engine>(shape_, config_); });
  const SeqId a = create();
  step({a}, 15, Phase::kPrefill);
  step({a}, 14, Phase::kPrefill);
  step({a}, 9, Phase::kPromptEnd);
  const SeqId b = create();
  append(b, 12);
  attend(b, 12);
  append(b, 23);
  observe(b, 23);
  look(b);
  for (int i = 0; i < 9; ++i) step({a, b}, 1);
  const SeqId c = fork(a);
  for (int i = 0; i < 3; ++i) step({c, a}, 1);
  step({a}, 4);
  truncate(a, length(a) - 3);
  truncate(c, 30);
  step({c, b}, 2);
  look(a);
  step({b}, 20);
  release(b);
  // Until segments have been sealed and merged.
  for (int i = 0; i < 40; ++i) step({a, c}, 1);
  attempt("reset_stats", [&] { engine_->reset_stats(); });
  check_decoding({a, c});
  attempt("synchronize", [&] { engine_->synchronize(); });
  record_.pool_bytes = engine_->pool_bytes();
  step({c}, 17, Phase::kPromptEnd);  // left pending
  const SeqId d = fork(c);
  attempt("retain", [&] { engine_->retain(c); });
  const SeqId e = fork(c, length(c) - 9);
  step({e}, 1);
  release(e);
  release(c);
  if (options_.picks_in_prompts) {
    const SeqId f = create();
    step({f}, 384, Phase::kPrefill);  // one chunk
    step({f}, 100, Phase::kPrefill);  // another one, in the middle of a block
    truncate(f, length(f) - 10);
    step({f}, 50, Phase::kPromptEnd);
    step({f}, 1);
    if (engine_->stats(0, 0).sparse_prompt_tokens == 0) fail("the prompt attended to everything");
  }
  step({d}, 12);  // pending at destruction
  verify("at the end");
}

LifeRecord Life::run() {
  exempt_this_thread();
  script();
  if (engine_ != nullptr) {
    for (const auto& [id, model] : models_) engine_->release(id);
    if (engine_->pool_bytes() != 0) fail("pages are left when all sequences are released");
  }
  {
    const Counted counted;
    engine_.reset();
  }
  return std::move(record_);
}

}  // namespace icecache::fault

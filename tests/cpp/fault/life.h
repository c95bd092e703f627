// Life: a scripted life of an Engine with all its verbs, in which each call that throws is checked
// to have changed nothing and is then done again.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "icecache/engine.h"

namespace icecache::fault {

struct LifeOptions {
  std::string index = "tree", faiss_search = "sketch", kv_dtype = "auto";
  int num_threads = 1, index_threads = 1;
  bool picks_in_prompts = false;  // within prefill_budget
  // After a call that threw: checks the sequences at once (true), or does the call again at once,
  // while background work may be pending (false).
  bool checks_at_once = true;
};

// What a life has left behind, and what of it was not as promised.
struct LifeRecord {
  std::vector<float> outputs;   // of all attention, in order
  std::int64_t pool_bytes = 0;  // when all is at rest, before the sequences are released
  std::string failure;          // what was not as promised; empty: nothing
  // A step of several tokens within the budget threw: it may have inserted between its tokens, and
  // done again, its first tokens find those in the index.
  bool several_tokens_threw = false;
};

class Life {
 public:
  explicit Life(const LifeOptions& options);
  // Lives it from construction to destruction.
  LifeRecord run();

 private:
  // What a sequence must hold: [layer] rows [Hkv][L][D].
  struct Layer {
    std::vector<std::vector<float>> keys, values;  // [Hkv] of [L, D]
  };
  using Model = std::vector<Layer>;

  // Returns whether the call threw at first.
  bool attempt(const std::string& name, const std::function<void()>& call);
  void fail(const std::string& what);
  void verify(const std::string& when);
  // True where rows [L, D] that the engine gave back are those that it was given: with kv_dtype =
  // "int8" near them, but for those of sinks, which never are in eight bits.
  bool holds(const float* got, const std::vector<float>& given) const;

  SeqId create();
  SeqId fork(SeqId from);
  SeqId fork(SeqId from, std::int64_t length);
  void cut(SeqId id, std::int64_t length);  // the model alone
  void truncate(SeqId id, std::int64_t length);
  void release(SeqId id);
  void append(SeqId id, int tokens);
  void attend(SeqId id, int tokens);
  void observe(SeqId id, int tokens);
  void step(const std::vector<SeqId>& ids, int tokens, Phase phase = Phase::kAuto);
  void look(SeqId id);
  void check_decoding(const std::vector<SeqId>& ids);

  void script();

  struct Tensors;
  std::vector<float> rows(int count);
  std::int64_t length(SeqId id) const;

  LifeOptions options_;
  CacheShape shape_;
  Config config_;
  std::unique_ptr<Engine> engine_;
  std::map<SeqId, Model> models_;
  LifeRecord record_;
  std::uint64_t random_ = 1;
};

}  // namespace icecache::fault
